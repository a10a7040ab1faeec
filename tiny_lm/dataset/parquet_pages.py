"""The sizes of the pages of a parquet column, which pyarrow does not show before it unpacks them.

A page begins with a header in the compact protocol of Apache Thrift; of its fields, the sizes of the page unpacked (2)
and as stored (3) are needed here. See the specification "Apache Parquet: file format", section on data pages.
"""

from typing import IO, Any

_HEADER = 2**16  # bytes in which a header must end; statistics in it may hold values
_MAX_HEADER = 2**24
_MAX_DEPTH = 8
_UNPACKED, _STORED = 2, 3
_STOP, _TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _SET, _STRUCT = 0, 1, 2, 3, 7, 8, 9, 10, 12
_INTEGERS = (4, 5, 6)


class PageError(Exception):
    """The header of a page is damaged."""


def largest_page(file: IO[bytes], row_group: Any, field: str) -> int:
    """Return the size of the largest page of a column chunk, unpacked.

    Raises:
        PageError: a header is damaged, or pages reach beyond their column.
    """
    columns = [row_group.column(index) for index in range(row_group.num_columns)]
    largest = 0
    for column in columns:
        if column.path_in_schema != field:
            continue
        starts = [column.data_page_offset, column.dictionary_page_offset if column.has_dictionary_page else None]
        position = min(start for start in starts if start is not None)
        end = position + column.total_compressed_size
        while position < end:
            unpacked, stored, length = _read_sizes(file, position)
            if unpacked < 0 or stored < 0:
                raise PageError(f"a page at byte {position} has a negative size")
            largest = max(largest, unpacked, stored)
            position += length + stored
    return largest


def _read_sizes(file: IO[bytes], position: int) -> tuple[int, int, int]:
    """Return the unpacked and stored size of a page, and the length of its header."""
    size = _HEADER
    while True:
        file.seek(position)
        data = file.read(size)
        header = _Compact(data)
        try:
            sizes = header.read_integers()
            return sizes[_UNPACKED], sizes[_STORED], header.position
        except IndexError:
            if len(data) < size or size >= _MAX_HEADER:
                raise PageError(f"the header of the page at byte {position} has no end") from None
            size *= 16
        except KeyError:
            raise PageError(f"the header of the page at byte {position} has no sizes") from None


class _Compact:
    """Reads Thrift's compact protocol; an IndexError means that the data ends too early."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.position = 0

    def read_integers(self, depth: int = 0) -> dict[int, int]:
        """Read a struct and return its integers by field id."""
        if depth > _MAX_DEPTH:
            raise PageError("the header of a page is nested too deep")
        found: dict[int, int] = {}
        field = 0
        while True:
            byte = self._byte()
            kind = byte & 15
            if kind == _STOP:
                return found
            field = field + (byte >> 4) if byte >> 4 else self._integer()
            if kind in _INTEGERS:
                found[field] = self._integer()
            else:
                self._skip(kind, depth)

    def _skip(self, kind: int, depth: int) -> None:
        if kind in (_TRUE, _FALSE):
            return
        if kind in _INTEGERS:
            self._integer()
        elif kind in (_BYTE, _DOUBLE, _BINARY):
            self._advance({_BYTE: 1, _DOUBLE: 8}.get(kind) or self._varint())
        elif kind == _STRUCT:
            self.read_integers(depth + 1)
        elif kind in (_LIST, _SET):
            byte = self._byte()
            for _ in range(byte >> 4 if byte >> 4 < 15 else self._varint()):
                self._skip(byte & 15, depth + 1)
        else:
            raise PageError(f"the header of a page has a field of unknown kind {kind}")

    def _advance(self, size: int) -> None:
        self.position += size
        if self.position > len(self._data):
            raise IndexError

    def _byte(self) -> int:
        self.position += 1
        return self._data[self.position - 1]

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
            if shift > 63:
                raise PageError("the header of a page holds a number that is too long")

    def _integer(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)
