"""Documents of a .parquet file: one column, read in batches that stay small whatever the file holds."""

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from io import BufferedReader
from pathlib import Path
from typing import IO, Any

from tiny_lm.config import nearest
from tiny_lm.dataset.config import Errors
from tiny_lm.dataset.names import name_from_path
from tiny_lm.dataset.parquet_pages import PageError, largest_page
from tiny_lm.dataset.text_file import DOCUMENT_LIMIT, opened
from tiny_lm.errors import UserError

_UNPACKED_LIMIT = 256 * 2**20  # bytes of a .parquet.gz, which becomes a temporary file
_BATCH_ROWS = 64
_PAGE_LIMIT = 512 * 2**20  # bytes of a page: pyarrow writes a thousand rows before it ends one
_BUFFER = 2**20


def read_parquet(path: Path, text_field: str, errors: Errors) -> Iterator[str]:
    """Yield the text of each row.

    A page of parquet can unpack to a thousand times its size, and a dictionary can name one long value in every row. So
    the headers of all pages are read first, and a batch has at most as many rows as keep it below the limit.

    Raises:
        UserError: the file is damaged, has no such column of text, or a document is too large.
    """
    import pyarrow
    import pyarrow.parquet

    name = name_from_path(path)
    row = 0
    with ExitStack() as stack:
        file: IO[bytes] | BufferedReader | Any = stack.enter_context(opened(path))
        if path.suffix.lower() == ".gz":  # parquet is read from its end, which gzip cannot reach
            file = _unpack(file, stack.enter_context(tempfile.TemporaryFile()), name)
        try:
            table = pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=_BUFFER)
            _check_column(table.schema_arrow, text_field, name)
            for group in range(table.metadata.num_row_groups):
                page = largest_page(file, table.metadata.row_group(group), text_field)
                if page > _PAGE_LIMIT:
                    limit = _PAGE_LIMIT // 2**20
                    problem = f"a page of row group {group} unpacks to more than {limit} MiB"
                    raise UserError(f"{name}: {problem}; write the file again with smaller documents or pages")
                rows = max(1, min(_BATCH_ROWS, DOCUMENT_LIMIT // max(page, 1)))
                for batch in table.iter_batches(batch_size=rows, row_groups=[group], columns=[text_field]):
                    values = batch.column(0).cast(pyarrow.large_binary())
                    for index in range(len(values)):
                        yield _decode_row(values[index].as_py() or b"", errors, name, row)
                        row += 1
        except (pyarrow.ArrowException, OSError, PageError) as error:
            problem = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"{name}: damaged or incomplete parquet file ({problem}); download it again") from None


def _unpack(file: IO[bytes], target: IO[bytes], name: str) -> IO[bytes]:
    while data := file.read(_BUFFER):
        if target.tell() + len(data) > _UNPACKED_LIMIT:
            limit = _UNPACKED_LIMIT // 2**20
            raise UserError(f"{name}: unpacks to more than {limit} MiB; unpack it with gunzip first")
        target.write(data)
    return target


def _check_column(schema: Any, field: str, name: str) -> None:
    from pyarrow import types

    if field not in schema.names:
        raise UserError(f"{name}: has no column {field!r}, set text_field{nearest(field, schema.names)}")
    kind = schema.field(schema.names.index(field)).type
    kind = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)):
        raise UserError(f"{name}: the column {field!r} is not text but {kind}; set text_field")


def _decode_row(value: bytes, errors: Errors, name: str, row: int) -> str:
    if len(value) > DOCUMENT_LIMIT:
        raise UserError(f"{name}: the document in row {row} is larger than {DOCUMENT_LIMIT // 2**20} MiB; split it")
    try:
        return value.decode("utf-8", errors)
    except UnicodeDecodeError as error:
        place = f"byte {error.start} of row {row}"
        raise UserError(f"{name}: invalid UTF-8 at {place}; fix the file, or pass --errors replace") from None
