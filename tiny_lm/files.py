"""Writing files whole or not at all."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tiny_lm.errors import UserError

_TEMPORARY = re.compile(r"\..+\.\d+\.tmp")

_NOT_IN_JSON_TEXT = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff]")
"""What :func:`to_json` escapes besides what JSON itself requires: characters that end a line for Unicode but not for
JSON, control characters that a terminal obeys, and lone surrogates, which UTF-8 cannot encode."""


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it to ``path`` when the block ends without an exception.

    The file is synced to disk before the rename, so a reader (or a machine that loses power) sees the old file or the
    whole new one. When the block raises, the temporary file is removed and ``path`` is left as it was.

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # as _TEMPORARY says
    # None: a write to a file that is open, on a full disk.
    ours = {None, str(temporary), str(path), *map(str, path.parents)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("r+b") as file:  # Windows syncs only what is open for writing
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        if error.filename not in ours:
            raise  # the block read something else
        raise UserError(f"{path}: could not be written ({error.strerror or error})") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: Path, *, replaceable: str | None = None) -> Iterator[Path]:
    """Yield a temporary folder beside ``folder``; rename it to ``folder`` when the block ends without an exception.

    When the block raises, the temporary folder is removed and ``folder`` is left as it was.

    Args:
        folder: may exist if it is empty.
        replaceable: name of a file by which a folder that may be replaced is known; None: none may be.

    Raises:
        UserError: ``folder`` is a file or holds files that must not be lost, or it cannot be written.
    """
    check_free(folder, replaceable=replaceable)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
    except OSError as error:
        if old.exists() and not folder.exists():
            old.rename(folder)
        if error.filename is not None and not Path(str(error.filename)).is_relative_to(folder.parent):
            raise  # the block read something else
        raise UserError(f"{folder}: could not be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def check_free(folder: Path, *, replaceable: str | None = None) -> None:
    """Check that a folder may be written anew, as :func:`atomic_folder` does.

    Raises:
        UserError: it is a file, or holds files that must not be lost.
    """
    if folder.resolve() == Path.cwd() or folder.resolve() in Path.cwd().parents:
        where = "is where you are" if folder.resolve() == Path.cwd() else "holds the folder where you are"
        raise UserError(f"{folder}: {where}; name a folder of its own")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file, but a folder is to be written; choose another name")
    if folder.is_dir() and any(folder.iterdir()):
        if replaceable is None:
            raise UserError(f"{folder}: holds files already; choose another folder, or replace it with --force")
        if not (folder / replaceable).is_file():
            raise UserError(
                f"{folder}: holds files that no export wrote ({replaceable} is missing), so --force does not replace "
                "it; choose another folder"
            )


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files that killed processes left in ``folder``; nobody else may be writing there."""
    for temporary in folder.rglob(".*.tmp"):
        if _TEMPORARY.fullmatch(temporary.name):
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Return ``value`` as JSON that stays on one line (without ``indent``) for every reader of lines.

    Python's ``str.splitlines`` and many HTTP clients end a line at U+0085, U+2028 and U+2029 too, so these are escaped.

    Raises:
        ValueError: a number is infinite or NaN, which JSON does not have.
    """
    separators = (",", ":") if indent is None else None
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent, separators=separators)
    return _NOT_IN_JSON_TEXT.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically.

    Raises:
        ValueError: a number is infinite or NaN, which JSON does not have.
        UserError: the file cannot be written.
    """
    write_text(path, to_json(value, indent=2) + "\n")


def read_text(path: Path, *, limit: int = 256 * 2**20) -> str:
    """Read a UTF-8 text file.

    Raises:
        UserError: the file is missing, larger than ``limit`` bytes, or not UTF-8.
    """
    try:
        if path.stat().st_size > limit:
            raise UserError(f"{path}: larger than {limit} bytes, which no file of this kind is")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: could not be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is no UTF-8 text ({error})") from error


def read_json(path: Path, *, limit: int = 256 * 2**20) -> Any:
    """Read a JSON file, which may begin with a byte order mark, as editors on Windows write it.

    Raises:
        UserError: the file is missing, larger than ``limit`` bytes, or no JSON.
    """
    text = read_text(path, limit=limit)
    try:
        return json.loads(text.removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is no valid JSON ({error})") from error
