"""Documents from the user's own files: .txt, .jsonl, .json (lines), .csv and .parquet, plain or gzip.

Everything streams: memory holds one document (of at most 64 MiB) whatever the size of a file.
"""

import csv
import gzip
import json
import logging
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from io import BufferedReader
from pathlib import Path
from typing import IO, Any

from tiny_lm.config import nearest, shorten
from tiny_lm.dataset.config import BLANK_LINE, DatasetConfig, Errors, Split
from tiny_lm.dataset.find_files import find_files, format_of
from tiny_lm.errors import UserError

DOCUMENT_LIMIT = 64 * 2**20  # bytes
HEAD = 2**20  # bytes of a .txt file in which a separator line must appear
_BINARY_HEAD = 8192  # bytes in which a NUL marks a binary file
BOM = b"\xef\xbb\xbf"

_log = logging.getLogger(__name__)


def read_local(config: DatasetConfig, split: Split, errors: Errors) -> Iterator[str]:
    """Yield the documents of the files that ``split`` names, or of all files where ``config`` names no splits.

    Files come in the order of their paths. Documents without any text are dropped; those of a .txt file come without
    the blank space around them and with ``\\n`` at line ends, the others exactly as they stand.

    Args:
        config: a data set of ``source: local``.
        split: which of its named splits.
        errors: what to do with invalid UTF-8: ``strict`` refuses it, ``replace`` puts U+FFFD in its place.

    Raises:
        UserError: nothing is found, or a file cannot be read; names the file and the place in it.
    """
    for path in find_files(config, split).files:
        for text in _READERS[format_of(path)](path, config, errors):
            if text and not text.isspace():
                yield text


# --- bytes and lines -------------------------------------------------------------------------------------------------


