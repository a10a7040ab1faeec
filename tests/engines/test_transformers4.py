"""What transformers 5 exported is the same model in transformers 4 (``make test-transformers4`` installs it)."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_exports import FAMILIES, TrainedRun, make_tokenizer, train_run

from tiny_lm.export.huggingface import export_huggingface
from tiny_lm.export.source import load_source
from tiny_lm.runs import Run
from tiny_lm.tokenizer import BPETokenizer, Tokenizer
from tiny_lm.tokenizer.bpe import GPT2_PATTERN, TWO_DIGIT_PATTERN
from tiny_lm.tokenizer.config import GPT2_SPECIALS
from tiny_lm.tokenizer.gpt2 import GPT2Tokenizer

pytestmark = pytest.mark.transformers4

ROOT = Path(__file__).parents[2]
PACKAGES = Path(os.environ.get("TRANSFORMERS4", ROOT / ".venv-transformers4"))
SPECIALS = {"pad": "<pad>", "eos": "<eos>", "bos": "<bos>", "think": "<think>"}

KINDS: dict[str, Callable[[BPETokenizer, list[str]], Tokenizer]] = {
    "sentencepiece": lambda bpe, stories: make_tokenizer("sentencepiece", stories, bpe),
    "char": lambda bpe, stories: make_tokenizer("char", stories, bpe),
    "gpt2": lambda bpe, stories: GPT2Tokenizer(bpe.base, GPT2_SPECIALS),
    "BPE-gpt2-pattern": lambda bpe, stories: BPETokenizer(bpe.base, SPECIALS, pattern=GPT2_PATTERN),
    "BPE-two-digits": lambda bpe, stories: BPETokenizer(bpe.base, SPECIALS, pattern=TWO_DIGIT_PATTERN),
}


def in_transformers4(*words: str | Path) -> str:
    """Run this Python with transformers 4 and what belongs to it in place of ours."""
    assert (PACKAGES / "transformers").is_dir(), f"{PACKAGES} holds no transformers; run `make test-transformers4`"
    paths = os.pathsep.join([str(PACKAGES), str(ROOT)])
    done = subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def runs(
    trained_run: TrainedRun, tokenizer: BPETokenizer, stories: list[str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Run]:
    """A run of each family, and of each kind of tokenizer."""
    by_family = {family: trained_run(family, unused_rows=3) for family in FAMILIES}
    by_kind = {
        kind: train_run("llama3", 0, make(tokenizer, stories), stories, tmp_path_factory.mktemp(kind))
        for kind, make in KINDS.items()
    }
    return by_family | by_kind


@pytest.fixture(scope="module")
def answers(runs: dict[str, Run], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Export all with the transformers of this process; return the checks of each in transformers 4."""
    folder = tmp_path_factory.mktemp("exports")
    words: list[Path] = []
    for name, run in runs.items():
        export_huggingface(load_source(run.folder), folder / name)
        words += [run.folder, folder / name]
    answer = json.loads(in_transformers4(Path(__file__).with_name("check_in_transformers.py"), *words))
    assert answer["version"].startswith("4.")
    return {name: answer["checks"][str(folder / name)] for name in runs}


@pytest.mark.parametrize("name", [*FAMILIES, *KINDS])
def test_it_is_the_same_model(name: str, answers: dict[str, list[dict[str, Any]]]) -> None:
    checks = answers[name]
    assert [check for check in checks if not check["passed"]] == []
    ids, documents, _, *logits, greedy = checks
    assert (ids["value"], documents["value"]) == (0, 0)
    assert len(logits) == 3  # error, divergence, likeliest token
    assert greedy["value"] == 1


def test_transformers_4_exports_as_well(runs: dict[str, Run], tmp_path: Path) -> None:
    code = "from tiny_lm.cli import main; main()"
    out = tmp_path / "out"
    in_transformers4("-c", code, "export", "huggingface", runs["qwen3"].folder, "--output-dir", out)
    report = json.loads((out / "verification.json").read_text())
    assert report["passed"] is True
    assert report["files"]["model.safetensors"]["engine"].startswith("transformers 4.")
