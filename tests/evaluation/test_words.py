from collections.abc import Callable

import pytest

from tiny_lm.data import BinDataConfig
from tiny_lm.data.bin.stream import open_stream
from tiny_lm.evaluation import words
from tiny_lm.evaluation.words import absent_words, distinct, repeated, words_of
from tiny_lm.tokenizer import Tokenizer


def test_words_are_letters_with_apostrophes_inside_them() -> None:
    assert words_of("Don’t go, 'Élan'! It's 3 o'clock—now_then.") == [
        "don't",
        "go",
        "élan",
        "it's",
        "o'clock",
        "now",
        "then",
    ]


def test_distinct_counts_over_all_texts_and_repeated_within_each() -> None:
    texts = [["a", "b", "a", "b"], ["a", "b"]]
    assert distinct(texts, 1) == 2 / 6
    assert distinct(texts, 2) == 2 / 4  # ab and ba, of ab ba ab and ab
    assert repeated(texts, 2) == 1 / 4  # ab again in the first; the second has it for the first time
    assert (distinct([], 2), repeated([["a"]], 2)) == (0.0, 0.0)


def test_absent_words_are_those_of_no_training_story(
    data_config: Callable[..., BinDataConfig],
    tokenizer: Tokenizer,
    stories: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(words, "_PIECE", 997)  # documents end inside pieces, and some are longer than one
    config = data_config()
    stream = open_stream(config.train_path, config)
    vocabulary = set(words_of("\n".join(stories[:280])))
    read: list[int] = []
    asked = vocabulary | {"flurbish", "zzz"}
    assert absent_words(asked, stream, tokenizer, read.append) == {"flurbish", "zzz"}
    assert sum(read) == stream.tokens
    read.clear()
    first = words_of(stories[0])[:3]
    assert absent_words(first, stream, tokenizer, read.append) == set()
    assert sum(read) < stream.tokens / 2  # it ends where the last word was found
