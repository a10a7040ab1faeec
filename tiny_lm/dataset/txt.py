"""Documents of a .txt file, separated by a separator, or by blank lines if it does not occur."""

import re
from collections.abc import Iterator

from tiny_lm.dataset.config import BLANK_LINE
from tiny_lm.dataset.notes import ReadingNotes
from tiny_lm.dataset.text_file import DOCUMENT_LIMIT, TextFile

HEAD = 16 * 2**20  # bytes of a .txt file in which a separator must appear
_BLANK = rb"[ \t\r\x0b\x0c]*"


def read_txt(file: TextFile, separator: str, notes: ReadingNotes) -> Iterator[str]:
    """Yield the documents of a file, and record their separator.

    Raises:
        UserError: a document is larger than the limit, or has invalid UTF-8; names the file and the byte.
    """
    marker = _find_separator(file, separator)
    notes.count_separator(separator, is_missing=separator != BLANK_LINE and not marker)
    advice = f"put {f'a line {separator}' if marker else 'a blank line'} between documents"
    splitter = _split_anywhere(file, marker) if splits_anywhere(marker) else _split_at_lines(file, marker)
    parts: list[bytes] = []
    start = size = 0
    line_is_open = False  # whether text precedes the separator on its line
    for offset, piece, is_end in splitter:
        if not parts:
            start = offset + len(piece) - len(piece.lstrip())
        if parts or piece.strip():
            parts.append(piece)
            size += len(piece)
        if size > DOCUMENT_LIMIT:
            raise file.too_large(start, advice)
        if is_end and parts:
            line_is_open = not _ends_line(parts)
            notes.inside_lines += bool(marker) and line_is_open
            yield tidy(file.decode(b"".join(parts), start - _leading_space(parts)))
            parts, size = [], 0
    yield tidy(file.decode(b"".join(parts), start - _leading_space(parts)))


def _leading_space(parts: list[bytes]) -> int:
    return len(parts[0]) - len(parts[0].lstrip()) if parts else 0


def _ends_line(parts: list[bytes]) -> bool:
    """Return whether only space follows the last line end."""
    for part in reversed(parts):
        if part.strip(b" \t\r\x0b\x0c"):
            return part.rstrip(b" \t\r\x0b\x0c").endswith(b"\n")
    return True


def splits_anywhere(marker: bytes) -> bool:
    """Return whether a separator counts anywhere in a line, as ``<|endoftext|>`` does.

    Others (``---``) are text unless on their own line.
    """
    return marker.startswith(b"<") and marker.endswith(b">")


def tidy(text: str) -> str:
    """Return a .txt document with ``\\n`` line ends, stripped."""
    if "\r" in text:
        text = re.sub(r"\r+\n", "\n", text)
    return text.strip()


def _find_separator(file: TextFile, separator: str) -> bytes:
    """Return the separator to search for; empty means blank lines."""
    if separator == BLANK_LINE:
        return b""
    marker = separator.encode("utf-8")
    if splits_anywhere(marker):
        before = b""
        for offset, chunk in file.chunks():
            if marker in before + chunk:
                return marker
            if offset + len(chunk) >= HEAD:
                return b""
            before = chunk[-len(marker) + 1 :]
        return b""
    line = _separator_line(marker)
    for offset, block in file.blocks():
        if line.search(block):
            return marker
        if offset + len(block) >= HEAD:
            break
    return b""


def _separator_line(marker: bytes) -> "re.Pattern[bytes]":
    """Return the pattern of a line that separates; for blank lines, of all that follow each other."""
    end = rb"(?:\n|\Z)" if marker else rb"\n\s*"
    return re.compile(rb"(?<![^\n])" + _BLANK + re.escape(marker) + (_BLANK if marker else b"") + end)


def _split_at_lines(file: TextFile, marker: bytes) -> Iterator[tuple[int, bytes, bool]]:
    """Yield pieces of the file with their offsets, and whether a document ends after each."""
    pattern = _separator_line(marker)
    for offset, block in file.blocks():
        start = 0
        for match in pattern.finditer(block):
            yield offset + start, block[start : match.start()], True
            start = match.end()
        if start < len(block):
            yield offset + start, block[start:], False


def _split_anywhere(file: TextFile, marker: bytes) -> Iterator[tuple[int, bytes, bool]]:
    """Yield pieces as :func:`_split_at_lines` does, in lines of any length."""
    rest, position = b"", 0
    for offset, chunk in file.chunks():
        position = position if rest else offset
        data, start = rest + chunk, 0
        while (found := data.find(marker, start)) >= 0:
            yield position + start, data[start:found], True
            start = found + len(marker)
        keep = max(start, len(data) - len(marker) + 1)  # a separator may continue in the next chunk
        if keep > start:
            yield position + start, data[start:keep], False
        rest, position = data[keep:], position + keep
    if rest:
        yield position, rest, False
