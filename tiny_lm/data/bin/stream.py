"""Token streams on disk: opened, checked against their metadata, and memory-mapped."""

import mmap
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tiny_lm.data.bin.config import BinDataConfig
from tiny_lm.data.metadata import TOKENIZER_FOLDER, StreamMetadata
from tiny_lm.dataset.find_files import literal_part
from tiny_lm.errors import UserError
from tiny_lm.locks import lock_folder
from tiny_lm.tokenizer import check_same_tokenizer

with suppress(ImportError):  # Windows
    import resource

_BEING_WRITTEN = "another process is writing this token stream; wait until it has finished"
_WRITTEN_AGAIN = "was rewritten since this command opened it; run the command again"

MappedTokens = np.memmap[Any, np.dtype[Any]]


@dataclass(frozen=True)
class FileVersion:
    """Size, time and inode of a file, which change when it is rewritten."""

    size: int
    modified: int
    """In nanoseconds."""
    inode: int

    @classmethod
    def of(cls, status: os.stat_result) -> "FileVersion":
        """Return the version of a file from its ``stat``."""
        return cls(status.st_size, status.st_mtime_ns, status.st_ino)

    def has_same_content(self, other: "FileVersion") -> bool:
        """Return whether both are one version; inodes are ignored, since some network disks change them any time."""
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
    """Of the files when the stream was opened."""

    @property
    def tokens(self) -> int:
        """Tokens in all files."""
        return sum(self.tokens_per_file)

    @property
    def tokenizer_folder(self) -> Path:
        """Folder of the tokenizer that wrote the stream."""
        return self.files[0].parent / TOKENIZER_FOLDER


def open_stream(path: str, config: BinDataConfig) -> TokenStream:
    """Find the shards of ``path`` (a file or a glob) and check each against its metadata.

    Raises:
        UserError: a shard is missing, its size does not match its metadata, or tokenizers are mixed.
    """
    files = _find_files(Path(path))
    if Path(path).is_dir():
        raise UserError(
            f"{path}: no such token stream, but a folder; name a file in it, such as {Path(path) / 'train.bin'}"
        )
    if not files:
        raise UserError(f"{path}: no such token stream; write one with `tiny-lm tokenize`")
    versions = tuple(FileVersion.of(file.stat()) for file in files)  # before their metadata is read
    metadata = [StreamMetadata.read(file.parent) for file in files]
    first = metadata[0]
    tokens, text_bytes = [], 0
    for file, meta, version in zip(files, metadata, versions, strict=True):
        check_same_tokenizer(
            meta.tokenizer_hash, first.tokenizer_hash, file, files[0], "the shards of a stream must share one"
        )
        statistics = meta.files.get(file.name)
        if statistics is None:
            raise UserError(f"{file}: is not listed in {file.parent / 'metadata.json'}; run `tiny-lm tokenize` again")
        expected = statistics.tokens * np.dtype(meta.dtype).itemsize
        if version.size != expected:
            size = version.size
            raise UserError(
                f"{file}: has {size:,} bytes but {expected:,} according to its metadata.json; tokenize again"
            )
        tokens.append(statistics.tokens)
        text_bytes += statistics.bytes
    for key, given, true in [
        ("dtype", config.dtype, first.dtype),
        ("eos_token_id", config.eos_token_id, first.eos_id),
    ]:
        if given is not None and given != true:
            raise UserError(f"{key}: is {given} in the data config but {true} in the metadata.json of {files[0]}")
    return TokenStream(files, first, tuple(tokens), text_bytes / max(sum(tokens), 1), versions)


@contextmanager
def hold_streams(*streams: TokenStream) -> Iterator[None]:
    """Keep `tiny-lm tokenize` from rewriting these streams while the block runs; several processes may hold them.

    Raises:
        UserError: a stream is being written, or was rewritten since it was opened.
    """
    folders = sorted({file.parent for stream in streams for file in stream.files})
    with ExitStack() as stack:
        for folder in islice(folders, max_maps()):  # each lock takes a file descriptor; the versions are checked anyway
            stack.enter_context(lock_folder(folder, _BEING_WRITTEN, shared=True))
        for stream in streams:
            for file, version in zip(stream.files, stream.versions, strict=True):
                check_version(file, stat_shard(file), version)
        yield


def stat_shard(file: Path) -> os.stat_result:
    """Return ``stat`` of a shard; an unreadable one raises a UserError."""
    try:
        return file.stat()
    except OSError as error:
        raise UserError(f"{file}: could not be read ({error.strerror or error})") from error


def check_version(file: Path, status: os.stat_result, version: FileVersion) -> None:
    """Raise a UserError if ``status`` shows that a shard was rewritten since the stream was opened."""
    if not version.has_same_content(FileVersion.of(status)):
        raise UserError(f"{file}: {_WRITTEN_AGAIN}")


def max_maps() -> int:
    """Return how many shards may be mapped at once: each map holds a file descriptor."""
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
    except (ValueError, IndexError, NotImplementedError):  # pathlib does not know the pattern, such as a**/b
        return ()


def read_in_order(stream: TokenStream, size: int, *, overlap: int = 0) -> Iterator[npt.NDArray[Any]]:
    """Yield all tokens of a stream in order, in chunks that do not span shards.

    Args:
        stream: what to read.
        size: new tokens in a chunk; the last one of a shard may have fewer.
        overlap: tokens repeated from the previous chunk of the same shard; fewer at its start.
    """
    for file in range(len(stream.files)):
        tokens = map_shard(stream, file, "MADV_SEQUENTIAL")
        for start in range(0, len(tokens), size):
            check_size(tokens, stream.files[file])
            yield np.array(tokens[max(start - overlap, 0) : start + size])
            advise(tokens, "MADV_DONTNEED")


def map_shard(stream: TokenStream, number: int, advice: str) -> MappedTokens:
    """Map a shard into memory.

    Raises:
        UserError: it cannot be read, or was rewritten since the stream was opened.
    """
    file = stream.files[number]
    try:
        with file.open("rb") as opened:
            check_version(file, os.fstat(opened.fileno()), stream.versions[number])
            tokens = np.memmap(opened, dtype={"uint16": "<u2", "uint32": "<u4"}[stream.metadata.dtype], mode="r")
    except OSError as error:
        raise UserError(f"{file}: could not be read ({error.strerror or error})") from error
    advise(tokens, advice)
    return tokens


def check_size(tokens: MappedTokens, file: Path) -> None:
    """Check that a mapped shard still has its size: reading past the end kills the process (SIGBUS).

    Raises:
        UserError: the shard was truncated or overwritten in place.
    """
    if tokens._mmap.size() != tokens.nbytes:  # type: ignore[attr-defined]  # current size of the file
        raise UserError(f"{file}: {_WRITTEN_AGAIN}")


def advise(tokens: MappedTokens, advice: str) -> None:
    """Advise the kernel on a memory map, where supported (not on Windows)."""
    mapping = tokens._mmap  # type: ignore[attr-defined]  # numpy has no public name for the mapping
    if hasattr(mapping, "madvise"):
        mapping.madvise(getattr(mmap, advice))
