"""`tiny-lm eval` and `tiny-lm harness` as a user types them."""

import json
import shutil
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from tiny_lm.cli.options import expand_multi_value
from tiny_lm.dataset.stories import generate_stories
from tiny_lm.runs import read_metrics

QUICK = ["--samples", "3", "--max-new-tokens", "20"]


@pytest.fixture
def runs(workplace: Path, cli: Callable[..., Any]) -> Path:
    """Two runs on the same text: `runs/bpe` and, with a tokenizer of characters, `runs/char`."""
    (workplace / "text.txt").write_text("\n<|endoftext|>\n".join(generate_stories(60)))
    (workplace / "text.yaml").write_text("name: text.txt\nsource: local\n")
    for kind, size in (("bpe", 400), ("char", 256)):
        type_ = "BPE" if kind == "bpe" else "char"
        (workplace / "t.yaml").write_text(
            f"name: {kind}\ntype: {type_}\nvocab_size: {size}\ndataset_config: text.yaml\nval_split: 0.2\n"
        )
        (workplace / "m.yaml").write_text(
            "vocab_size: 400\ncontext_length: 64\nd_model: 32\nn_layers: 1\nn_heads: 2\nd_ff: 64\n"
        )
        (workplace / "tr.yaml").write_text(
            f"max_steps: 6\nlearning_rate: 0.003\nprecision: 32-true\nrun_name: {kind}\nval_every_n_steps: 3\n"
        )
        (workplace / "d.yaml").write_text(
            f"train_path: data/{kind}-tokenized/train.bin\nval_path: data/{kind}-tokenized/val.bin\n"
            "block_size: 32\nbatch_size: 4\n"
        )
        assert cli("tokenizer", "train", "--config", "t.yaml").code == 0
        assert cli("tokenize", "--config", "t.yaml").code == 0
        files = ("--model-config", "m.yaml", "--training-config", "tr.yaml", "--data-config", "d.yaml")
        result = cli("train", *files)
        assert result.code == 0, result.stderr
    return workplace


