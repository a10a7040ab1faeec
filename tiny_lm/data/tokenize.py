"""Corpus to token stream: documents as ``<bos> ... <eos>``, one after the other, in flat files of token ids."""

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tiny_lm.data.metadata import METADATA_FILE, TOKENIZER_FOLDER, FileStatistics, StreamMetadata
from tiny_lm.errors import UserError
from tiny_lm.files import scratch_folder, write_errors
from tiny_lm.locks import lock_folder
from tiny_lm.tokenizer.base import Tokenizer

_IN_USE = "another process uses this token stream; wait for its end, or write to another tokenized_output_dir"

# Documents are encoded in batches of about this many characters: large enough to keep every thread busy, small enough
# that memory does not depend on the size of the corpus.
_BATCH_CHARACTERS = 2**20


def tokenize_corpus(
    tokenizer: Tokenizer,
    corpus: Mapping[str, Iterable[str]],
    output_dir: Path,
    *,
    source: str,
    seed: int = 0,
    num_threads: int = 16,
) -> StreamMetadata:
    """Write a token stream folder: a ``.bin`` file for each split, ``metadata.json`` and a copy of the tokenizer.

    Nothing of a stream that is there already is touched before all text is encoded. Then its ``metadata.json`` goes
    first and the new one comes last, and a stream without one is refused by every reader; so an interrupted run never
    leaves a stream that looks whole.

    Args:
        tokenizer: what turns text into ids.
        corpus: documents by the name of their file, ``{"train": ..., "val": ...}``; each is read once.
        output_dir: the stream folder; a stream that is there is replaced.
        source: what metadata.json names as the origin of the text.
        seed: of the division into train and validation.
        num_threads: threads that encode.

    Returns:
        the metadata as written.

    Raises:
        UserError: a split holds no document, another process uses the stream, or the disk is full.
    """
    dtype: Literal["uint16", "uint32"] = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
    files: dict[str, FileStatistics] = {}
    with lock_folder(output_dir, _IN_USE, create=True), scratch_folder(output_dir) as scratch:
        for name, documents in corpus.items():
            file = f"{name}.bin"
            with write_errors(output_dir / file):
                files[file] = _write_split(tokenizer, documents, scratch / file, np.dtype(dtype), num_threads)
            if files[file].documents == 0:
                raise UserError(f"{source}: the {name} split holds no document; use more text or other filters")
        with write_errors(output_dir / METADATA_FILE):
            (output_dir / METADATA_FILE).unlink(missing_ok=True)
        for file in files:
            with write_errors(output_dir / file):
                (scratch / file).replace(output_dir / file)
        shutil.rmtree(output_dir / TOKENIZER_FOLDER, ignore_errors=True)
        tokenizer.save(output_dir / TOKENIZER_FOLDER)
        metadata = StreamMetadata(
            dtype=dtype,
            vocab_size=tokenizer.vocab_size,
            tokenizer_hash=tokenizer.hash,
            special_tokens=tokenizer.special_tokens,
            source=source,
            seed=seed,
            files=files,
        )
        metadata.write(output_dir)
        return metadata


@dataclass
class _Totals:
    tokens: int = 0
    documents: int = 0
    bytes: int = 0
    shortest: int = 0
    longest: int = 0

    def add(self, lengths: list[int], text_bytes: int) -> None:
        self.shortest = min(lengths) if self.documents == 0 else min(self.shortest, *lengths)
        self.longest = max(self.longest, *lengths)
        self.tokens += sum(lengths)
        self.documents += len(lengths)
        self.bytes += text_bytes


def _write_split(
    tokenizer: Tokenizer,
    documents: Iterable[str],
    path: Path,
    dtype: np.dtype[Any],
    num_threads: int,
) -> FileStatistics:
    """Encode ``documents`` into one flat file of ids and count what was written."""
    totals = _Totals()
    with path.open("wb") as file:
        for batch in _batches(documents):
            encoded = tokenizer.encode_batch(batch, bos=True, eos=True, num_threads=num_threads)
            file.write(np.concatenate([np.asarray(ids) for ids in encoded]).astype(dtype.newbyteorder("<")).tobytes())
            totals.add([len(ids) for ids in encoded], sum(len(text.encode()) for text in batch))
        file.flush()
        os.fsync(file.fileno())
    return FileStatistics(**vars(totals))


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
