"""Text files: decompressed, transcoded to UTF-8, and read in blocks of bounded size."""

import codecs
import gzip
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

from tiny_lm.dataset.config import Errors
from tiny_lm.dataset.names import name_from_path
from tiny_lm.errors import UserError

DOCUMENT_LIMIT = 64 * 2**20  # bytes
BOM = codecs.BOM_UTF8
_CHUNK = 2**20  # bytes read at once
_BINARY_HEAD = 8192  # bytes in which a NUL marks a binary file
_BLANK_LINES = re.compile(rb"\s*\n")
_OTHER_ENCODINGS = (  # UTF-32 first: its mark begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


@contextmanager
def opened(path: Path) -> Iterator[gzip.GzipFile | BufferedReader]:
    """Open a plain or gzip file; raise UserError if it cannot be read or is damaged."""
    name = name_from_path(path)
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            yield file
    except FileNotFoundError:
        raise UserError(f"{name}: no such file or folder") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{name}: damaged or incomplete gzip file ({error}); download or compress it again") from None
    except OSError as error:
        raise UserError(f"{name}: could not be read ({error.strerror or error})") from error


class TextFile:
    """A text file as UTF-8, whatever it is on disk.

    Attributes:
        name: the path as messages show it.
        encoding: ``UTF-8``, or what the byte order mark says.
        has_cr_ends: whether lines end with a carriage return alone, as on classic Mac OS; it becomes ``\\n``.
    """

    def __init__(self, path: Path, errors: Errors) -> None:
        """Inspect the beginning of the file.

        Raises:
            UserError: it cannot be read, or is binary.
        """
        self.name = name_from_path(path)
        self.encoding = "UTF-8"
        self.has_cr_ends = False
        self._path, self._errors = path, errors
        with opened(path) as file:
            head = file.read(_CHUNK)
        for mark, encoding in _OTHER_ENCODINGS:
            if self.encoding == "UTF-8" and head.startswith(mark):
                self.encoding = encoding.upper()
        if self.encoding == "UTF-8" and (nul := head[:_BINARY_HEAD].find(b"\0")) >= 0:
            problem = f"is a binary file, or UTF-16 without a byte order mark (NUL at byte {nul})"
            raise UserError(f"{self.name}: {problem}; convert it to UTF-8 first")
        if self.encoding == "UTF-8":
            self.has_cr_ends = b"\r" in head and b"\n" not in head
        else:
            text = next(self.chunks(), (0, b""))[1]
            self.has_cr_ends = b"\r" in text and b"\n" not in text

    def chunks(self) -> Iterator[tuple[int, bytes]]:
        """Yield the file in blocks of about a megabyte, each with its byte offset.

        The offset counts bytes of the unpacked file, or of its UTF-8 if it is transcoded.
        """
        with opened(self._path) as file:
            decoder = None if self.encoding == "UTF-8" else codecs.getincrementaldecoder(self.encoding)(self._errors)
            offset = position = 0
            while True:
                data = file.read(_CHUNK)
                if decoder is not None:
                    chunk = self._transcode(decoder, data, position)
                elif position == 0 and data.startswith(BOM):
                    chunk, offset = data[len(BOM) :], len(BOM)
                else:
                    chunk = data
                position += len(data)
                if chunk:
                    yield offset, self._without_nul(chunk, offset)
                    offset += len(chunk)
                if not data:
                    return

    def _transcode(self, decoder: codecs.IncrementalDecoder, data: bytes, position: int) -> bytes:
        try:
            return decoder.decode(data, final=not data).encode("utf-8")
        except UnicodeDecodeError as error:
            problem = f"invalid {self.encoding} at about byte {position + error.start}"
            raise UserError(f"{self.name}: {problem}; fix the file, or pass --errors replace") from None

    def _without_nul(self, chunk: bytes, offset: int) -> bytes:
        nul = chunk.find(b"\0")
        if nul >= 0 and self._errors == "strict":
            problem = f"NUL at byte {offset + nul}, which is not text"
            raise UserError(f"{self.name}: {problem}; remove it, or pass --errors replace")
        if nul >= 0:
            chunk = chunk.replace(b"\0", "\ufffd".encode())
        return chunk.replace(b"\r", b"\n") if self.has_cr_ends else chunk

    def blocks(self) -> Iterator[tuple[int, bytes]]:
        """Yield the file in blocks of whole lines, each with its byte offset; the last line may lack its end.

        Raises:
            UserError: a line is longer than a document may be.
        """
        parts: list[bytes] = []
        start = size = 0
        for offset, chunk in self.chunks():
            if not parts:
                start = offset
            end = chunk.rfind(b"\n") + 1
            if end:
                yield start, b"".join([*parts, chunk[:end]])
                parts, start, size = [], offset + end, 0
            if end < len(chunk):
                parts.append(chunk[end:])
                size += len(chunk) - end
            if size > DOCUMENT_LIMIT:
                raise self.too_large(start, "break it into lines")
        if parts:
            yield start, b"".join(parts)

    def lines(self) -> Iterator[tuple[int, int, bytes]]:
        """Yield each line that is not blank, its end included, with its number from 1 and its byte offset."""
        number = 1
        for offset, block in self.blocks():
            start = 0
            while start < len(block):
                if blank := _BLANK_LINES.match(block, start):  # all at once: a small gzip file may hold a billion
                    number, start = number + block.count(b"\n", start, blank.end()), blank.end()
                    continue
                end = block.find(b"\n", start) + 1 or len(block)
                yield number, offset + start, block[start:end]
                start, number = end, number + 1

    def decode(self, data: bytes, offset: int) -> str:
        """Return the text of ``data``, which begins at byte ``offset``.

        Raises:
            UserError: it is not UTF-8, and errors are ``strict``.
        """
        try:
            return data.decode("utf-8", self._errors)
        except UnicodeDecodeError as error:
            place = f"byte {offset + error.start}"
            raise UserError(f"{self.name}: invalid UTF-8 at {place}; fix the file, or pass --errors replace") from None

    def too_large(self, offset: int, advice: str) -> UserError:
        """Return the error for a document at byte ``offset`` that exceeds the limit."""
        limit = DOCUMENT_LIMIT // 2**20
        return UserError(f"{self.name}: the document at byte {offset} is larger than {limit} MiB; {advice}")
