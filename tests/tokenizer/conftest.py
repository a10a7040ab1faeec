"""Corpora, and one small tokenizer of each kind."""

from pathlib import Path

import pytest
from tokenizer_samples import KINDS, gpt2_style, made_up_stories, make_config

from tiny_lm.tokenizer import BPETokenizer, Tokenizer, train_tokenizer

STORIES = Path(__file__).parents[2] / "../shared/data/tinystories"


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    return made_up_stories()


@pytest.fixture(scope="session")
def real_stories() -> list[str]:
    file = STORIES / "valid.txt"
    if not file.is_file():
        pytest.skip("the TinyStories excerpt is not on this machine")
    return [story.strip() for story in file.read_text(encoding="utf-8").split("<|endoftext|>") if story.strip()]


@pytest.fixture(scope="session")
def tokenizers(corpus: list[str]) -> dict[str, Tokenizer]:
    made = {kind: train_tokenizer(make_config(kind), corpus) for kind in KINDS if kind != "gpt2"}
    assert isinstance(made["BPE"], BPETokenizer)
    made["gpt2"] = gpt2_style(made["BPE"])
    return made
