"""Documents of .jsonl and .csv files: one field of each record."""

import csv
import json
import re
from collections.abc import Iterator
from typing import Any

from tiny_lm.config import nearest, shorten
from tiny_lm.dataset.config import Errors
from tiny_lm.dataset.text_file import DOCUMENT_LIMIT, TextFile
from tiny_lm.errors import UserError

# Records up to this size are parsed directly. In larger ones, values are counted first: in memory a value can take
# fifty times its two or three bytes.
_SMALL = 2**20
_MAX_PARTS = 2**20
_BLANK_LINES = re.compile(rb"[\r\n]*\n")


def read_jsonl(file: TextFile, text_field: str, errors: Errors) -> Iterator[str]:
    """Yield the text of each line, which holds a JSON object.

    Raises:
        UserError: a line is not a JSON object with such a text, or is too large; names the file and the line.
    """
    for number, offset, line in file.lines():
        if not line.strip():
            continue
        location = f"{file.name}:{number}"
        if len(line) > _SMALL:
            _check_json_parts(line, location)
        text = file.decode(line, offset)
        del line
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{location}: invalid JSON ({error}); the file must have one JSON object per line"
            ) from None
        del text
        if not isinstance(record, dict):
            raise UserError(
                f"{location}: not a JSON object but {shorten(record)}; the file must have one JSON object per line"
            )
        yield _without_surrogates(_field(record, text_field, location), errors, location)


def _check_json_parts(line: bytes, location: str) -> None:
    """Reject a line that would parse to a huge number of objects, by counting brackets and commas outside strings."""
    plain = line.replace(b"\\\\", b"").replace(b'\\"', b"")
    parts = plain.count(b'"')
    if parts <= _MAX_PARTS:
        outside = b"".join(plain.split(b'"')[::2])
        parts += sum(map(outside.count, (b",", b"[", b"{")))
    if parts > _MAX_PARTS:
        raise UserError(f"{location}: has more than {_MAX_PARTS:,} JSON values; keep only the text")


def _field(record: dict[str, Any], field: str, location: str) -> str:
    """Return the text of a record; null means no text."""
    if field not in record:
        raise UserError(f"{location}: has no field {field!r}, set text_field{nearest(field, record)}")
    value = record[field]
    if not isinstance(value, str | None):
        raise UserError(f"{location}: the field {field!r} is not text but {shorten(value)}; set text_field")
    return value or ""


def _without_surrogates(text: str, errors: Errors, location: str) -> str:
    """Handle lone surrogates, which JSON can escape but UTF-8 cannot encode."""
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:
        if errors == "strict":
            message = "contains a lone surrogate, which is not a character; fix the file, or pass --errors replace"
            raise UserError(f"{location}: {message}") from None
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def read_csv(file: TextFile, text_field: str) -> Iterator[str]:
    """Yield the text of each row.

    Raises:
        UserError: the file is not CSV, has no such column, or a row is too large; names the file and the line.
    """
    csv.field_size_limit(DOCUMENT_LIMIT)  # a global setting; the module has no other
    lines = _CSVLines(file)
    rows = csv.reader(lines, strict=True)
    try:
        header = next(rows, [])
        if text_field not in header:
            raise UserError(f"{file.name}: has no column {text_field!r}, set text_field{nearest(text_field, header)}")
        column, width = header.index(text_field), len(header)
        while True:
            lines.begin_row()
            row = next(rows, None)
            if row is None:
                return
            if row and len(row) <= column:
                raise UserError(f"{file.name}:{lines.number}: has {len(row)} of {width} columns; complete the row")
            if row:
                yield row[column]
    except csv.Error as error:
        raise UserError(f"{file.name}:{lines.number}: invalid CSV ({error})") from None


class _CSVLines:
    """The lines of a CSV file, with limits per row: the csv module keeps all fields of a row in memory."""

    def __init__(self, file: TextFile) -> None:
        self.number = 1
        self._file = file
        self._lines = self._read_lines()
        self.begin_row()

    def begin_row(self) -> None:
        """Reset the counters."""
        self._size = self._commas = 0
        self._is_quoted = False

    def __iter__(self) -> "_CSVLines":
        return self

    def __next__(self) -> str:
        offset, line = next(self._lines)
        self._size += len(line)
        if self._size > DOCUMENT_LIMIT:
            limit = DOCUMENT_LIMIT // 2**20
            raise UserError(f"{self._file.name}:{self.number}: the row is larger than {limit} MiB; split it")
        self._count(line)
        if self._commas > _MAX_PARTS:
            raise UserError(f"{self._file.name}:{self.number}: the row has more than {_MAX_PARTS:,} columns")
        return self._file.decode(line, offset)

    def _read_lines(self) -> Iterator[tuple[int, bytes]]:
        """Yield lines with their offsets, those within a quoted field together; skip blank lines."""
        number = 1
        for offset, block in self._file.blocks():
            start = 0
            while start < len(block):
                end = block.find(b"\n", start) + 1 or len(block)
                if self._is_quoted:
                    quote = block.find(b'"', start)
                    end = max(end, block.rfind(b"\n", start, quote if quote >= 0 else len(block)) + 1)
                elif blank := _BLANK_LINES.match(block, start):
                    number, start = number + block.count(b"\n", start, blank.end()), blank.end()
                    continue
                self.number = number
                yield offset + start, block[start:end]
                number, start = number + block.count(b"\n", start, end), end

    def _count(self, line: bytes) -> None:
        """Count the commas outside quotes in large rows."""
        plain = line.replace(b'""', b"")
        quotes = plain.count(b'"')
        if self._size > _SMALL:
            if quotes > _MAX_PARTS:
                self._commas = quotes
            else:
                self._commas += sum(part.count(b",") for part in plain.split(b'"')[self._is_quoted :: 2])
        self._is_quoted ^= bool(quotes % 2)
