"""Runs of every family, trained for a moment on stories: what the exporters take."""

from pathlib import Path

import pytest
from tiny_exports import TrainedRun, make_tokenizer, train_run

from tiny_lm.runs import Run
from tiny_lm.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory, stories: list[str], tokenizer: Tokenizer) -> TrainedRun:
    """Return the run of a family and a kind of tokenizer; each is trained once."""
    made: dict[tuple[str, str, int], Run] = {}

    def get(family: str = "llama3", kind: str = "BPE", unused_rows: int = 0) -> Run:
        key = (family, kind, unused_rows)
        if key not in made:
            made[key] = train_run(
                family, unused_rows, make_tokenizer(kind, stories, tokenizer), stories, new_folder(key)
            )
        return made[key]

    def new_folder(key: tuple[str, str, int]) -> Path:
        return tmp_path_factory.mktemp("-".join(map(str, key)))

    return get
