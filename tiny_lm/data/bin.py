"""Windows of a memory-mapped token stream.

A stream is one ``.bin`` file or a glob of them, flat little-endian uint16 or uint32. Windows never cross from one
file into the next.
"""

import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from tiny_lm.data.config import BinDataConfig
from tiny_lm.data.metadata import TOKENIZER_FOLDER, StreamMetadata
from tiny_lm.dataset.find_files import literal_part
from tiny_lm.errors import UserError
from tiny_lm.locks import lock_folder

with suppress(ImportError):  # Windows
    import resource

_BEING_WRITTEN = "another process is writing this token stream; wait for its end"
_WRITTEN_AGAIN = "was written again since this command opened it; start the command again"

_MOST_RESIDENT = 16 * 2**20  # bytes of a stream that stay in memory: giving each batch back at once costs time

_Tokens = np.memmap[Any, np.dtype[Any]]

IGNORE_INDEX = -100
"""Target that counts in no loss unless a config says otherwise; the default of ``F.cross_entropy``."""


@dataclass(frozen=True)
class FileVersion:
    """What changes when a file is written again."""

    size: int
    modified: int
    """In nanoseconds."""
    inode: int

    @classmethod
    def of(cls, status: os.stat_result) -> "FileVersion":
        """Return the version of a file from what ``stat`` says."""
        return cls(status.st_size, status.st_mtime_ns, status.st_ino)

    def has_same_content(self, other: "FileVersion") -> bool:
        """Whether both are one version; inodes do not count, since some network disks give new ones at any time."""
        return (self.size, self.modified) == (other.size, other.modified)


@dataclass(frozen=True)
class TokenStream:
    """The ``.bin`` files behind one path of a data config, checked against their metadata."""

    files: tuple[Path, ...]
    metadata: StreamMetadata
    tokens_per_file: tuple[int, ...]
    bytes_per_token: float
    """UTF-8 bytes of text for each token, over all files."""
    versions: tuple["FileVersion", ...]
    """Of the files, as they were when the stream was opened."""

    @property
    def tokens(self) -> int:
        """Tokens in all files."""
        return sum(self.tokens_per_file)

    @property
    def tokenizer_folder(self) -> Path:
        """Where the tokenizer that wrote the stream lies."""
        return self.files[0].parent / TOKENIZER_FOLDER


def open_stream(path: str, config: BinDataConfig) -> TokenStream:
    """Find the files that ``path`` (a file or a glob) means and check each against its metadata.

    Raises:
        UserError: a file is missing, its size does not fit its metadata, or files of different tokenizers are mixed.
    """
    files = _find_files(Path(path))
    if Path(path).is_dir():
        raise UserError(
            f"{path}: no such token stream, but a folder; name a file in it, such as {Path(path) / 'train.bin'}"
        )
    if not files:
        raise UserError(f"{path}: no such token stream; write one with `tiny-lm tokenize`")
    versions = tuple(FileVersion.of(file.stat()) for file in files)  # before what is said about them is read
    metadata = [StreamMetadata.read(file.parent) for file in files]
    first = metadata[0]
    tokens, text_bytes = [], 0
    for file, meta, version in zip(files, metadata, versions, strict=True):
        if meta.tokenizer_hash != first.tokenizer_hash:
            raise UserError(f"{file}: written by another tokenizer than {files[0]}; streams of one path must share it")
        statistics = meta.files.get(file.name)
        if statistics is None:
            raise UserError(f"{file}: is not listed in {file.parent / 'metadata.json'}; run `tiny-lm tokenize` again")
        expected = statistics.tokens * np.dtype(meta.dtype).itemsize
        if version.size != expected:
            size = version.size
            raise UserError(f"{file}: has {size:,} bytes where its metadata.json says {expected:,}; tokenize again")
        tokens.append(statistics.tokens)
        text_bytes += statistics.bytes
    for key, given, true in [
        ("dtype", config.dtype, first.dtype),
        ("eos_token_id", config.eos_token_id, first.eos_id),
    ]:
        if given is not None and given != true:
            raise UserError(f"{key}: the data config says {given}, the metadata.json beside {files[0]} says {true}")
    return TokenStream(files, first, tuple(tokens), text_bytes / max(sum(tokens), 1), versions)


