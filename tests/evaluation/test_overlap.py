"""The longest match, by hashing and bisection, against an exhaustive search."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiny_lm.evaluation import overlap as overlap_module
from tiny_lm.evaluation.overlap import Match, count_matched_tokens, longest_matches

Stream = list[int]


def in_chunks(stream: Stream, size: int, dtype: str = "uint16") -> Callable[[int], Iterator[npt.NDArray[Any]]]:
    array = np.array(stream, dtype=dtype)

    def chunks(overlap: int) -> Iterator[npt.NDArray[Any]]:
        for start in range(0, len(array), size):
            yield array[max(start - overlap, 0) : start + size]

    return chunks


def occurs(part: list[int], stream: Stream) -> bool:
    return any(stream[start : start + len(part)] == part for start in range(len(stream) - len(part) + 1))


def longest_by_exhaustive_search(story: list[int], stream: Stream) -> Match:
    for length in range(len(story), 0, -1):
        for start in range(len(story) - length + 1):
            if occurs(story[start : start + length], stream):
                return Match(start, length)
    return Match(0, 0)


few_tokens = st.integers(0, 3)  # so few that long matches happen by chance
streams = st.lists(few_tokens, min_size=1, max_size=60)


@settings(max_examples=60, deadline=None)
@given(streams, st.lists(st.lists(st.integers(0, 4), max_size=30), min_size=1, max_size=4), st.integers(1, 30))
def test_longest_match_equals_that_of_an_exhaustive_search(stream: Stream, stories: list[list[int]], size: int) -> None:
    expected = [longest_by_exhaustive_search(story, stream) for story in stories]
    assert longest_matches(stories, in_chunks(stream, size)) == expected


@settings(max_examples=40, deadline=None)
@given(streams, st.lists(few_tokens, max_size=30), st.integers(1, 5), st.integers(1, 30))
def test_matched_tokens_are_those_of_all_long_matches(stream: Stream, story: list[int], length: int, size: int) -> None:
    covered: set[int] = set()
    for start in range(len(story) - length + 1):
        if occurs(story[start : start + length], stream):
            covered.update(range(start, start + length))
    assert count_matched_tokens([story], length, in_chunks(stream, size)) == [len(covered)]


@settings(max_examples=30, deadline=None)
@given(streams, st.lists(st.lists(few_tokens, max_size=30), min_size=1, max_size=3))
def test_ngrams_of_one_hash_are_distinguished(stream: Stream, stories: list[list[int]]) -> None:
    """All tokens hash alike here: only the comparison, token for token, distinguishes n-grams."""
    original = overlap_module._RollingHash.__init__

    def all_alike(self: Any, max_tokens: int, max_id: int) -> None:
        original(self, max_tokens, max_id)
        self._values[:] = 7

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overlap_module._RollingHash, "__init__", all_alike)
        found = longest_matches(stories, in_chunks(stream, 20))
    assert found == [longest_by_exhaustive_search(story, stream) for story in stories]


def test_text_in_a_large_stream_is_found_across_chunks() -> None:
    """Real sizes: several chunks of a million tokens, and ids that need 32 bits."""
    random = np.random.default_rng(0)
    stream = random.integers(0, 100_000, size=2_500_000, dtype=np.uint32)
    story = random.integers(0, 100_000, size=300).tolist()
    stream[2**20 - 100 : 2**20 + 71] = story[20:191]
    (match, nothing) = longest_matches([story, [100_001] * 50], in_chunks(stream, 2**20, "uint32"))
    assert match == Match(20, 171)
    assert nothing == Match(0, 0)
