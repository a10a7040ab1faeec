"""Documents from the user's own files: .txt, .jsonl, .json (lines), .csv and .parquet, plain or gzip.

Everything is streamed: memory holds a few copies of one document (at most 64 MiB), whatever the size of a file,
compressed or not.
"""

from collections.abc import Iterator
from pathlib import Path

from tiny_lm.dataset.config import DatasetConfig, Errors, Split
from tiny_lm.dataset.find_files import find_files, format_of
from tiny_lm.dataset.notes import ReadingNotes
from tiny_lm.dataset.parquet import read_parquet
from tiny_lm.dataset.records import read_csv, read_jsonl
from tiny_lm.dataset.text_file import TextFile
from tiny_lm.dataset.txt import read_txt


def read_local(config: DatasetConfig, split: Split, errors: Errors, notes: ReadingNotes | None = None) -> Iterator[str]:
    """Yield the documents of the files of ``split``, or of all files if ``config`` has no splits.

    Files are sorted by path. Empty documents are dropped; those of .txt files are stripped and have ``\\n`` line ends,
    all others are unchanged.

    Args:
        config: a data set of ``source: local``.
        split: which of its named splits.
        errors: what to do with invalid UTF-8 and NULs: ``strict`` raises, ``replace`` substitutes U+FFFD.
        notes: records how the files were read.

    Raises:
        UserError: no file is found, or one cannot be read; names the file and the position.
    """
    notes = notes if notes is not None else ReadingNotes()
    found = find_files(config, split)
    notes.skipped += found.skipped
    for path in found.files:
        notes.files += 1
        for text in _read_file(path, config, errors, notes):
            if text and not text.isspace():
                yield text


def _read_file(path: Path, config: DatasetConfig, errors: Errors, notes: ReadingNotes) -> Iterator[str]:
    kind = format_of(path)
    if kind == ".parquet":
        return read_parquet(path, config.text_field, errors)
    file = TextFile(path, errors)
    notes.encodings.add(file.encoding + (" with CR line ends" if file.has_cr_ends else ""))
    if kind == ".txt":
        return read_txt(file, config.separator, notes)
    if kind == ".csv":
        return read_csv(file, config.text_field)
    return read_jsonl(file, config.text_field, errors)
