"""Filters, and the split by content."""

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiny_lm.dataset import Filters
from tiny_lm.dataset.filters import apply_filters, in_validation

TEXTS = ["one", "one two", "one two three", "a much longer text of seven words"]


@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        ({}, [0, 1, 2, 3]),
        ({"min_chars": 7}, [1, 2, 3]),
        ({"max_chars": 7}, [0, 1]),
        ({"min_words": 2, "max_words": 3}, [1, 2]),
        ({"max_words": 1, "min_chars": 4}, []),
        ({"min_words": 2, "max_documents": 2}, [1, 2]),
    ],
)
def test_bounds_are_inclusive_and_keep_the_order(filters: dict, kept: list[int]):
    assert list(apply_filters(TEXTS, Filters(**filters))) == [TEXTS[index] for index in kept]


def test_reading_stops_at_max_documents():
    def endless() -> Iterator[str]:
        yield from ("a", "b")
        raise AssertionError("read on")

    assert list(apply_filters(endless(), Filters(max_documents=2))) == ["a", "b"]


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
def test_the_share_held_out_is_the_share_asked_for(share: float):
    count = 20_000
    held = sum(in_validation(f"story {number}", share, seed=1) for number in range(count))
    spread = (count * share * (1 - share)) ** 0.5
    assert abs(held - count * share) < 4 * spread


def test_the_split_is_the_same_on_every_machine():
    # A change of these would silently move documents of existing corpora from one side to the other.
    assert [number for number in range(300) if in_validation(f"story {number}", 0.02, seed=0)] == [13, 59, 81, 115, 213]


@given(st.text(), st.integers())
def test_only_text_and_seed_decide(text: str, seed: int):
    assert in_validation(text, 0.5, seed) == in_validation(f" {text}\n", 0.5, seed)
    assert not in_validation(text, 0.0, seed)
    if in_validation(text, 0.01, seed):
        assert in_validation(text, 0.2, seed)  # a larger share only adds documents


def test_another_seed_holds_out_other_documents():
    held = [{number for number in range(1000) if in_validation(str(number), 0.1, seed)} for seed in (0, 1)]
    assert len(held[0] & held[1]) < 40
