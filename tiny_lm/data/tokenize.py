"""Corpus to token stream: documents as ``<bos> ... <eos>``, one after the other, in flat files of token ids."""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tiny_lm.data.metadata import METADATA_FILE, TOKENIZER_FOLDER, FileStatistics, StreamMetadata
from tiny_lm.dataset import DatasetConfig, Split, describe, iter_splits, survey_corpus
from tiny_lm.errors import UserError
from tiny_lm.files import scratch_folder, write_errors
from tiny_lm.locks import lock_folder
from tiny_lm.tokenizer import Tokenizer, TokenizerConfig, load_tokenizer

_IN_USE = "another process uses this token stream; wait until it has finished, or write to another tokenized_output_dir"

# Documents are encoded in batches of about this many characters: large enough to keep every thread busy, small enough
# that memory does not depend on the size of the corpus.
_BATCH_CHARACTERS = 2**20

_FILES: dict[Split, str] = {"train": "train", "validation": "val"}


def tokenize_dataset(
    tokenizer_config: TokenizerConfig,
    dataset_config: DatasetConfig | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    seed: int = 0,
    errors: Literal["strict", "replace"] = "strict",
    split_within: bool | None = None,
    on_document: Callable[[str], None] = lambda document: None,
) -> StreamMetadata:
    """Tokenize both splits of a dataset into the config's ``tokenized_output_dir``.

    A corpus without a validation split is read once.

    Args:
        tokenizer_config: the output folder, the validation share and, unless given, dataset and tokenizer.
        dataset_config: the corpus; by default the one that the tokenizer config names.
        tokenizer: by default the one in the config's ``output_dir``.
        seed: of the division into train and validation.
        errors: invalid UTF-8 in local files: ``strict`` refuses it, ``replace`` reads it as U+FFFD.
        split_within: divide each document into train and validation; by default only where there are too few to hold
            some out.
        on_document: called with each document, for progress.

    Returns:
        the metadata as written.

    Raises:
        UserError: as :func:`tokenize_corpus`, or the corpus or the tokenizer cannot be read.
    """
    dataset_config = dataset_config or DatasetConfig.from_yaml(tokenizer_config.dataset_config)
    tokenizer = tokenizer or load_tokenizer(tokenizer_config.output_dir)
    val_split = tokenizer_config.val_split
    if split_within is None:
        found = survey_corpus(dataset_config, val_split=val_split, seed=seed, errors=errors)
        split_within = found is not None and found.split_within

    def documents() -> Iterator[tuple[str, str]]:
        for split, document in iter_splits(
            dataset_config, val_split=val_split, seed=seed, errors=errors, split_within=split_within
        ):
            yield _FILES[split], document
            on_document(document)

    return _write_stream(
        tokenizer,
        tuple(_FILES.values()),
        documents(),
        Path(tokenizer_config.tokenized_output_dir),
        source=describe(dataset_config),
        seed=seed,
        num_threads=tokenizer_config.num_threads,
    )


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

    An existing stream is not touched before all text is encoded. Then its ``metadata.json`` is removed first and the
    new one is written last, and every reader refuses a stream without one; so an interrupted run never leaves a stream
    that looks complete.

    Args:
        tokenizer: encodes the text.
        corpus: documents by the name of their file, ``{"train": ..., "val": ...}``; each is read once.
        output_dir: the stream folder; an existing stream is replaced.
        source: the origin of the text in ``metadata.json``.
        seed: of the division into train and validation.
        num_threads: threads that encode.

    Returns:
        the metadata as written.

    Raises:
        UserError: a split has no document, another process uses the stream, or the disk is full.
    """
    documents = ((name, document) for name, texts in corpus.items() for document in texts)
    return _write_stream(
        tokenizer, tuple(corpus), documents, output_dir, source=source, seed=seed, num_threads=num_threads
    )


def _write_stream(
    tokenizer: Tokenizer,
    splits: tuple[str, ...],
    documents: Iterable[tuple[str, str]],
    output_dir: Path,
    *,
    source: str,
    seed: int,
    num_threads: int,
) -> StreamMetadata:
    dtype: Literal["uint16", "uint32"] = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
    with lock_folder(output_dir, _IN_USE, create=True), scratch_folder(output_dir) as scratch:
        writers = {
            name: _SplitWriter(
                tokenizer, scratch / f"{name}.bin", output_dir / f"{name}.bin", np.dtype(dtype), num_threads
            )
            for name in splits
        }
        for name, document in documents:
            writers[name].add(document)
        files = {f"{name}.bin": writer.finish() for name, writer in writers.items()}
        for name in splits:
            if files[f"{name}.bin"].documents == 0:
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


class _SplitWriter:
    """Encodes documents in batches into one flat file of token ids and counts what it writes."""

    def __init__(self, tokenizer: Tokenizer, path: Path, target: Path, dtype: np.dtype[Any], num_threads: int) -> None:
        """Write to ``path``; errors name ``target``, where the file will be."""
        self._tokenizer = tokenizer
        self._target = target
        self._dtype = dtype.newbyteorder("<")
        self._num_threads = num_threads
        self._path = path
        self._batch: list[str] = []
        self._characters = 0
        self._totals = {"tokens": 0, "documents": 0, "bytes": 0, "shortest": 0, "longest": 0}

    def add(self, document: str) -> None:
        """Add one document; a full batch is encoded and written."""
        self._batch.append(document)
        self._characters += len(document)
        if self._characters >= _BATCH_CHARACTERS:
            self._flush()

    def finish(self) -> FileStatistics:
        """Write the last batch, sync the file to disk and return its statistics."""
        self._flush()
        with write_errors(self._target), self._path.open("ab") as file:
            os.fsync(file.fileno())
        return FileStatistics(**self._totals)

    def _flush(self) -> None:
        if not self._batch:
            return
        batch, self._batch, self._characters = self._batch, [], 0
        encoded = self._tokenizer.encode_batch(batch, bos=True, eos=True, num_threads=self._num_threads)
        with write_errors(self._target), self._path.open("ab") as file:  # not kept open: there may be many splits
            file.write(np.concatenate([np.asarray(ids) for ids in encoded]).astype(self._dtype).tobytes())
        lengths, totals = [len(ids) for ids in encoded], self._totals
        totals["shortest"] = min(lengths + [totals["shortest"]] * bool(totals["documents"]))
        totals["longest"] = max(totals["longest"], *lengths)
        totals["tokens"] += sum(lengths)
        totals["documents"] += len(lengths)
        totals["bytes"] += sum(len(text.encode()) for text in batch)
