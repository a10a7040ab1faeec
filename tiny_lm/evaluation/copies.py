"""How much of generated text stands word for word in the training stream: memorising shows.

The longest copy of each story is found exactly, over a stream of any size. The hashes of all windows of n tokens of a
piece of the stream come from one vectorised pass (a polynomial modulo 2^64, Karp and Rabin 1987); what looks like a
window of a story is compared with it token for token. That an n-gram occurs in the stream implies that its beginnings
do, so 8, 16, 32, ... tokens are tried first, all in one pass, and then the lengths in between by bisection.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tiny_lm.data.bin.stream import TokenStream, read_in_order

_PIECE = 2**20  # tokens of the stream that are hashed at a time: a few dozen MB in all
_FIRST_POWER = 3  # most stories hold a copy of 8 tokens, and shorter windows are found nearly everywhere
_FILTER_BITS = 22  # a table of 4 MB, which stays in the processor's cache

Pieces = Callable[[int], Iterator[npt.NDArray[Any]]]
"""Yields the stream in pieces, each beginning with the given number of tokens of the one before."""

_Hashes = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Copy:
    """The longest part of a story that stands in the stream too: ``story[start : start + length]``."""

    start: int
    length: int


def pieces_of(stream: TokenStream, progress: Callable[[int], None] | None = None) -> Pieces:
    """Return how to read a stream for the functions below.

    Args:
        stream: the training stream.
        progress: told of the tokens of each piece read; every pass over the stream begins anew.
    """

    def pieces(overlap: int) -> Iterator[npt.NDArray[Any]]:
        for piece in read_in_order(stream, _PIECE, overlap=overlap):
            yield piece
            if progress:
                progress(len(piece))

    return pieces


def longest_copies(stories: Sequence[Sequence[int]], pieces: Pieces) -> list[Copy]:
    """Return the longest verbatim copy in each story, the first one where several are equally long.

    Args:
        stories: token ids, without special tokens.
        pieces: the training stream; it is read about log2(longest copy) times.
    """
    texts = _Texts(stories)
    longest = max(map(len, stories), default=0)
    found = [Copy(0, 0)] * len(stories)
    beyond = [len(story) + 1 for story in stories]  # the shortest length that is known not to occur
    powers = [2**power for power in range(_FIRST_POWER, longest.bit_length())]
    lengths = powers or _bisect(found, beyond)
    while lengths:
        for length, occurs in _occurrences(texts, lengths, pieces).items():
            for story, begins in enumerate(texts.windows_by_story(length)):
                hits = np.flatnonzero(occurs[begins])
                if len(hits) and length > found[story].length:
                    found[story] = Copy(int(hits[0]), length)
                elif len(hits) == 0:
                    beyond[story] = min(beyond[story], length)
        lengths = _bisect(found, beyond)
    return found


def _bisect(found: Sequence[Copy], beyond: Sequence[int]) -> list[int]:
    """Return the lengths halfway between those that are known to occur and those that are known not to."""
    pairs = zip(found, beyond, strict=True)
    return sorted({(copy.length + end) // 2 for copy, end in pairs if end - copy.length > 1})


def copied_tokens(stories: Sequence[Sequence[int]], length: int, pieces: Pieces) -> list[int]:
    """Return how many tokens of each story lie in a verbatim copy of at least ``length`` tokens."""
    texts = _Texts(stories)
    occurs = _occurrences(texts, [length], pieces)[length]
    counts = []
    for story, begins in zip(stories, texts.windows_by_story(length), strict=True):
        copied = np.zeros(len(story), dtype=bool)
        for start in np.flatnonzero(occurs[begins]):
            copied[start : start + length] = True
        counts.append(int(copied.sum()))
    return counts


class _Texts:
    """All stories in a row; a window is named by the place where it begins there."""

    def __init__(self, stories: Sequence[Sequence[int]]) -> None:
        self.ids = np.array([token for story in stories for token in story], dtype=np.int64)  # [N]
        self._lengths = [len(story) for story in stories]
        self._starts = np.cumsum([0, *self._lengths])

    def windows_by_story(self, length: int) -> list[slice]:
        """Return where the windows of ``length`` tokens of each story begin."""
        starts = self._starts[:-1].tolist()
        return [
            slice(start, start + max(size - length + 1, 0)) for start, size in zip(starts, self._lengths, strict=True)
        ]

    def windows(self, length: int) -> npt.NDArray[np.int64]:
        """Return where windows of ``length`` tokens begin that lie in one story."""
        places = [np.arange(begins.start, begins.stop) for begins in self.windows_by_story(length)]
        return np.concatenate(places) if places else np.arange(0)


class _RollingHash:
    """Hashes of all windows of a row of tokens: the sum of ``value[token] * base ** place``, modulo 2^64."""

    def __init__(self, most_tokens: int, largest_id: int) -> None:
        """Hash rows of up to ``most_tokens`` tokens; ids above ``largest_id`` may share one value."""
        random = np.random.default_rng(0)
        self._values = random.integers(2**64, size=max(largest_id + 2, 2**16), dtype=np.uint64)
        base = 0x9E3779B97F4A7C15  # odd, so that it has an inverse; 5 modulo 8, so that its powers repeat late
        self._powers = _powers(base, most_tokens)
        self._inverse = _powers(pow(base, -1, 2**64), most_tokens)

    def sums(self, ids: npt.NDArray[Any]) -> _Hashes:
        """Return the sums over the first 0, 1, 2, ... tokens, ``[N + 1]``."""
        if ids.dtype.itemsize > 2:
            ids = np.minimum(ids, len(self._values) - 1)
        sums = np.zeros(len(ids) + 1, dtype=np.uint64)
        np.cumsum(self._values[ids] * self._powers[: len(ids)], out=sums[1:])
        return sums

    def windows(self, sums: _Hashes, starts: npt.NDArray[np.int64] | None, length: int) -> _Hashes:
        """Return the hash of each window of ``length`` tokens that begins at ``starts``; None for all."""
        if starts is None:
            count = len(sums) - length
            return (sums[length:] - sums[:count]) * self._inverse[:count]
        return (sums[starts + length] - sums[starts]) * self._inverse[starts]


def _powers(base: int, count: int) -> _Hashes:
    factors = np.full(count + 1, base, dtype=np.uint64)
    factors[0] = 1
    return np.multiply.accumulate(factors)


class _Wanted:
    """The windows of one length that are looked for, by their hash."""

    def __init__(self, texts: _Texts, length: int, hashing: _RollingHash, sums: _Hashes) -> None:
        self.length = length
        self._ids = texts.ids
        self.occurs = np.zeros(len(texts.ids), dtype=bool)  # [N], by the window's beginning
        places = texts.windows(length)
        hashes = hashing.windows(sums, places, length)
        order = np.argsort(hashes, kind="stable")
        self._places = places[order]
        self._hashes, self._first = np.unique(hashes[order], return_index=True)
        self._open = np.ones(len(self._hashes), dtype=bool)  # hashes with a window that was not found yet
        self._filter = self._open_filter = _filter_of(self._hashes)

    def select(self, hashes: _Hashes) -> npt.NDArray[np.intp]:
        """Return which windows of the stream may be wanted: all that are, and one in thousands of the others."""
        return np.flatnonzero(self._filter[_slots(hashes)])

    def compare(self, piece: npt.NDArray[Any], starts: npt.NDArray[np.int64], hashes: _Hashes) -> None:
        """Note which wanted windows, if they were not found before, stand at ``starts`` of a piece of the stream."""
        new = np.flatnonzero(self._open_filter[_slots(hashes)])
        if len(new) == 0:
            return
        starts, hashes = starts[new], hashes[new]
        numbers = np.minimum(np.searchsorted(self._hashes, hashes), len(self._hashes) - 1)
        same = (self._hashes[numbers] == hashes) & self._open[numbers]
        order = np.argsort(numbers[same], kind="stable")
        numbers, starts = numbers[same][order], starts[same][order]
        for group in np.split(np.arange(len(numbers)), np.flatnonzero(np.diff(numbers)) + 1):
            if len(group):
                self._compare_group(int(numbers[group[0]]), piece, starts[group])
        self._open_filter = _filter_of(self._hashes[self._open])

    def _compare_group(self, number: int, piece: npt.NDArray[Any], starts: npt.NDArray[np.int64]) -> None:
        """Compare the wanted windows of one hash with the windows of the stream that have it too."""
        last = len(self._places) if number + 1 == len(self._first) else int(self._first[number + 1])
        wanted = self._places[self._first[number] : last]
        wanted = wanted[~self.occurs[wanted]]
        for start in starts:
            if len(wanted) == 0:
                break
            here = piece[start : start + self.length]
            equal = (self._ids[wanted[:, None] + np.arange(self.length)] == here).all(axis=1)
            self.occurs[wanted[equal]] = True
            wanted = wanted[~equal]
        self._open[number] = len(wanted) > 0


def _filter_of(hashes: _Hashes) -> npt.NDArray[np.bool_]:
    table = np.zeros(2**_FILTER_BITS, dtype=bool)
    table[_slots(hashes)] = True
    return table


def _slots(hashes: _Hashes) -> npt.NDArray[np.intp]:
    slots: npt.NDArray[np.intp] = (hashes >> np.uint64(64 - _FILTER_BITS)).astype(np.intp)
    return slots


def _occurrences(texts: _Texts, lengths: Sequence[int], pieces: Pieces) -> dict[int, npt.NDArray[np.bool_]]:
    """Read the stream once and return which windows of each length stand in it, by the place where they begin.

    Args:
        texts: the stories.
        lengths: in ascending order.
        pieces: the stream.
    """
    if len(texts.ids) == 0:
        return {length: np.zeros(0, dtype=bool) for length in lengths}
    hashing = _RollingHash(max(len(texts.ids), _PIECE + lengths[-1]), int(texts.ids.max()))
    sums = hashing.sums(texts.ids)
    wanted = [_Wanted(texts, length, hashing, sums) for length in lengths]
    for piece in pieces(lengths[-1] - 1):
        _search(piece, wanted, hashing)
    return {each.length: each.occurs for each in wanted}


def _search(piece: npt.NDArray[Any], wanted: Sequence[_Wanted], hashing: _RollingHash) -> None:
    """Look for windows of all lengths in a piece: a longer one only where a shorter one may begin."""
    sums = hashing.sums(piece)
    starts: npt.NDArray[np.int64] | None = None
    for each in wanted:
        if starts is not None:
            starts = starts[starts + each.length <= len(piece)]
        elif each.length > len(piece):
            return
        hashes = hashing.windows(sums, starts, each.length)
        kept = each.select(hashes)
        starts = kept if starts is None else starts[kept]
        each.compare(piece, starts, hashes[kept])
