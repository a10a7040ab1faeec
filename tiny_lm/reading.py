"""Reading files with limits on size and kind."""

import io
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from tiny_lm.errors import UserError

JSON_LIMIT = 32 * 2**20
"""Bytes: a tokenizer.json of 260,000 tokens is this large; parsed, it took 27 times the memory."""


def read_bytes(path: Path, *, limit: int) -> bytes:
    """Read a file whole.

    Raises:
        UserError: the file is missing, not a regular file, or larger than ``limit`` bytes.
    """
    with open_regular(path) as file:
        try:
            content = file.read(limit + 1)
        except OSError as error:
            raise UserError(f"{path}: could not be read ({error.strerror or error})") from error
    if len(content) > limit:
        raise UserError(f"{path}: larger than {limit} bytes, the limit for this kind of file")
    return content


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading, but no pipe or device, which might never end.

    Raises:
        UserError: the file is missing or not a regular file.
    """
    try:
        # Without O_NONBLOCK, opening a pipe waits for a writer.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        try:
            file = os.fdopen(descriptor, "rb")
        except OSError:  # a folder
            os.close(descriptor)
            raise
    except OSError as error:
        raise UserError(f"{path}: could not be read ({error.strerror or error})") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        file.close()
        raise UserError(f"{path}: is not a regular file; replace it")
    return file


def read_text(path: Path, *, limit: int = JSON_LIMIT, errors: str = "strict") -> str:
    """Read a UTF-8 text file of at most ``limit`` bytes, with universal newlines.

    With ``errors="replace"``, bytes that are not UTF-8 are read as U+FFFD.

    Raises:
        UserError: as :func:`read_bytes` does, or the file is not UTF-8.
    """
    try:
        return io.TextIOWrapper(io.BytesIO(read_bytes(path, limit=limit)), encoding="utf-8", errors=errors).read()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text (byte {error.start})") from None


def read_json(path: Path, *, limit: int = JSON_LIMIT) -> Any:
    """Read a JSON file, which may start with a byte order mark (from editors on Windows).

    Raises:
        UserError: the file is missing, larger than ``limit`` bytes, or not JSON.
    """
    text = read_text(path, limit=limit)
    try:
        return json.loads(text.removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not valid JSON ({error})") from error
