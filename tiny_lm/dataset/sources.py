"""The documents of a data set from any source, and a writer of text files."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from tiny_lm.dataset.config import BLANK_LINE, END_OF_TEXT, DatasetConfig, Errors, Split
from tiny_lm.dataset.filters import apply_filters, in_validation
from tiny_lm.dataset.find_files import find_files
from tiny_lm.dataset.local import read_local
from tiny_lm.dataset.names import name_from_path
from tiny_lm.dataset.notes import ReadingNotes
from tiny_lm.dataset.survey import divide_document
from tiny_lm.dataset.text_file import BOM, DOCUMENT_LIMIT
from tiny_lm.dataset.txt import HEAD, splits_anywhere, tidy
from tiny_lm.errors import UserError
from tiny_lm.files import open_output

_SPLITS: tuple[Split, Split] = ("train", "validation")


def iter_documents(
    config: DatasetConfig,
    split: Split,
    *,
    val_split: float = 0.01,
    seed: int = 0,
    errors: Errors = "strict",
    split_within: bool = False,
) -> Iterator[str]:
    """Yield the documents of one split, filtered, in the order of the source, in constant memory.

    If the data set names a validation split, that is used. Otherwise the documents that pass the filters are split by
    their content (see :func:`~tiny_lm.dataset.filters.in_validation`): no document is in both splits.

    Args:
        config: the data set.
        split: ``train`` or ``validation``.
        val_split: share of documents to hold out if the data set names no validation split.
        seed: selects which documents are held out.
        errors: invalid UTF-8 in local files: ``strict`` raises, ``replace`` reads it as U+FFFD.
        split_within: split each document into a beginning and an end instead, as ``survey_corpus`` advises.

    Raises:
        UserError: the source cannot be reached or read; raised while iterating.
    """
    for found, text in iter_splits(
        config, (split,), val_split=val_split, seed=seed, errors=errors, split_within=split_within
    ):
        if found == split:
            yield text


def iter_splits(
    config: DatasetConfig,
    splits: Iterable[Split] = _SPLITS,
    *,
    val_split: float = 0.01,
    seed: int = 0,
    errors: Errors = "strict",
    split_within: bool = False,
) -> Iterator[tuple[Split, str]]:
    """Yield documents with their split; a corpus without a validation split is read once and yields both.

    Arguments and errors are those of :func:`iter_documents`; ``splits`` are those to read where the dataset names them.
    """
    if not 0 <= val_split < 1:
        raise UserError(f"val_split: must be at least 0 and below 1 (it is {val_split})")
    if config.source == "stories" or config.split_name("validation") is not None:
        for split in splits:
            for text in apply_filters(_raw_documents(config, split, errors), config.filters):
                yield split, text
        return
    for text in apply_filters(_raw_documents(config, "train", errors), config.filters):
        if split_within:
            parts = zip(_SPLITS, divide_document(text, val_split), strict=True)
            yield from ((split, part.strip()) for split, part in parts if part.strip())
        else:
            yield _SPLITS[in_validation(text, val_split, seed)], text


def _raw_documents(config: DatasetConfig, split: Split, errors: Errors) -> Iterator[str]:
    """Yield all documents of a split of the data set itself."""
    if config.source == "local":
        return read_local(config, split, errors)
    if config.source == "stories":
        from tiny_lm.dataset.stories import generate_stories

        count = story_count(config, split)
        return generate_stories(count, seed=config.seed, split=split, num_plots=config.num_plots)
    from tiny_lm.dataset.huggingface import read_huggingface

    return read_huggingface(config, split)


def story_count(config: DatasetConfig, split: Split) -> int:
    """Return the number of stories of `source: stories` in ``split``."""
    return config.num_stories if split == "train" else config.num_validation


def estimate_bytes(config: DatasetConfig, split: Split, *, val_split: float = 0.01) -> int | None:
    """Estimate the bytes of text that :func:`iter_documents` will yield, for a progress bar; None if unknown.

    Raises:
        UserError: local files are missing.
    """
    if config.source == "stories":
        from tiny_lm.dataset.stories import generate_stories

        sample = [len(story) for story in generate_stories(100, seed=config.seed, split=split)]
        return story_count(config, split) * sum(sample) // len(sample)
    if config.source != "local":
        return None
    named = config.split_name("validation") is not None
    files = find_files(config, split if named else "train").files
    if any(file.suffix.lower() in (".gz", ".parquet") for file in files):
        return None
    share = 1.0 if named else val_split if split == "validation" else 1 - val_split
    return int(sum(file.stat().st_size for file in files if file.is_file()) * share)


def describe(config: DatasetConfig) -> str:
    """Return the source of the documents as one word for metadata, such as ``huggingface:owner/name@revision``."""
    if config.source == "stories":
        plots = f":plots{config.num_plots}" if config.num_plots else ""
        return f"stories:{config.num_stories}:seed{config.seed}{plots}"
    if config.source == "local":
        return f"local:{name_from_path(config.name)}"
    part = f":{config.config_name}" if config.config_name else ""
    revision = f"@{config.revision}" if config.revision else ""
    return f"huggingface:{config.name}{part}{revision}"


def download(
    config: DatasetConfig, *, errors: Errors = "strict", notes: ReadingNotes | None = None
) -> dict[Split, int]:
    """Download a data set for later commands, and count its documents.

    A Hub data set is downloaded into the cache of the `datasets` library; local files are read through once, which
    finds errors early; the built-in stories need nothing.

    Args:
        config: the data set.
        errors: invalid UTF-8 in local files, as for :func:`iter_documents`.
        notes: records how local files were read.

    Returns:
        the number of documents in each split of the data set, before filters.

    Raises:
        UserError: the data set cannot be reached or read.
    """
    names = {split: config.split_name(split) for split in _SPLITS}
    if config.source == "stories":
        return {split: story_count(config, split) for split in _SPLITS}
    splits = [split for split in _SPLITS if split == "train" or names[split] is not None]
    if config.source == "local":
        return {split: sum(1 for _ in read_local(config, split, errors, notes)) for split in splits}
    from tiny_lm.dataset.huggingface import download_huggingface

    return {split: download_huggingface(config, split) for split in splits}


def write_documents(documents: Iterable[str], path: Path, *, separator: str = END_OF_TEXT) -> int:
    """Write documents to a .txt file that the local source reads back, atomically.

    Documents are stripped, ``\\r\\n`` becomes ``\\n``, and empty ones are skipped.

    Args:
        documents: the texts.
        path: the file, or ``-`` for standard output.
        separator: the line after each document, or ``blank-line``.

    Returns:
        the number of documents written.

    Raises:
        UserError: a document cannot be read back (it has the separator as a line, a NUL, a lone surrogate, or more than
            64 MiB), or the file cannot be written.
    """
    marker = b"" if separator == BLANK_LINE else separator.encode("utf-8")
    count = 0
    with open_output(path) as file:
        for index, document in enumerate(documents):
            data = _encode(tidy(document), marker, f"document {index}")
            if not data:
                continue
            if count == 0 and (data.startswith(BOM) or len(data) >= HEAD):
                file.write(marker + b"\n")  # so that readers neither remove the BOM nor miss the separator
            file.write(data + b"\n" + marker + b"\n")
            count += 1
    return count


def _encode(text: str, marker: bytes, label: str) -> bytes:
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{label}: contains a lone surrogate at character {error.start}, which is not text") from None
    if b"\0" in data:
        raise UserError(f"{label}: contains a NUL character, which marks binary files; remove it")
    if len(data) >= DOCUMENT_LIMIT:
        raise UserError(f"{label}: is larger than {DOCUMENT_LIMIT // 2**20} MiB; split it")
    if splits_anywhere(marker) and marker in data:
        raise UserError(f"{label}: contains {marker.decode()!r}, which separates documents; choose another separator")
    if data and any(line.strip() == marker for line in data.split(b"\n")):
        line = f"a line {marker.decode()!r}" if marker else "a blank line"
        raise UserError(f"{label}: contains {line}, which separates documents; choose another separator")
    return data
