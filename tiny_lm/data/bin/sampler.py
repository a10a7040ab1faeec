"""The order in which training reads sequences, and how ranks split it.

Training reads sequences in one endless order: epoch after epoch, each a permutation of all sequences that (seed,
epoch) determine. Position p of the order is a function of (seed, p) and takes no memory, however long the stream is. A
batch is a slice of the order; with W ranks, rank r's n-th micro-batch is slice ``n W + r``. So the ranks read disjoint
sequences, together those that one process would read, and a checkpoint needs one number: how many sequences were read.
"""

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

Indices = npt.NDArray[np.int64]
_Words = npt.NDArray[np.uint64]

_PREFETCH = 32  # micro-batches whose indices one call computes: for small models a call each would be too slow
_ROUNDS = 8  # with fewer, orders of few sequences are not uniform


def permute(positions: Indices, size: int, *, seed: int, epoch: int) -> Indices:
    """Map positions ``[N]`` of an epoch to sequence indices: a permutation of ``range(size)``.

    It is a Feistel network over two coordinates of unequal range, repeated until the result is in range (Black &
    Rogaway 2002, "Ciphers with arbitrary finite domains", methods 3 and 2): ``rows * columns`` exceeds ``size`` by
    less than one row, so hardly any position needs a second pass. A table would take 8 bytes for each sequence.
    """
    rows = math.isqrt(size - 1) + 1 if size > 1 else 1
    columns = -(-size // rows)
    keys = np.random.SeedSequence([seed, epoch]).generate_state(_ROUNDS, np.uint64).astype(np.uint64)
    sequences = _feistel(positions.astype(np.uint64), np.uint64(rows), np.uint64(columns), keys)
    while (outside := sequences >= size).any():
        sequences[outside] = _feistel(sequences[outside], np.uint64(rows), np.uint64(columns), keys)
    return sequences.astype(np.int64)


def _feistel(x: _Words, rows: np.uint64, columns: np.uint64, keys: _Words) -> _Words:
    """Permute ``range(rows * columns)``: each round adds a hash of one coordinate to the other, which is invertible."""
    row, column = x // columns, x % columns
    for even, odd in zip(keys[::2], keys[1::2], strict=True):
        row = (row + _hash(column, even)) % rows
        column = (column + _hash(row, odd)) % columns
    return row * columns + column


def _hash(x: _Words, key: np.uint64) -> _Words:
    """Mix 64 bits down to 32, with the multipliers of splitmix64."""
    x = x ^ key
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(32)
    x *= np.uint64(0x94D049BB133111EB)
    x >>= np.uint64(32)
    return x


class ShuffledBatchSampler(Sampler[Indices]):
    """The endless batches of one rank, a pure function of (seed, sequences already read).

    It can start after any number of sequences, so a run resumes with exactly the sequences that come next, even with
    another number of ranks.
    """

    def __init__(
        self,
        sequences: int,
        batch_size: int,
        *,
        seed: int,
        drop_last: bool,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
        micro_batch: int | None = None,
    ) -> None:
        """Shuffle sequences into batches.

        Args:
            sequences: number of sequences.
            batch_size: of the data config; it determines what ``drop_last`` drops.
            seed: of the run.
            drop_last: drop the sequences at the end of an epoch that do not fill a batch; otherwise they start a batch
                that the next epoch fills.
            start: sequences that all ranks together have already read.
            rank: of this process.
            world_size: number of ranks.
            micro_batch: sequences that a rank reads at a time; by default ``batch_size``.
        """
        self._sequences = sequences
        self.epoch_length = sequences - sequences % batch_size if drop_last else sequences
        self._seed = seed
        self._micro_batch = micro_batch or batch_size
        self._start = start + rank * self._micro_batch
        self._step = world_size * self._micro_batch

    def __iter__(self) -> Iterator[Indices]:
        first = self._start
        while True:
            firsts = first + self._step * np.arange(_PREFETCH)
            yield from self._at(firsts[:, None] + np.arange(self._micro_batch))
            first += _PREFETCH * self._step

    def _at(self, positions: Indices) -> Indices:
        """Return the indices at ``positions`` of the endless order, in the same shape."""
        epochs, positions = np.divmod(positions, self.epoch_length)
        sequences = np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            sequences[here] = permute(positions[here], self._sequences, seed=self._seed, epoch=int(epoch))
        return sequences


class SequentialBatchSampler(Sampler[range]):
    """Every sequence once, in order; each rank takes every ``world_size``-th.

    All ranks have the same number of batches, since all ranks must call a sharded model together; so the last batch of
    a rank may be empty.
    """

    def __init__(self, sequences: int, batch_size: int, *, rank: int = 0, world_size: int = 1) -> None:
        """Split ``sequences`` sequences into batches of ``batch_size`` for each rank."""
        self._mine = range(rank, sequences, world_size)
        self._batch_size = batch_size
        self._batches = -(-sequences // (batch_size * world_size))

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[range]:
        for number in range(self._batches):
            yield self._mine[number * self._batch_size : (number + 1) * self._batch_size]
