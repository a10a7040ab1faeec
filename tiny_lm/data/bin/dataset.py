"""Sequences of a memory-mapped token stream.

A stream is one shard or a glob of them, flat little-endian uint16 or uint32. No sequence spans two shards.
"""

import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from tiny_lm.data.bin.config import BinDataConfig
from tiny_lm.data.bin.stream import (
    MappedTokens,
    TokenStream,
    advise,
    check_size,
    check_version,
    map_shard,
    max_maps,
    stat_shard,
)
from tiny_lm.errors import UserError

_MAX_RESIDENT = 16 * 2**20  # bytes of a stream that stay in memory: dropping the pages of every batch would cost time


IGNORE_INDEX = -100
"""Default of the target that is ignored in the loss, as in ``F.cross_entropy``."""


class BinTokenDataset(Dataset[tuple[Tensor, Tensor]]):
    """Sequences ``(x, y)`` of a token stream, where y is x shifted by one.

    An integer index gives one sequence, x and y int64 ``[T]``; several indices give a batch ``[B, T]``, gathered by
    one vectorized read. T is ``block_size``.
    """

    def __init__(
        self,
        stream: TokenStream,
        config: BinDataConfig,
        *,
        every_token: bool = False,
        overlap: int = 0,
        ignore_index: int = IGNORE_INDEX,
    ) -> None:
        """Cut the stream into sequences.

        Args:
            stream: what to read.
            config: sequence length, stride and masking.
            every_token: for exact evaluation: sequences do not overlap, and the last one of a shard is padded with
                ignored targets, so that each target counts exactly once.
            overlap: with ``every_token``: tokens that a sequence shares with the one before it, below ``block_size``.
                They are context; their targets are ignored, since they were counted there.
            ignore_index: target that is ignored in the loss.

        Raises:
            UserError: no shard holds a whole sequence.
        """
        self.stream = stream
        self.block_size = config.block_size
        self._overlap = overlap if every_token else 0
        self._stride = config.block_size - overlap if every_token else config.training_stride
        self._mask_after_eos = config.mask_after_eos
        self._ignore_index = ignore_index
        targets = np.array(stream.tokens_per_file) - 1
        whole = (targets - self.block_size) // self._stride + 1
        sequences = np.maximum(whole, 0)
        if every_token:  # one more where a shard ends inside a sequence
            sequences += np.where(sequences, sequences * self._stride + self._overlap, 0) < targets
        self._first_sequence = np.concatenate([[0], np.cumsum(sequences)])  # [F+1]
        self._maps: dict[int, MappedTokens] = {}  # least recently used first
        self._resident = 0  # upper bound of their bytes in memory
        if len(self) == 0:
            raise UserError(
                f"{stream.files[0]}: {stream.tokens:,} tokens are too few for one sequence of block_size "
                f"{self.block_size} and its next token; use more text or a smaller block_size"
            )

    def __len__(self) -> int:
        return int(self._first_sequence[-1])

    def find(self, sequence: int) -> tuple[Path, int]:
        """Return the shard of a sequence and the index of its first token there."""
        file = int(np.searchsorted(self._first_sequence, sequence, side="right")) - 1
        return self.stream.files[file], int(sequence - self._first_sequence[file]) * self._stride

    def __getstate__(self) -> dict[str, Any]:
        # A worker process maps the shards itself: pickling a memory map would copy all its tokens.
        return {**self.__dict__, "_maps": {}}

    def __getitem__(self, index: int | Sequence[int]) -> tuple[Tensor, Tensor]:
        if isinstance(index, (int, np.integer)):
            x, y = self[[int(index)]]
            return x[0], y[0]
        sequences = np.asarray(index, dtype=np.int64)  # [B]
        ids = np.empty((len(sequences), self.block_size + 1), dtype=np.int64)  # [B, T+1]
        short = np.full(len(sequences), self.block_size + 1)  # [B] tokens that exist
        file_of = np.searchsorted(self._first_sequence, sequences, side="right") - 1
        for file in np.unique(file_of):
            rows = np.flatnonzero(file_of == file)
            starts = (sequences[rows] - self._first_sequence[file]) * self._stride
            ids[rows], short[rows] = self._read(int(file), starts)
            if (largest := ids[rows].max()) >= self.stream.metadata.vocab_size:
                raise UserError(
                    f"{self.stream.files[file]}: holds the token id {largest}, but its tokenizer has "
                    f"{self.stream.metadata.vocab_size} tokens; it is damaged, so tokenize again"
                )
        x, y = torch.from_numpy(ids[:, :-1].copy()), torch.from_numpy(ids[:, 1:].copy())  # [B, T] each
        if (short <= self.block_size).any():
            y[torch.arange(self.block_size) + 1 >= torch.from_numpy(short)[:, None]] = self._ignore_index
        if self._overlap:
            begins_file = np.isin(sequences, self._first_sequence)
            y[torch.from_numpy(~begins_file), : self._overlap] = self._ignore_index
        if self._mask_after_eos:
            _mask_after_first(y, self.stream.metadata.eos_id, self._ignore_index)
        return x, y

    def _mapped(self, file: int) -> MappedTokens:
        """Return the memory map of a shard; close the least recently used one if there are too many."""
        tokens = self._maps.pop(file, None)
        if tokens is None:
            while len(self._maps) >= max_maps():
                del self._maps[next(iter(self._maps))]
            # Sequences are shuffled: read-ahead would hardly ever fetch the next one.
            tokens = map_shard(self.stream, file, "MADV_RANDOM")
        self._maps[file] = tokens
        return tokens

    def check_unchanged(self) -> None:
        """Check that no shard was overwritten in place; a replaced one stays readable through its memory map.

        Raises:
            UserError: a shard was overwritten.
        """
        for file, version in zip(self.stream.files, self.stream.versions, strict=True):
            status = stat_shard(file)
            if status.st_ino == version.inode:
                check_version(file, status, version)

    def _read(self, file: int, starts: npt.NDArray[np.int64]) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
        """Read sequences of one shard: ids ``[N, T+1]``, 0 past its end, and how many ids of each exist, ``[N]``."""
        tokens = self._mapped(file)
        check_size(tokens, self.stream.files[file])
        positions = starts[:, None] + np.arange(self.block_size + 1)  # [N, T+1]
        last = len(tokens) - 1
        ids = tokens[np.minimum(positions, last)]
        ids[positions > last] = 0
        # Otherwise the pages stay in the process's resident set, which would grow to the size of the shard.
        self._resident += len(starts) * (self.block_size * tokens.itemsize + 2 * mmap.PAGESIZE)
        if self._resident > _MAX_RESIDENT:
            advise(tokens, "MADV_DONTNEED")
            self._resident = 0
        return ids, np.minimum(last + 1 - starts, self.block_size + 1)


def _mask_after_first(y: Tensor, eos_id: int, ignore_index: int) -> None:
    """Ignore, in place, the targets ``[B, T]`` after the first eos of each row."""
    is_eos = y == eos_id
    after = (is_eos.cumsum(dim=1) - is_eos.long()) > 0
    y[after] = ignore_index
