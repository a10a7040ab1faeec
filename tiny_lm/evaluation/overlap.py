"""Verbatim overlap of generated text with the training stream: how much a model memorized.

The longest match of each text is found exactly, over a stream of any size. The hashes of all n-grams of a chunk of the
stream come from one vectorized pass (a polynomial modulo 2^64, Karp and Rabin 1987); where a hash equals that of an
n-gram of a text, the tokens are compared. If an n-gram occurs in the stream, so do its prefixes; so lengths 8, 16, 32,
... are tried first, all in one pass, and then the lengths in between by bisection.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tiny_lm.data.bin.stream import TokenStream, read_in_order

_CHUNK = 2**20  # tokens of the stream hashed at a time: a few dozen MB in all
_FIRST_POWER = 3  # most texts share 8 tokens with the stream, and shorter n-grams match nearly everywhere
_FILTER_BITS = 22  # a table of 4 MB, which fits the processor's cache

Chunks = Callable[[int], Iterator[npt.NDArray[Any]]]
"""Yields the stream in chunks, each of which repeats the given number of tokens of the previous one."""

_Hashes = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Match:
    """The longest part of a text that also occurs in the stream: ``text[start : start + length]``."""

    start: int
    length: int


def chunks_of(stream: TokenStream, on_progress: Callable[[int], None] | None = None) -> Chunks:
    """Return a function that reads a stream in chunks, for the functions below.

    Args:
        stream: the training stream.
        on_progress: called with the number of tokens of each chunk read; every pass starts again at 0.
    """

    def chunks(overlap: int) -> Iterator[npt.NDArray[Any]]:
        for chunk in read_in_order(stream, _CHUNK, overlap=overlap):
            yield chunk
            if on_progress:
                on_progress(len(chunk))

    return chunks


def longest_matches(sequences: Sequence[Sequence[int]], chunks: Chunks) -> list[Match]:
    """Return the longest verbatim match of each sequence; the first of several that are equally long.

    Args:
        sequences: token ids, without special tokens.
        chunks: the training stream; it is read about log2(longest match) times.
    """
    texts = _Texts(sequences)
    longest = max(map(len, sequences), default=0)
    found = [Match(0, 0)] * len(sequences)
    absent = [len(ids) + 1 for ids in sequences]  # the shortest length known not to occur
    powers = [2**power for power in range(_FIRST_POWER, longest.bit_length())]
    lengths = powers or _bisect(found, absent)
    while lengths:
        for length, occurs in _occurrences(texts, lengths, chunks).items():
            for index, offsets in enumerate(texts.ngrams_by_text(length)):
                hits = np.flatnonzero(occurs[offsets])
                if len(hits) and length > found[index].length:
                    found[index] = Match(int(hits[0]), length)
                elif len(hits) == 0:
                    absent[index] = min(absent[index], length)
        lengths = _bisect(found, absent)
    return found


def _bisect(found: Sequence[Match], absent: Sequence[int]) -> list[int]:
    """Return the lengths halfway between those known to occur and those known not to."""
    pairs = zip(found, absent, strict=True)
    return sorted({(match.length + end) // 2 for match, end in pairs if end - match.length > 1})


def count_matched_tokens(sequences: Sequence[Sequence[int]], length: int, chunks: Chunks) -> list[int]:
    """Return how many tokens of each sequence lie in a verbatim match of at least ``length`` tokens."""
    texts = _Texts(sequences)
    occurs = _occurrences(texts, [length], chunks)[length]
    counts = []
    for ids, offsets in zip(sequences, texts.ngrams_by_text(length), strict=True):
        matched = np.zeros(len(ids), dtype=bool)
        for start in np.flatnonzero(occurs[offsets]):
            matched[start : start + length] = True
        counts.append(int(matched.sum()))
    return counts


class _Texts:
    """All texts concatenated; an n-gram is identified by its offset."""

    def __init__(self, sequences: Sequence[Sequence[int]]) -> None:
        self.ids = np.array([token for ids in sequences for token in ids], dtype=np.int64)  # [N]
        self._lengths = [len(ids) for ids in sequences]
        self._starts = np.cumsum([0, *self._lengths])

    def ngrams_by_text(self, length: int) -> list[slice]:
        """Return the offsets of the n-grams of ``length`` tokens of each text."""
        starts = self._starts[:-1].tolist()
        return [
            slice(start, start + max(size - length + 1, 0)) for start, size in zip(starts, self._lengths, strict=True)
        ]

    def ngrams(self, length: int) -> npt.NDArray[np.int64]:
        """Return the offsets of all n-grams of ``length`` tokens that do not cross into another text."""
        offsets = [np.arange(part.start, part.stop) for part in self.ngrams_by_text(length)]
        return np.concatenate(offsets) if offsets else np.arange(0)


class _RollingHash:
    """Hashes of all n-grams of a sequence: the sum of ``value[token] * base ** index``, modulo 2^64."""

    def __init__(self, max_tokens: int, max_id: int) -> None:
        """Hash sequences of up to ``max_tokens`` tokens; ids above ``max_id`` may share one value."""
        random = np.random.default_rng(0)
        self._values = random.integers(2**64, size=max(max_id + 2, 2**16), dtype=np.uint64)
        base = 0x9E3779B97F4A7C15  # odd, so that it has an inverse; 5 modulo 8, so that its powers repeat late
        self._powers = _powers(base, max_tokens)
        self._inverse = _powers(pow(base, -1, 2**64), max_tokens)

    def sums(self, ids: npt.NDArray[Any]) -> _Hashes:
        """Return the prefix sums over 0, 1, 2, ... tokens, ``[N + 1]``."""
        if ids.dtype.itemsize > 2:
            ids = np.minimum(ids, len(self._values) - 1)
        sums = np.zeros(len(ids) + 1, dtype=np.uint64)
        np.cumsum(self._values[ids] * self._powers[: len(ids)], out=sums[1:])
        return sums

    def ngrams(self, sums: _Hashes, starts: npt.NDArray[np.int64] | None, length: int) -> _Hashes:
        """Return the hash of each n-gram of ``length`` tokens at the offsets ``starts``; None: at every offset."""
        if starts is None:
            count = len(sums) - length
            return (sums[length:] - sums[:count]) * self._inverse[:count]
        return (sums[starts + length] - sums[starts]) * self._inverse[starts]


def _powers(base: int, count: int) -> _Hashes:
    factors = np.full(count + 1, base, dtype=np.uint64)
    factors[0] = 1
    return np.multiply.accumulate(factors)


class _Queries:
    """The n-grams of one length to search for, by hash."""

    def __init__(self, texts: _Texts, length: int, hashing: _RollingHash, sums: _Hashes) -> None:
        self.length = length
        self._ids = texts.ids
        self.occurs = np.zeros(len(texts.ids), dtype=bool)  # [N], by the n-gram's offset
        offsets = texts.ngrams(length)
        hashes = hashing.ngrams(sums, offsets, length)
        order = np.argsort(hashes, kind="stable")
        self._offsets = offsets[order]
        self._hashes, self._first = np.unique(hashes[order], return_index=True)
        self._open = np.ones(len(self._hashes), dtype=bool)  # hashes with an n-gram not found yet
        self._filter = self._open_filter = _filter_table(self._hashes)

    def select(self, hashes: _Hashes) -> npt.NDArray[np.intp]:
        """Return which n-grams of the stream may match: all that do, and one in thousands of the others."""
        return np.flatnonzero(self._filter[_slots(hashes)])

    def compare(self, chunk: npt.NDArray[Any], starts: npt.NDArray[np.int64], hashes: _Hashes) -> None:
        """Record which n-grams not found before occur at the offsets ``starts`` of a chunk of the stream."""
        new = np.flatnonzero(self._open_filter[_slots(hashes)])
        if len(new) == 0:
            return
        starts, hashes = starts[new], hashes[new]
        indices = np.minimum(np.searchsorted(self._hashes, hashes), len(self._hashes) - 1)
        same = (self._hashes[indices] == hashes) & self._open[indices]
        order = np.argsort(indices[same], kind="stable")
        indices, starts = indices[same][order], starts[same][order]
        for group in np.split(np.arange(len(indices)), np.flatnonzero(np.diff(indices)) + 1):
            if len(group):
                self._compare_group(int(indices[group[0]]), chunk, starts[group])
        self._open_filter = _filter_table(self._hashes[self._open])

    def _compare_group(self, index: int, chunk: npt.NDArray[Any], starts: npt.NDArray[np.int64]) -> None:
        """Compare the n-grams of one hash with those of the stream that share it."""
        last = len(self._offsets) if index + 1 == len(self._first) else int(self._first[index + 1])
        pending = self._offsets[self._first[index] : last]
        pending = pending[~self.occurs[pending]]
        for start in starts:
            if len(pending) == 0:
                break
            ngram = chunk[start : start + self.length]
            equal = (self._ids[pending[:, None] + np.arange(self.length)] == ngram).all(axis=1)
            self.occurs[pending[equal]] = True
            pending = pending[~equal]
        self._open[index] = len(pending) > 0


def _filter_table(hashes: _Hashes) -> npt.NDArray[np.bool_]:
    table = np.zeros(2**_FILTER_BITS, dtype=bool)
    table[_slots(hashes)] = True
    return table


def _slots(hashes: _Hashes) -> npt.NDArray[np.intp]:
    slots: npt.NDArray[np.intp] = (hashes >> np.uint64(64 - _FILTER_BITS)).astype(np.intp)
    return slots


def _occurrences(texts: _Texts, lengths: Sequence[int], chunks: Chunks) -> dict[int, npt.NDArray[np.bool_]]:
    """Read the stream once and return, for each length, which n-grams occur in it, by offset.

    Args:
        texts: the concatenated texts.
        lengths: in ascending order.
        chunks: the stream.
    """
    if len(texts.ids) == 0:
        return {length: np.zeros(0, dtype=bool) for length in lengths}
    hashing = _RollingHash(max(len(texts.ids), _CHUNK + lengths[-1]), int(texts.ids.max()))
    sums = hashing.sums(texts.ids)
    queries = [_Queries(texts, length, hashing, sums) for length in lengths]
    for chunk in chunks(lengths[-1] - 1):
        _search(chunk, queries, hashing)
    return {query.length: query.occurs for query in queries}


def _search(chunk: npt.NDArray[Any], queries: Sequence[_Queries], hashing: _RollingHash) -> None:
    """Search a chunk for n-grams of all lengths: longer ones only where a shorter one may match."""
    sums = hashing.sums(chunk)
    starts: npt.NDArray[np.int64] | None = None
    for query in queries:
        if starts is not None:
            starts = starts[starts + query.length <= len(chunk)]
        elif query.length > len(chunk):
            return
        hashes = hashing.ngrams(sums, starts, query.length)
        candidates = query.select(hashes)
        starts = candidates if starts is None else starts[candidates]
        query.compare(chunk, starts, hashes[candidates])