def test_one_run_and_two(runs: Path, cli: Callable[..., Any]) -> None:
    result = cli("eval", "runs/bpe", *QUICK, "--plot", "--generate", "A bear", "One day", "--seed", "3")
    assert result.code == 0, result.stderr
    figures = dict(
        line.split(maxsplit=1) for line in result.stdout.splitlines() if line.startswith(("perplexity", "run"))
    )
    evaluation = json.loads((runs / "runs" / "bpe" / "evaluation.json").read_text())
    assert float(figures["perplexity"]) == pytest.approx(evaluation["perplexity"], abs=1e-3)
    last = [event for event in read_metrics(runs / "runs" / "bpe" / "metrics.jsonl") if "val_loss" in event][-1]
    assert evaluation["loss"] == pytest.approx(last["val_loss"], rel=1e-6)
    assert [len(evaluation["samples"]), evaluation["quality"]["seed"]] == [3, 3]
    completions = result.stdout.split("--- ")[1:]
    first, second = (story.split("\n")[1] for story in completions)
    assert first.startswith("A bear")
    assert second.startswith("One day")
    assert "loss.png" in result.stderr
    sliding = cli("eval", "runs/bpe", *QUICK, "--stride", "8")
    assert "method            sliding: sequences of 32 tokens, 8 of them new" in sliding.stdout
    assert "loss by context   16-32: " in sliding.stdout  # only the first sequence has targets nearer to its beginning
    # Both together: one table, one picture, and what may be compared.
    result = cli("eval", "runs/bpe", "runs/char", *QUICK)
    assert result.code == 0, result.stderr
    header, bpe, char = result.stdout.splitlines()
    assert header.split()[:4] == ["run", "step", "val", "loss"]
    assert bpe.startswith("runs/bpe")
    other = json.loads((runs / "runs" / "char" / "evaluation.json").read_text())
    assert f"{other['bits_per_byte']:.4f}" in char
    assert "different tokenizers: compare bits per byte" in result.stderr
    assert (runs / "runs" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    result = cli("eval", "runs/bpe/checkpoints/last.ckpt", *QUICK, "--json", "--stride", "8", "--generate", "A bear")
    found = json.loads(result.stdout)
    assert (found["stream"]["method"], found["stream"]["stride"]) == ("sliding", 8)
    assert found["generated"][0]["prompt"] == "A bear"
    assert found["checkpoint"].endswith("last.ckpt")
    # Streams that were moved: the report reads them where the command says that they are.
    page = runs / "runs" / "bpe" / "report.html"
    assert 'id="heat"' in page.read_text()
    (runs / "data").rename(runs / "moved")
    assert cli("report", "runs/bpe").code == 0
    assert 'id="heat"' not in page.read_text()
    where = [f"--set=data.{name}_path=moved/bpe-tokenized/{name}.bin" for name in ("train", "val")]
    for words in (["report", "runs/bpe"], ["eval", "runs/bpe", *QUICK]):
        page.unlink()
        assert cli(*words, *where).code == 0
        assert 'id="heat"' in page.read_text()
    assert (
        "unknown key 'val_pat'; did you mean 'val_path'?" in cli("report", "runs/bpe", "--set", "data.val_pat=x").stderr
    )


class _Judge(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(404)

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        marks = json.dumps({"grammar": 3, "creativity": 2, "consistency": 4, "plot": 1})
        content = marks if asked["model"] == "big" else "Once upon a time,\nthere was a judge."
        body = json.dumps({"choices": [{"message": {"content": content}}]}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def judge_url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Judge)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_judge_and_everything_a_user_may_get_wrong(runs: Path, cli: Callable[..., Any], judge_url: str) -> None:
    result = cli("eval", "runs/bpe", *QUICK, "--judge", judge_url, "--judge-model", "big")
    assert result.code == 0, result.stderr
    assert "grammar 3.0  creativity 2.0  consistency 4.0  plot 1.0  (of 10; 3 of 3 samples, by big)" in result.stdout
    evaluation = json.loads((runs / "runs" / "bpe" / "evaluation.json").read_text())
    assert evaluation["judge"]["grades"]["plot"] == 1.0
    assert len((runs / "runs" / "bpe" / evaluation["judge"]["answers"]).read_text().splitlines()) == 3

    # A judge that writes a story itself: the results of both runs are printed all the same.
    result = cli("eval", "runs/bpe", "runs/char", *QUICK, "--judge", judge_url, "--judge-model", "storyteller")
    assert result.code == 2
    assert [line.split()[0] for line in result.stdout.splitlines()] == ["run", "runs/bpe", "runs/char"]
    last = result.stderr.splitlines()[-1]
    assert "graded none of 3 samples (the answer has no JSON object with grades; it begins 'Once upon a time," in last
    assert last.endswith("see runs/bpe/judge.jsonl")
    assert json.loads((runs / "runs" / "bpe" / "evaluation.json").read_text())["judge"] is None

    shutil.copytree("runs/bpe", "runs/new")
    shutil.rmtree("runs/new/checkpoints")
    before = (runs / "runs" / "bpe" / "evaluation.json").read_bytes()
    mistakes = {
        ("eval",): "Missing argument",
        ("eval", "runs/absent"): "no such run folder",
        ("eval", "runs/bpe", "runs/new"): "has no checkpoint yet",
        ("eval", "runs/bpe", "--strid", "8"): "--stride",
        ("eval", "runs/bpe", "--stride", "33"): "--stride must be between 1 and block_size=32",
        ("eval", "runs/bpe", "--temperature", "-1"): "temperature must be",
        ("eval", "runs/bpe", "--top-p", "0"): "top-p must be",
        ("eval", "runs/bpe", "--set", "data.val_path=gone.bin"): "gone.bin: no such token stream",
        ("eval", "runs/bpe", "--set", "data.val_path=data/char-tokenized/val.bin"): "tokenizer",
        ("eval", "runs/bpe", "--judge", "http://127.0.0.1:9", "--judge-model", "m"): "does not answer",
        ("eval", "runs/bpe", "--judge", judge_url): "--judge needs --judge-model",
        ("eval", "runs/bpe", "--judge-model", "m"): "belong to --judge URL",
        ("harness", "runs/absent", "--tasks", "x", "--include-path", "."): "x: no such task",
        ("harness", "runs/bpe", "--tasks", ","): "at least one task",
    }
    for words, message in mistakes.items():
        result = cli(*words)
        assert (result.code, result.stdout) == (2, ""), words
        assert message in result.stderr, result.stderr
        assert result.stderr.count("\n") == 1, result.stderr
    assert (runs / "runs" / "bpe" / "evaluation.json").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("RUN --g A B --plot", "RUN --g A --g B --plot"),
        ("R1 R2 --g A --g B C", "R1 R2 --g A --g B --g C"),
        ("--g=A B", "--g=A B"),
        ("R --plot --g", "R --plot --g"),
        ("--stride 3 R", "--stride 3 R"),
    ],
)
def test_one_option_takes_several_values(words: str, expected: str) -> None:
    assert expand_multi_value(words.split(), "--g") == expected.split()
