import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from report_runs import train_small, write_evaluation, write_metrics

from tiny_lm.data import BinDataConfig
from tiny_lm.evaluation.report import write_report
from tiny_lm.runs import Run, read_metrics

VOID = {"meta", "link", "br", "wbr", "input", "img"}


class Page(HTMLParser):
    """The page as a browser takes it apart: its elements, its text outside of scripts, its scripts."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == [], "an element was not closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        elif self.open and self.open[-1] != "style":
            self.text += data

    @property
    def data(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.scripts[0])
        return found

    def count(self, tag: str, **attributes: str) -> int:
        wanted = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items()}
        return sum(tag == name and wanted.items() <= found.items() for name, found in self.elements)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, stream_folder: Path) -> Run:
    def data() -> BinDataConfig:
        paths = {"train_path": str(stream_folder / "train.bin"), "val_path": str(stream_folder / "val.bin")}
        return BinDataConfig(**paths, block_size=64, batch_size=4)

    return train_small(Run(tmp_path_factory.mktemp("runs") / "small"), data)


@pytest.fixture
def folder(trained: Run, tmp_path: Path) -> Run:
    """A run of one's own to change."""
    return Run(shutil.copytree(trained.folder, tmp_path / "small"))


def test_the_page_shows_all_parts_of_a_run(folder: Run) -> None:
    write_evaluation(folder)
    page = Page(write_report(folder))
    record = folder.read_metadata()
    assert f"{record['metrics']['val_loss']:.3f}" in page.text
    assert f"{record['metrics']['val_bpb']:.3f}" in page.text
    assert f"{record['parameters']:,} parameters, by part" in page.text
    for name in ("loss", "lr", "norm", "speed", "position"):
        assert page.count("figure", data_chart=name) == 1
    assert page.count("article") == 3  # three moments of training
    assert [f"step {step}" in page.text for step in (20, 40, 60)] == [True] * 3
    assert page.count("span", data_i="0") == 1
    assert len(page.data["attention"]["maps"]) == 8
    assert "4.5678" in page.text
    assert "flumbled" in page.text
    assert "all lived happily ever after" in page.text
    assert "some-judge" in page.text
    assert "gzip" in page.text
    assert record["environment"]["processor"] in page.text
    assert record["environment"]["git"] is None or record["environment"]["git"]["commit"] in page.text
    assert "d_model: 32" in page.text
    assert page.source.count('class="absent"') == 1  # the quickstart promises no figure
    assert len(page.source) < 300_000


def test_the_page_needs_nothing_from_elsewhere(folder: Run) -> None:
    page = Page(write_report(folder))
    assert page.count(
        "meta",
        http_equiv="Content-Security-Policy",
        content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:",
    )
    addresses = [value for _, found in page.elements for key, value in found.items() if key in ("src", "href")]
    assert all(address and address.startswith(("#", "data:,")) for address in addresses)
    style = re.search(r"<style>(.*?)</style>", page.source, re.DOTALL)
    assert style and "url(" not in style[1] and "@import" not in style[1]


def test_surprise_and_attention_are_the_models_own(folder: Run) -> None:
    data = Page(write_report(folder)).data
    tokens = data["tokens"]
    assert len(tokens) >= 30
    for token in tokens:
        assert token["p"] == pytest.approx(2 ** -token["bits"], rel=0.01)
        shares = [share for _, share in token["others"]]
        assert shares == sorted(shares, reverse=True)
        assert token["rank"] > 5 or shares[token["rank"] - 1] == token["p"]
        assert token["rank"] <= 5 or shares[-1] >= token["p"]
    assert data["attention"]["tokens"][0] == "<bos>"


def remove(*names: str) -> Callable[[Run], None]:
    def do(run: Run) -> None:
        for name in names:
            path = run.folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return do


def move_stream(run: Run) -> None:
    config = run.configs / "data.yaml"
    config.write_text(re.sub(r"val_path: .*", "val_path: gone/val.bin", config.read_text()))


