"""Archives for TorchServe: what they hold, that they are proven, and what their handler takes."""

import json
import os
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_exports import FAMILIES, TrainedRun

from tiny_lm import TextGenerator
from tiny_lm.cli import main
from tiny_lm.errors import UserError
from tiny_lm.export import torchserve
from tiny_lm.export.source import load_source
from tiny_lm.export.torchserve import export_torchserve, load_handler
from tiny_lm.export.torchserve_handler import TinyLMHandler, check_content


class Context(SimpleNamespace):
    """What a handler sees of TorchServe."""

    def set_response_status(self, code: int, phrase: str, idx: int) -> None:
        self.statuses[idx] = (code, phrase)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_archive_tells_what_the_run_tells(family: str, trained_run: TrainedRun, tmp_path: Path) -> None:
    run = trained_run(family)
    checks = export_torchserve(load_source(run.folder), tmp_path / "out")
    assert [check.passed for check in checks] == [True, True]
    names = [f"{run.name}.mar", "config.properties", "verification.json"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(names)
    with zipfile.ZipFile(tmp_path / "out" / names[0]) as archive:
        archive.extractall(tmp_path / "unpacked")
        assert not [name for name in archive.namelist() if name.endswith((".pt", ".pth", ".bin", ".pkl", ".ckpt"))]
    manifest = json.loads((tmp_path / "unpacked" / "MAR-INF" / "MANIFEST.json").read_text())
    assert manifest["model"]["modelName"] == run.name
    handler = load_handler(tmp_path / "unpacked")
    (answer,) = handler.handle([{"data": {"prompt": "One day", "temperature": 0, "max_new_tokens": 40}}], None)
    expected = TextGenerator.from_run(run.folder).generate("One day", max_new_tokens=40, temperature=0)
    assert answer["text"] == expected
    assert set(answer) == {"text", "tokens", "finish_reason"}


def test_files_dated_before_zip_can_be_archived(tmp_path: Path) -> None:
    """Reproducible builds date files to 1970."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    os.utime(model / "config.json", (0, 0))
    torchserve.write_archive(tmp_path / "x.mar", model, "x")
    assert "config.json" in zipfile.ZipFile(tmp_path / "x.mar").namelist()


def test_wrong_requests_do_not_hinder_those_beside_them(trained_run: TrainedRun, tmp_path: Path) -> None:
    source = load_source(trained_run().folder)
    export_torchserve(source, tmp_path / "out")
    with zipfile.ZipFile(next((tmp_path / "out").glob("*.mar"))) as archive:
        archive.extractall(tmp_path / "unpacked")
    context = Context(system_properties={"model_dir": str(tmp_path / "unpacked"), "gpu_id": None}, statuses={})
    handler = TinyLMHandler()
    handler.initialize(context)
    good = {"prompt": "One day", "seed": 3, "max_new_tokens": 5, "min_new_tokens": 5, "logprobs": True}
    first, wrong, last = handler.handle([{"body": good}, {"body": b"\xff"}, {"body": good}], context)
    assert first == last
    assert len(first["logprobs"]) == first["tokens"] == 5
    assert list(wrong) == ["error"]
    assert context.statuses == {1: (400, "Bad Request")}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "send a JSON object"),
        (["prompt"], "send a JSON object"),
        ({}, "'prompt' is missing"),
        ({"prompt": 3}, "prompt has the wrong type"),
        ({"prompt": "x", "n": 2}, "unknown field 'n'"),
        ({"prompt": "x" * 20_001}, "may have at most 20,000 characters"),
        ({"prompt": "x", "max_new_tokens": 2_049}, "may be at most 2,048"),
        ({"prompt": "x", "max_new_tokens": True}, "max_new_tokens has the wrong type"),
        ({"prompt": "x", "temperature": "hot"}, "temperature has the wrong type"),
        ({"prompt": "x", "top_k": 1.5}, "top_k has the wrong type"),
        ({"prompt": "x", "seed": 2**63}, "seed must be"),
        ({"prompt": "x", "seed": -1}, "seed must be"),
        ({"prompt": "x", "stop": "y"}, "stop has the wrong type"),
        ({"prompt": "x", "stop": ["y", 1]}, "list of strings"),
    ],
)
def test_what_a_request_may_not_be(content: Any, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        check_content(content)


def test_another_model_in_the_archive_is_noticed_and_nothing_stays(
    trained_run: TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = load_source(trained_run("qwen3").folder)
    right = torchserve.write_huggingface
    monkeypatch.setattr(torchserve, "write_huggingface", lambda source, *a, **k: right(other, *a, **k))
    with pytest.raises(UserError, match=r"does not match the trained model .*nothing was written"):
        export_torchserve(load_source(trained_run().folder), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_command(
    trained_run: TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = trained_run(), tmp_path / "out"
    words = ["export", "torchserve", str(run.folder), "--output-dir", str(out), "--port", "9000"]
    for extra, code in (([], 0), ([], 2), (["--force", "--dtype", "bfloat16"], 0), (["--dtype", "int8"], 2)):
        monkeypatch.setattr(sys, "argv", ["tiny-lm", *words, *extra])
        with pytest.raises(SystemExit) as exit_:
            main()
        assert int(exit_.value.code or 0) == code
    captured = capsys.readouterr()
    assert f"next: torchserve --start --foreground --ncs --disable-token-auth --model-store {out}" in captured.err
    assert "inference_address=http://127.0.0.1:9000\n" in (out / "config.properties").read_text()