@contextmanager
def hold_streams(*streams: TokenStream) -> Iterator[None]:
    """Keep `tiny-lm tokenize` from writing these streams again while the block runs; many may hold them.

    Raises:
        UserError: a stream is being written, or was written again since it was opened.
    """
    folders = sorted({file.parent for stream in streams for file in stream.files})
    with ExitStack() as stack:
        for folder in islice(folders, _max_maps()):  # each takes a descriptor; the files are checked anyway
            stack.enter_context(lock_folder(folder, _BEING_WRITTEN, shared=True))
        for stream in streams:
            for file, version in zip(stream.files, stream.versions, strict=True):
                _check_version(file, _stat(file), version)
        yield


def _stat(file: Path) -> os.stat_result:
    try:
        return file.stat()
    except OSError as error:
        raise UserError(f"{file}: could not be read ({error.strerror or error})") from error


def _check_version(file: Path, status: os.stat_result, version: FileVersion) -> None:
    if not version.has_same_content(FileVersion.of(status)):
        raise UserError(f"{file}: {_WRITTEN_AGAIN}")


def _max_maps() -> int:
    """Return how many files of a stream may be mapped at once: each map keeps a file descriptor."""
    if "resource" not in globals():
        return 256
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 4096 if soft == resource.RLIM_INFINITY else max(8, min(soft // 5, 4096))


def _find_files(pattern: Path) -> tuple[Path, ...]:
    if pattern.is_file():
        return (pattern,)
    try:
        folder, rest = literal_part(Path(pattern.anchor), pattern)
        found = folder.glob(str(rest))
        return tuple(sorted(file for file in found if file.is_file()))
    except (ValueError, IndexError, NotImplementedError):  # no pattern that pathlib knows, such as a**/b
        return ()


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
        self._stride = config.block_size - overlap if every_token else config.window_stride
        self._mask_after_eos = config.mask_after_eos
        self._ignore_index = ignore_index
        targets = np.array(stream.tokens_per_file) - 1
        whole = (targets - self.block_size) // self._stride + 1
        windows = np.maximum(whole, 0)
        if every_token:  # one more where the stream ends inside a window
            windows += np.where(windows, windows * self._stride + self._overlap, 0) < targets
        self._first_window = np.concatenate([[0], np.cumsum(windows)])  # [F+1]
        self._maps: dict[int, _Tokens] = {}  # the one used last comes last
        self._resident = 0  # bytes of them that may be in memory, at most
        if len(self) == 0:
            raise UserError(
                f"{stream.files[0]}: {stream.tokens:,} tokens are too few for one window of block_size "
                f"{self.block_size} and its next token; use more text or a smaller block_size"
            )

    def __len__(self) -> int:
        return int(self._first_window[-1])

    def find(self, window: int) -> tuple[Path, int]:
        """Return the file of a window, and the place of its first token there."""
        file = int(np.searchsorted(self._first_window, window, side="right")) - 1
        return self.stream.files[file], int(window - self._first_window[file]) * self._stride

    def __getstate__(self) -> dict[str, Any]:
        # A loader process opens the files itself: a memory map would be pickled as a copy of all its tokens.
        return {**self.__dict__, "_maps": {}}

    def __getitem__(self, index: int | Sequence[int]) -> tuple[Tensor, Tensor]:
        if isinstance(index, (int, np.integer)):
            x, y = self[[int(index)]]
            return x[0], y[0]
        windows = np.asarray(index, dtype=np.int64)  # [B]
        ids = np.empty((len(windows), self.block_size + 1), dtype=np.int64)  # [B, T+1]
        short = np.full(len(windows), self.block_size + 1)  # [B] tokens really read
        file_of = np.searchsorted(self._first_window, windows, side="right") - 1
        for file in np.unique(file_of):
            rows = np.flatnonzero(file_of == file)
            starts = (windows[rows] - self._first_window[file]) * self._stride
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
            begins_file = np.isin(windows, self._first_window)
            y[torch.from_numpy(~begins_file), : self._overlap] = self._ignore_index
        if self._mask_after_eos:
            _mask_after_first(y, self.stream.metadata.eos_id, self._ignore_index)
        return x, y

    def _mapped(self, file: int) -> _Tokens:
        """Return the map of a file, and give up the one that was not used for longest where there are too many."""
        tokens = self._maps.pop(file, None)
        if tokens is None:
            while len(self._maps) >= _max_maps():
                del self._maps[next(iter(self._maps))]
            # Windows are shuffled: what the kernel would read ahead is hardly ever the next one.
            tokens = _map(self.stream, file, "MADV_RANDOM")
        self._maps[file] = tokens
        return tokens

    def check_unchanged(self) -> None:
        """Check that no file was overwritten in place; one that was replaced is still there for who has mapped it.

        Raises:
            UserError: one was.
        """
        for file, version in zip(self.stream.files, self.stream.versions, strict=True):
            status = _stat(file)
            if status.st_ino == version.inode:
                _check_version(file, status, version)

    def _read(self, file: int, starts: npt.NDArray[np.int64]) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
        """Read windows of one file: ids ``[N, T+1]`` (past the end: 0) and how many of each are real ``[N]``."""
        tokens = self._mapped(file)
        _check_size(tokens, self.stream.files[file])
        positions = starts[:, None] + np.arange(self.block_size + 1)  # [N, T+1]
        last = len(tokens) - 1
        ids = tokens[np.minimum(positions, last)]
        ids[positions > last] = 0
        # Otherwise the pages read stay in the process's resident set, which would grow to the size of the file.
        self._resident += len(starts) * (self.block_size * tokens.itemsize + 2 * mmap.PAGESIZE)
        if self._resident > _MOST_RESIDENT:
            _advise(tokens, "MADV_DONTNEED")
            self._resident = 0
        return ids, np.minimum(last + 1 - starts, self.block_size + 1)


def read_in_order(stream: TokenStream, size: int, *, overlap: int = 0) -> Iterator[npt.NDArray[Any]]:
    """Yield all tokens of a stream from its beginning to its end, in pieces that never cross from file to file.

    Args:
        stream: what to read.
        size: new tokens in a piece; the last one of a file may have fewer.
        overlap: tokens before them, the last ones of the piece before, of the same file; fewer at its beginning.
    """
    for file in range(len(stream.files)):
        tokens = _map(stream, file, "MADV_SEQUENTIAL")
        for start in range(0, len(tokens), size):
            _check_size(tokens, stream.files[file])
            yield np.array(tokens[max(start - overlap, 0) : start + size])
            _advise(tokens, "MADV_DONTNEED")


def _map(stream: TokenStream, number: int, advice: str) -> _Tokens:
    """Map a file of a stream into memory.

    Raises:
        UserError: it cannot be read, or was written again since the stream was opened.
    """
    file = stream.files[number]
    try:
        with file.open("rb") as opened:
            _check_version(file, os.fstat(opened.fileno()), stream.versions[number])
            tokens = np.memmap(opened, dtype={"uint16": "<u2", "uint32": "<u4"}[stream.metadata.dtype], mode="r")
    except OSError as error:
        raise UserError(f"{file}: could not be read ({error.strerror or error})") from error
    _advise(tokens, advice)
    return tokens


def _check_size(tokens: _Tokens, file: Path) -> None:
    """Check that a mapped file still has its size: to read past the end of one kills the process (SIGBUS).

    Raises:
        UserError: the file was cut short, or written again in place.
    """
    if tokens._mmap.size() != tokens.nbytes:  # type: ignore[attr-defined]  # of the file, as it is now
        raise UserError(f"{file}: {_WRITTEN_AGAIN}")


def _advise(tokens: _Tokens, advice: str) -> None:
    """Give the kernel advice on a memory map, where it takes any (not on Windows)."""
    mapping = tokens._mmap  # type: ignore[attr-defined]  # numpy gives the mapping no public name
    if hasattr(mapping, "madvise"):
        mapping.madvise(getattr(mmap, advice))


def _mask_after_first(y: Tensor, eos_id: int, ignore_index: int) -> None:
    """Ignore, in place, the targets of ``[B, T]`` behind the first eos of each row."""
    is_eos = y == eos_id
    after = (is_eos.cumsum(dim=1) - is_eos.long()) > 0
    y[after] = ignore_index
