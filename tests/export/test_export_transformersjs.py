"""ONNX exports in the real transformers.js on Node.js (``make test-transformersjs`` installs it)."""

import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_exports import FAMILIES, TrainedRun

from tiny_lm.export.agreement import Reference
from tiny_lm.export.onnx import CACHED, QUANTIZED, export_onnx
from tiny_lm.export.onnx_engine import OnnxEngine
from tiny_lm.export.source import ExportSource, load_source
from tiny_lm.export.verify import OwnEngine, check_greedy, check_tokens

pytestmark = pytest.mark.transformersjs

SCRIPT = Path(__file__).with_name("transformersjs.cjs")


class TransformersJs:
    """An engine: a Node.js process that answers requests."""

    def __init__(self, folder: Path, source: ExportSource, *, dtype: str) -> None:
        command = ["node", str(SCRIPT), os.environ["TRANSFORMERS_JS"]]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8")
        self.eos_id, self.size = source.tokenizer.eos_id, source.config.vocab_size
        self.name = self.ask("load", folder=str(folder), dtype=dtype)

    def ask(self, action: str, **values: object) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps({"action": action, **values}), file=self.process.stdin, flush=True)
        answer = json.loads(self.process.stdout.readline())
        assert "result" in answer, answer["error"]
        return answer["result"]

    def close(self) -> None:
        self.process.communicate(timeout=60)

    def encode(self, text: str) -> list[int]:
        return self.ask("encode", text=text, begin=False)

    def encode_document_start(self, text: str) -> list[int]:
        return self.ask("encode", text=text, begin=True)

    def log_probabilities(self, ids: Sequence[int]) -> torch.Tensor:
        return self.table(self.ask("logits", ids=list(ids)))

    def in_browser(self, file: Path, ids: Sequence[int]) -> torch.Tensor:
        return self.table(self.ask("browser", file=str(file), ids=list(ids)))

    def table(self, logits: list[float]) -> torch.Tensor:
        return torch.tensor(logits).view(-1, self.size).log_softmax(dim=-1)

    def greedy(self, ids: Sequence[int], count: int) -> list[int]:
        made = self.ask("generate", ids=list(ids), count=count)
        return made[: made.index(self.eos_id)] if self.eos_id in made else made


@pytest.fixture
def start() -> Iterator[Any]:
    started: list[TransformersJs] = []

    def make(folder: Path, source: ExportSource, *, dtype: str) -> TransformersJs:
        started.append(TransformersJs(folder, source, dtype=dtype))
        return started[-1]

    yield make
    for engine in started:
        engine.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_is_the_same_model(family: str, trained_run: TrainedRun, tmp_path: Path, start: Any) -> None:
    source = load_source(trained_run(family).folder)
    export_onnx(source, tmp_path / "out")
    own, engine = OwnEngine(source), start(tmp_path / "out", source, dtype="fp32")
    checks = check_tokens(source, own, engine)
    reference = Reference(source)
    checks += [*reference.check(engine), check_greedy(source, own, engine, reference.difference_limit)]
    assert [check for check in checks if not check.passed] == []
    # and with eight bits, which is what transformers.js takes in a browser
    small, python = start(tmp_path / "out", source, dtype="q8"), OnnxEngine(tmp_path / "out", QUANTIZED, source)
    ids = source.validation.ids[:50]
    expected = python.log_probabilities(ids)
    assert not torch.allclose(expected, own.log_probabilities(ids), rtol=0, atol=1e-3)
    torch.testing.assert_close(small.log_probabilities(ids), expected, rtol=0, atol=1e-4)
    assert len(small.greedy(ids[:5], 20)) > 0
    # in the WebAssembly that browsers run
    exact = own.log_probabilities(ids)
    torch.testing.assert_close(small.in_browser(tmp_path / "out" / CACHED, ids), exact, rtol=0, atol=1e-4)
    # Other arithmetic rounds an activation between two of its 256 levels the other way now and then, which moves the
    # positions from there on by less than eight bits do.
    differences = (small.in_browser(tmp_path / "out" / QUANTIZED, ids) - expected).abs()
    assert (differences < 1e-4).double().mean() > 0.9
    assert differences.max() < (expected - exact).abs().max() / 2


@pytest.mark.parametrize("kind", ["sentencepiece", "char"])
def test_other_tokenizers(kind: str, trained_run: TrainedRun, tmp_path: Path, start: Any) -> None:
    source = load_source(trained_run("llama3", kind).folder)
    export_onnx(source, tmp_path / "out")
    engine = start(tmp_path / "out", source, dtype="fp32")
    assert [check for check in check_tokens(source, OwnEngine(source), engine) if not check.passed] == []
