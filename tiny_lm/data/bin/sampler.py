"""The order in which training reads windows, and how several processes share it.

Training reads one endless sequence of windows: epoch after epoch, each a permutation of all windows drawn from (seed,
epoch). Place p of the sequence is a function of (seed, p) and takes no memory, however long the stream is. A batch is
a slice of the sequence; with W ranks, rank r's n-th micro-batch is slice ``n W + r``. So the ranks read disjoint
windows, together those that one process would read, and a checkpoint keeps one number: how many windows were read.
"""

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

Indices = npt.NDArray[np.int64]
_Words = npt.NDArray[np.uint64]

_AHEAD = 32  # micro-batches whose windows are computed in one go: for small models each call would be felt
_ROUNDS = 8  # fewer leave traces of the order where windows are few


def permute(places: Indices, size: int, *, seed: int, epoch: int) -> Indices:
    """Map places ``[N]`` of an epoch of ``size`` windows to windows: a permutation of ``range(size)``.

    It is a Feistel network over two coordinates of unequal range, walked until it ends inside the range (Black &
    Rogaway 2002, "Ciphers with arbitrary finite domains", methods 3 and 2): ``rows * columns`` exceeds ``size`` by
    less than one row, so hardly any place is walked twice. A table would take 8 bytes for each window.
    """
    rows = math.isqrt(size - 1) + 1 if size > 1 else 1
    columns = -(-size // rows)
    keys = np.random.SeedSequence([seed, epoch]).generate_state(_ROUNDS, np.uint64).astype(np.uint64)
    sequences = _feistel(places.astype(np.uint64), np.uint64(rows), np.uint64(columns), keys)
    while (outside := sequences >= size).any():
        sequences[outside] = _feistel(sequences[outside], np.uint64(rows), np.uint64(columns), keys)
    return sequences.astype(np.int64)


def _feistel(x: _Words, rows: np.uint64, columns: np.uint64, keys: _Words) -> _Words:
    """Permute ``range(rows * columns)``: each round adds a hash of one coordinate to the other, which can be undone."""
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
    """The endless batches of one rank, a pure function of (seed, windows already read).

    It can be entered behind any number of windows, which is how a run resumes on exactly the windows that were to
    come, also with another number of ranks.
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
        """Shuffle ``windows`` windows into batches.

        Args:
            windows: how many there are.
            batch_size: that of the data config, which decides what ``drop_last`` leaves out.
            seed: of the run.
            drop_last: leave out the windows at the end of an epoch that fill no batch; else they begin a batch that
                the next epoch fills.
            start: windows that all ranks together have already read.
            rank: number of this process.
            world_size: how many processes share the batches.
            micro_batch: windows that a rank reads at a time, where it is not ``batch_size``.
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
            firsts = first + self._step * np.arange(_AHEAD)
            yield from self._at(firsts[:, None] + np.arange(self._micro_batch))
            first += _AHEAD * self._step

    def _at(self, places: Indices) -> Indices:
        """Return the windows at ``places`` of the endless sequence, in the same shape."""
        epochs, places = np.divmod(places, self.epoch_length)
        sequences = np.empty_like(places)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            sequences[here] = permute(places[here], self._sequences, seed=self._seed, epoch=int(epoch))
        return sequences


class SequentialBatchSampler(Sampler[range]):
    """Every window once, in order; each rank takes every ``world_size``-th.

    All ranks have the same number of batches, since sharded models must be run by all ranks together; the last batch
    of a rank may therefore be empty.
    """

    def __init__(self, sequences: int, batch_size: int, *, rank: int = 0, world_size: int = 1) -> None:
        """Cut ``windows`` windows into batches of ``batch_size`` for each rank."""
        self._mine = range(rank, sequences, world_size)
        self._batch_size = batch_size
        self._batches = -(-sequences // (batch_size * world_size))

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[range]:
        for number in range(self._batches):
            yield self._mine[number * self._batch_size : (number + 1) * self._batch_size]
