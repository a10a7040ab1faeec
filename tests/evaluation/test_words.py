from collections.abc import Callable

import pytest

from tiny_lm.data import BinDataConfig
from tiny_lm.data.bin.stream import open_stream
from tiny_lm.evaluation import words
from tiny_lm.evaluation.words import distinct_share, repeated_share, split_words, words_not_in_stream
from tiny_lm.tokenizer import Tokenizer


def test_words_are_letters_with_apostrophes_inside_them() -> None:
    assert split_words("Don’t go, 'Élan'! It's 3 o'clock—now_then.") == [
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
    assert distinct_share(texts, 1) == 2 / 6
    assert distinct_share(texts, 2) == 2 / 4  # ab and ba, of ab ba ab and ab
    assert repeated_share(texts, 2) == 1 / 4  # ab again in the first; the second has it for the first time
    assert (distinct_share([], 2), repeated_share([["a"]], 2)) == (0.0, 0.0)


def test_absent_words_are_those_of_no_training_story(
    data_config: Callable[..., BinDataConfig],
    tokenizer: Tokenizer,
    stories: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(words, "_CHUNK", 997)  # documents end inside chunks, and some are longer than one
    config = data_config()
    stream = open_stream(config.train_path, config)
    vocabulary = set(split_words("\n".join(stories[:280])))
    read: list[int] = []
    asked = vocabulary | {"flurbish", "zzz"}
    assert words_not_in_stream(asked, stream, tokenizer, read.append) == {"flurbish", "zzz"}
    assert sum(read) == stream.tokens
    read.clear()
    first = split_words(stories[0])[:3]
    assert words_not_in_stream(first, stream, tokenizer, read.append) == set()
    assert sum(read) < stream.tokens / 2  # it ends where the last word was found