def damage(name: str, content: bytes) -> Callable[[Run], None]:
    def do(run: Run) -> None:
        (run.folder / name).write_bytes(content)

    return do


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (move_stream, "gone/val.bin: no such token stream"),
        (remove("samples.md"), "No samples were generated during training"),
        (remove("checkpoints"), "has no checkpoint yet"),
        (remove("tokenizer"), "The tokenizer cannot be shown"),
        (remove("configs"), "The configs are not in the run folder"),
        (remove("metrics.jsonl"), "No metrics were logged yet"),
        (remove("checkpoints", "samples.md", "tokenizer", "configs", "metrics.jsonl"), "The model's config cannot be"),
        (damage("run.json", b"{}"), "This run has no final metrics yet"),
        (
            damage("run.json", b'{"metrics": 3, "environment": [], "memory": null, "configs": 1}'),
            "no final metrics yet",
        ),
        (damage("checkpoints/best.ckpt", b"junk"), "is damaged or not a checkpoint"),
        (damage("evaluation.json", b'{"loss": "low"}'), "is not an evaluation that this version reads"),
        (damage("metrics.jsonl", b'{"step": 3, "train_loss": NaN}\n\xff\n{"st'), "No metrics were logged yet"),
        (damage("samples.md", b"## Step 3\n\n> a\n"), "step 3"),
        (damage("configs/model.yaml", b"d_model: 0"), "The model's config cannot be shown"),
    ],
)
def test_what_is_missing_or_damaged_is_said_in_a_line(folder: Run, change: Callable[[Run], None], line: str) -> None:
    change(folder)
    assert line in Page(write_report(folder)).text


def test_without_the_stream_the_model_reads_its_own_story(folder: Run) -> None:
    move_stream(folder)
    page = Page(write_report(folder))
    assert page.data["tokens"] == []
    assert "".join(page.data["attention"]["tokens"]).startswith("<bos>Once upon a time")


HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\x00\x1b[31m\u202e\u2028]]>\"'`{{ 7 * 7 }}${1}"


def test_hostile_text_is_text(folder: Run) -> None:
    evil = Run(folder.folder.rename(folder.folder.with_name("<b>&amp;{{ 7*7 }}")))
    record = evil.read_metadata()
    evil.update_metadata(device=HOSTILE, environment={**record["environment"], "command": ["tiny-lm", HOSTILE]})
    write_evaluation(
        evil,
        samples=[{"prompt": HOSTILE, "text": HOSTILE}],
        judge={"model": HOSTILE, "grades": {HOSTILE: 3}},
        created=HOSTILE,
    )
    story = "> " + HOSTILE.replace("\u2028", "")
    evil.samples.write_text(f"# x\n\n## Step 7\n\nval loss 1.0, 2 tokens seen\n\n{story}\n", encoding="utf-8")
    (evil.configs / "training.yaml").write_text("seed: '" + HOSTILE.split("\x00")[0] + "'\n", encoding="utf-8")
    page = Page(write_report(evil))
    assert len(page.scripts) == 2
    assert page.count("img") == 0
    assert not any(key.startswith("on") for _, found in page.elements for key in found)
    assert page.text.count("<script>alert(1)</script>") >= 6
    assert "49" not in page.text.split("Training report")[1][:40]
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\u2028]", page.source)


@pytest.mark.parametrize("value", ["1e400", "'5'", "[1, 2]", "{a: 1}", "2001-01-01", "true", "1" + 400 * "0", "null"])
def test_values_of_another_type_in_a_config_are_left_out(folder: Run, value: str) -> None:
    for name in ("training", "data"):
        file = folder.configs / f"{name}.yaml"
        lines = file.read_text(encoding="utf-8").splitlines()
        swapped = [line if line.startswith(" ") else f"{line.partition(':')[0]}: {value}" for line in lines]
        file.write_text("\n".join(swapped), encoding="utf-8")
    assert "Recipe" in Page(write_report(folder)).text


def test_a_long_run_has_a_small_page(folder: Run) -> None:
    events = [
        {"step": step, "train_loss": 9.0 / step**0.1 + (step == 77_777), "lr": 0.1, "grad_norm": 1.0, "val_loss": 3.0}
        for step in range(1, 100_001)
    ]
    write_metrics(folder, events)
    page = Page(write_report(folder))
    assert len(page.source) < 400_000
    raw = page.data["charts"]["loss"]["lines"][0]["points"]
    assert 77_777 in [point[0] for point in raw]  # the spike is still there


def test_a_run_in_training_has_a_page(folder: Run) -> None:
    record = folder.read_metadata()
    for key in ("steps", "tokens", "seconds", "memory", "metrics"):
        del record[key]
    folder.metadata_file.write_text(json.dumps({**record, "status": "running"}), encoding="utf-8")
    write_metrics(folder, read_metrics(folder.metrics)[:1])
    page = Page(write_report(folder))
    assert "in training" in page.text
    assert page.count("figure", data_chart="loss") == 1


def test_the_page_is_written_again(folder: Run) -> None:
    before = write_report(folder).read_text()
    folder.update_metadata(device="another machine")
    after = write_report(folder).read_text()
    assert "another machine" in after
    assert "another machine" not in before
