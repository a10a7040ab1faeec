"""The longest copy, by hashing and bisection, against looking everywhere."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiny_lm.evaluation import copies
from tiny_lm.evaluation.copies import Copy, copied_tokens, longest_copies

Stream = list[int]


def in_pieces(stream: Stream, size: int, dtype: str = "uint16") -> Callable[[int], Iterator[npt.NDArray[Any]]]:
    array = np.array(stream, dtype=dtype)

    def pieces(overlap: int) -> Iterator[npt.NDArray[Any]]:
        for start in range(0, len(array), size):
            yield array[max(start - overlap, 0) : start + size]

    return pieces


def occurs(part: list[int], stream: Stream) -> bool:
    return any(stream[start : start + len(part)] == part for start in range(len(stream) - len(part) + 1))


def longest_by_looking_everywhere(story: list[int], stream: Stream) -> Copy:
    for length in range(len(story), 0, -1):
        for start in range(len(story) - length + 1):
            if occurs(story[start : start + length], stream):
                return Copy(start, length)
    return Copy(0, 0)


few_tokens = st.integers(0, 3)  # so few that long copies happen by themselves
streams = st.lists(few_tokens, min_size=1, max_size=60)


@settings(max_examples=60, deadline=None)
@given(streams, st.lists(st.lists(st.integers(0, 4), max_size=30), min_size=1, max_size=4), st.integers(1, 30))
def test_the_longest_copy_is_the_one_that_looking_everywhere_finds(
    stream: Stream, stories: list[list[int]], size: int
) -> None:
    expected = [longest_by_looking_everywhere(story, stream) for story in stories]
    assert longest_copies(stories, in_pieces(stream, size)) == expected


@settings(max_examples=40, deadline=None)
@given(streams, st.lists(few_tokens, max_size=30), st.integers(1, 5), st.integers(1, 30))
def test_copied_tokens_are_those_of_all_long_copies(stream: Stream, story: list[int], length: int, size: int) -> None:
    covered: set[int] = set()
    for start in range(len(story) - length + 1):
        if occurs(story[start : start + length], stream):
            covered.update(range(start, start + length))
    assert copied_tokens([story], length, in_pieces(stream, size)) == [len(covered)]


@settings(max_examples=30, deadline=None)
@given(streams, st.lists(st.lists(few_tokens, max_size=30), min_size=1, max_size=3))
def test_windows_of_one_hash_are_told_apart(stream: Stream, stories: list[list[int]]) -> None:
    """All tokens hash alike here: only the comparison, token for token, tells windows apart."""
    original = copies._RollingHash.__init__

    def all_alike(self: Any, most_tokens: int, largest_id: int) -> None:
        original(self, most_tokens, largest_id)
        self._values[:] = 7

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copies._RollingHash, "__init__", all_alike)
        found = longest_copies(stories, in_pieces(stream, 20))
    assert found == [longest_by_looking_everywhere(story, stream) for story in stories]


def test_a_story_hidden_in_a_large_stream_is_found_where_pieces_meet() -> None:
    """Real sizes: several pieces of a million tokens, and ids that need 32 bits."""
    random = np.random.default_rng(0)
    stream = random.integers(0, 100_000, size=2_500_000, dtype=np.uint32)
    story = random.integers(0, 100_000, size=300).tolist()
    stream[2**20 - 100 : 2**20 + 71] = story[20:191]
    (copy, nothing) = longest_copies([story, [100_001] * 50], in_pieces(stream, 2**20, "uint32"))
    assert copy == Copy(20, 171)
    assert nothing == Copy(0, 0)