@contextmanager
def _opened(path: Path) -> Iterator[gzip.GzipFile | BufferedReader]:
    """Open a plain or gzip file; a file that cannot be read, or is cut or damaged, is a UserError."""
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            yield file
    except FileNotFoundError:
        raise UserError(f"{path}: no such file or folder") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: is no whole gzip file ({error}); fetch or compress it again") from None
    except OSError as error:
        raise UserError(f"{path}: could not be read ({error.strerror or error})") from error


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield each line of a text file, its end included, with its byte offset (after decompression)."""
    with _opened(path) as file:
        if b"\0" in file.peek(_BINARY_HEAD)[:_BINARY_HEAD]:
            raise UserError(f"{path}: is a binary file (or UTF-16), not UTF-8 text; convert it first")
        line, offset = file.readline(DOCUMENT_LIMIT + 1), 0
        if line.startswith(BOM):
            line, offset = line[len(BOM) :], len(BOM)
        while line:
            if len(line) > DOCUMENT_LIMIT:
                raise _too_large(path, offset, "break it into lines")
            yield offset, line
            offset += len(line)
            line = file.readline(DOCUMENT_LIMIT + 1)


def _too_large(path: Path, offset: int, advice: str) -> UserError:
    limit = DOCUMENT_LIMIT // 2**20
    return UserError(f"{path}: the document at byte {offset} is larger than {limit} MiB; {advice}")


def _decode(data: bytes, errors: Errors, path: Path, offset: int) -> str:
    try:
        return data.decode("utf-8", errors)
    except UnicodeDecodeError as error:
        place = f"byte {offset + error.start}"
        raise UserError(f"{path}: invalid UTF-8 at {place}; mend it, or go on with --errors replace") from None


# --- one reader per format -------------------------------------------------------------------------------------------


def _read_txt(path: Path, config: DatasetConfig, errors: Errors) -> Iterator[str]:
    separator, in_lines = _find_separator(path, config.separator)
    advice = f"put {f'a line {config.separator}' if separator else 'a blank line'} between documents"
    lines: list[bytes] = []
    start = size = 0

    def document() -> str:
        return tidy(_decode(b"".join(lines), errors, path, start))

    for offset, line in _lines(path):
        ended, separated, rest = line.partition(separator) if in_lines else (line, b"", b"")
        if not in_lines and line.strip() == separator:
            yield document()
            lines, size = [], 0
            continue
        while separated:
            lines.append(ended)
            yield document()
            lines, size = [], 0
            ended, separated, rest = rest.partition(separator)
        if not lines:
            start = offset
        lines.append(ended)
        size += len(ended)
        if size > DOCUMENT_LIMIT:
            raise _too_large(path, start, advice)
    yield document()


def tidy(text: str) -> str:
    """Return the text of a .txt document: ``\\n`` at line ends and no blank space around it."""
    if "\r" in text:
        text = re.sub(r"\r+\n", "\n", text)
    return text.strip()


def _find_separator(path: Path, separator: str) -> tuple[bytes, bool]:
    """Return what separates the documents of a file, and whether it stands in lines of text instead of its own.

    Empty, with False, means blank lines. Where the separator has lines of its own, text that holds it is text.
    """
    if separator == BLANK_LINE:
        return b"", False
    line = separator.encode("utf-8")
    with _opened(path) as file:
        head = file.read(HEAD).removeprefix(BOM)
    if any(candidate.strip() == line for candidate in head.split(b"\n")):
        return line, False
    if line in head:
        _log.info("%s: no line holds %s alone, so documents end at it wherever it stands", path, separator)
        return line, True
    _log.info("%s: no %s near its start, so blank lines separate its documents", path, separator)
    return b"", False


def _read_jsonl(path: Path, config: DatasetConfig, errors: Errors) -> Iterator[str]:
    for number, (offset, line) in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        text = _decode(line, errors, path, offset)
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{place}: is no JSON ({error}); the file must hold one JSON object per line") from None
        if not isinstance(record, dict):
            raise UserError(f"{place}: holds {shorten(record)}; the file must hold one JSON object per line")
        yield _without_surrogates(_field(record, config.text_field, place), errors, place)


def _field(record: dict[str, Any], field: str, place: str) -> str:
    """Return the text of a record; null is a record without text."""
    if field not in record:
        raise UserError(f"{place}: has no field {field!r}, set text_field{nearest(field, record)}")
    value = record[field]
    if not isinstance(value, str | None):
        raise UserError(f"{place}: the field {field!r} holds no text but {shorten(value)}; set text_field")
    return value or ""


def _without_surrogates(text: str, errors: Errors, place: str) -> str:
    """JSON can escape half of a UTF-16 pair, which is no character and has no UTF-8."""
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:
        if errors == "strict":
            message = "holds half of a surrogate pair, which is no character; mend it, or go on with --errors replace"
            raise UserError(f"{place}: {message}") from None
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _read_csv(path: Path, config: DatasetConfig, errors: Errors) -> Iterator[str]:
    csv.field_size_limit(DOCUMENT_LIMIT)  # of the whole process: the module knows no other
    lines = (_decode(line, errors, path, offset) for offset, line in _lines(path))
    rows = csv.reader(lines, strict=True)
    try:
        header = next(rows, [])
        if config.text_field not in header:
            raise UserError(
                f"{path}: has no column {config.text_field!r}, set text_field{nearest(config.text_field, header)}"
            )
        column = header.index(config.text_field)
        for row in rows:
            if row and len(row) <= column:
                raise UserError(f"{path}:{rows.line_num}: has {len(row)} of {len(header)} columns; complete the row")
            if row:
                yield row[column]
    except csv.Error as error:
        raise UserError(f"{path}:{rows.line_num}: is no valid CSV ({error})") from None


def _read_parquet(path: Path, config: DatasetConfig, errors: Errors) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    row = 0
    with ExitStack() as stack:
        file: IO[bytes] | BufferedReader | gzip.GzipFile = stack.enter_context(_opened(path))
        if path.suffix.lower() == ".gz":  # parquet is read from its end, which gzip cannot reach
            whole = stack.enter_context(tempfile.TemporaryFile())
            shutil.copyfileobj(file, whole)
            file = whole
        try:
            table = pyarrow.parquet.ParquetFile(file, pre_buffer=False)
            _check_column(table.schema_arrow, config.text_field, path)
            for batch in table.iter_batches(batch_size=64, columns=[config.text_field]):
                for value in batch.column(0).cast(pyarrow.large_binary()).to_pylist():
                    yield _decode_row(value or b"", errors, path, row)
                    row += 1
        except (pyarrow.ArrowException, OSError) as error:
            problem = str(error).splitlines()[0]
            raise UserError(f"{path}: is no whole parquet file ({problem}); fetch it again") from None


def _check_column(schema: Any, field: str, path: Path) -> None:
    from pyarrow import types

    if field not in schema.names:
        raise UserError(f"{path}: has no column {field!r}, set text_field{nearest(field, schema.names)}")
    kind = schema.field(field).type
    kind = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)):
        raise UserError(f"{path}: the column {field!r} holds no text but {kind}; set text_field")


def _decode_row(value: bytes, errors: Errors, path: Path, row: int) -> str:
    if len(value) > DOCUMENT_LIMIT:
        raise UserError(f"{path}: the document in row {row} is larger than {DOCUMENT_LIMIT // 2**20} MiB; split it")
    try:
        return value.decode("utf-8", errors)
    except UnicodeDecodeError as error:
        place = f"byte {error.start} of row {row}"
        raise UserError(f"{path}: invalid UTF-8 at {place}; mend it, or go on with --errors replace") from None


_READERS: dict[str, Callable[[Path, DatasetConfig, Errors], Iterator[str]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".json": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
