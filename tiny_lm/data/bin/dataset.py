"""Windows of a memory-mapped token stream.

A stream is one ``.bin`` file or a glob of them, flat little-endian uint16 or uint32. Windows never cross from one
file into the next.
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

_MAX_RESIDENT = 16 * 2**20  # bytes of a stream that stay in memory: giving each batch back at once costs time


IGNORE_INDEX = -100
"""Target that counts in no loss unless a config says otherwise; the default of ``F.cross_entropy``."""


class BinTokenDataset(Dataset[tuple[Tensor, Tensor]]):
    """Windows ``(x, y)`` of a token stream, y being x shifted by one.

    Indexed with an integer it gives one window, x and y int64 ``[T]``; with a sequence of integers a batch of them,
    ``[B, T]``, gathered by one vectorised read. T is ``block_size``.
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
        """Cut the stream into windows.

        Args:
            stream: what to read.
            config: window length, stride and masking.
            every_token: for exact evaluation: windows stand side by side, and the last one of a file, where the stream
                ends inside it, is filled up with targets that are ignored; so each target counts exactly once.
            overlap: with ``every_token``: how many tokens a window shares with the one before it. Their targets are
                ignored, since they counted there, and are context for the others. Below ``block_size``.
            ignore_index: target that counts in no loss.

        Raises:
            UserError: no file holds a whole window.
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
        if every_token:  # one more where the stream ends inside a window
            sequences += np.where(sequences, sequences * self._stride + self._overlap, 0) < targets
        self._first_sequence = np.concatenate([[0], np.cumsum(sequences)])  # [F+1]
        self._maps: dict[int, MappedTokens] = {}  # the one used last comes last
        self._resident = 0  # bytes of them that may be in memory, at most
        if len(self) == 0:
            raise UserError(
                f"{stream.files[0]}: {stream.tokens:,} tokens are too few for one window of block_size "
                f"{self.block_size} and its next token; use more text or a smaller block_size"
            )

    def __len__(self) -> int:
        return int(self._first_sequence[-1])

    def find(self, window: int) -> tuple[Path, int]:
        """Return the file of a window, and the place of its first token there."""
        file = int(np.searchsorted(self._first_sequence, window, side="right")) - 1
        return self.stream.files[file], int(window - self._first_sequence[file]) * self._stride

    def __getstate__(self) -> dict[str, Any]:
        # A loader process opens the files itself: a memory map would be pickled as a copy of all its tokens.
        return {**self.__dict__, "_maps": {}}

    def __getitem__(self, index: int | Sequence[int]) -> tuple[Tensor, Tensor]:
        if isinstance(index, (int, np.integer)):
            x, y = self[[int(index)]]
            return x[0], y[0]
        sequences = np.asarray(index, dtype=np.int64)  # [B]
        ids = np.empty((len(sequences), self.block_size + 1), dtype=np.int64)  # [B, T+1]
        short = np.full(len(sequences), self.block_size + 1)  # [B] tokens really read
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
        """Return the map of a file, and give up the one that was not used for longest where there are too many."""
        tokens = self._maps.pop(file, None)
        if tokens is None:
            while len(self._maps) >= max_maps():
                del self._maps[next(iter(self._maps))]
            # Windows are shuffled: what the kernel would read ahead is hardly ever the next one.
            tokens = map_shard(self.stream, file, "MADV_RANDOM")
        self._maps[file] = tokens
        return tokens

    def check_unchanged(self) -> None:
        """Check that no file was overwritten in place; one that was replaced is still there for who has mapped it.

        Raises:
            UserError: one was.
        """
        for file, version in zip(self.stream.files, self.stream.versions, strict=True):
            status = stat_shard(file)
            if status.st_ino == version.inode:
                check_version(file, status, version)

    def _read(self, file: int, starts: npt.NDArray[np.int64]) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
        """Read windows of one file: ids ``[N, T+1]`` (past the end: 0) and how many of each are real ``[N]``."""
        tokens = self._mapped(file)
        check_size(tokens, self.stream.files[file])
        positions = starts[:, None] + np.arange(self.block_size + 1)  # [N, T+1]
        last = len(tokens) - 1
        ids = tokens[np.minimum(positions, last)]
        ids[positions > last] = 0
        # Otherwise the pages read stay in the process's resident set, which would grow to the size of the file.
        self._resident += len(starts) * (self.block_size * tokens.itemsize + 2 * mmap.PAGESIZE)
        if self._resident > _MAX_RESIDENT:
            advise(tokens, "MADV_DONTNEED")
            self._resident = 0
        return ids, np.minimum(last + 1 - starts, self.block_size + 1)


def _mask_after_first(y: Tensor, eos_id: int, ignore_index: int) -> None:
    """Ignore, in place, the targets of ``[B, T]`` behind the first eos of each row."""
    is_eos = y == eos_id
    after = (is_eos.cumsum(dim=1) - is_eos.long()) > 0
    y[after] = ignore_index
