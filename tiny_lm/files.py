"""Writing files whole or not at all."""

import glob
import json
import os
import re
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from tiny_lm.console import print_result
from tiny_lm.errors import UserError
from tiny_lm.locks import HAS_LOCKS, claim_file, is_abandoned, keep_open, lock_folder, try_lock

_TEMPORARY = re.compile(r"\..+\.\d+\.(tmp|old)")

_LOCK_SECONDS = 10.0  # names are given in no time, but the disk may be slow

_OUTPUT_IN_USE = "another process is writing there; wait for its end, or choose another name"

_NOT_IN_JSON_TEXT = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff]")
"""What :func:`to_json` escapes besides what JSON itself requires: characters that end a line for Unicode but not for
JSON, control characters that a terminal obeys, and lone surrogates, which UTF-8 cannot encode."""


@contextmanager
def atomic_path(path: Path, *, exclusive: bool = False) -> Iterator[Path]:
    """Yield a temporary file beside ``path``; rename it to ``path`` when the block ends without an exception.

    The file is synced to disk before the rename, so a reader (or a machine that loses power) sees the old file or the
    whole new one. When the block raises, the temporary file is removed and ``path`` is left as it was. It is locked
    while the block runs: one that a killed process left is known by that, and is removed by the next writer of
    ``path``.

    Args:
        path: the file to write.
        exclusive: refuse to write beside another process that writes ``path`` exclusively; else the last one wins.

    Raises:
        UserError: the disk is full, the folder cannot be written, or another process is writing ``path``.
    """
    temporary = path
    with ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(path.parent, _prefix(path))
            temporary = (_claim_temporary if exclusive else _create_temporary)(path, stack)
            yield temporary
            with temporary.open("r+b") as file:  # Windows syncs only what is open for writing
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError as error:
            # None: a write to a file that is open, on a full disk.
            ours = {None, str(temporary), str(path), *map(str, path.parents)}
            if error.filename not in ours and not str(error.filename).startswith(str(path.parent / _prefix(path))):
                raise  # the block read something else
            raise UserError(f"{path}: could not be written ({error.strerror or error})") from error


@contextmanager
def scratch_folder(folder: Path | None = None, *, name: str = "scratch") -> Iterator[Path]:
    """Yield a temporary folder, which only its user may read; it is removed at the end: move out what is to stay.

    Those of the same name that killed processes left are removed first.

    Args:
        folder: where to create it; None for the system's place for temporary files.
        name: part of its name.

    Raises:
        UserError: it cannot be created.
    """
    folder = Path(tempfile.gettempdir()) if folder is None else folder
    with ExitStack() as stack:
        try:
            _remove_abandoned(folder, _prefix(folder / name))
            temporary = _create_temporary(folder / name, stack, folder=True)
            temporary.chmod(0o700)
        except OSError as error:
            raise UserError(f"{folder}: could not be written ({error.strerror or error})") from error
        yield temporary


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Raise what goes wrong while a file is written as an error that names ``path``, the file that it will be."""
    try:
        yield
    except OSError as error:
        if error.filename is not None and path.name not in str(error.filename):
            raise  # the block read something else
        raise UserError(f"{path}: could not be written ({error.strerror or error})") from error


def _prefix(path: Path) -> str:
    return f".{path.name[:60]}."  # with what follows it must not be longer than a name may be


def _temporary_name(path: Path, suffix: str = "tmp") -> Path:
    """Return a new name beside ``path``. A process number would not do: in containers all are 1."""
    return path.with_name(f"{_prefix(path)}{secrets.randbelow(10**12)}.{suffix}")


def _create_temporary(path: Path, stack: ExitStack, *, folder: bool = False) -> Path:
    """Create a temporary file or folder beside ``path`` and lock it; ``stack`` releases and removes it."""
    while True:
        temporary = _temporary_name(path)
        if folder:
            temporary.mkdir()
        else:
            os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        if not HAS_LOCKS:  # Windows, which renames no open file
            stack.callback(_remove, temporary)
            return temporary
        descriptor = os.open(temporary, os.O_RDONLY if folder else os.O_RDWR)
        if try_lock(descriptor) and temporary.exists():
            stack.callback(_remove, temporary)
            stack.enter_context(keep_open(descriptor))
            return temporary
        os.close(descriptor)  # another process took it for abandoned before it was locked


def _claim_temporary(path: Path, stack: ExitStack) -> Path:
    """Create a temporary file as above, under one name for all who write ``path``.

    Raises:
        UserError: another process has it.
    """
    temporary = path.with_name(f"{_prefix(path)}0.tmp")
    claimed = stack.enter_context(claim_file(temporary, f"{path}: {_OUTPUT_IN_USE}"))
    return temporary if claimed else _create_temporary(path, stack)


def _remove(path: Path) -> None:
    """Remove a temporary file or folder of ours; where that fails, the error that came before matters more."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _remove_abandoned(folder: Path, prefix: str) -> bool:
    """Remove the temporary files and folders of this prefix that no process holds; return whether any is held."""
    in_use = False
    with suppress(OSError):
        for path in [Path(entry.path) for entry in os.scandir(folder) if entry.name.startswith(prefix)]:
            if path.suffix == ".tmp" and path.name[len(prefix) : -len(".tmp")].isdigit():
                if is_abandoned(path):
                    _remove(path)
                else:
                    in_use = in_use or path.is_dir()
    return in_use


@contextmanager
def open_output(path: Path) -> Iterator[BinaryIO]:
    """Open a file that the user named for writing: whole or not at all, where it is a file.

    ``-`` and ``/dev/stdout`` are standard output; a pipe or a device is written as it is. A link stays a link: what it
    points to is replaced.

    Raises:
        UserError: it cannot be written, or another process is writing it.
    """
    try:
        if is_stdout(path):
            sys.stdout.flush()
            yield sys.stdout.buffer
            print_result(end="")  # which ends the command where nobody reads it
        elif path.is_dir():
            raise UserError(f"{path}: is a folder, but a file is to be written; choose another name")
        elif path.exists() and (not path.is_file() or str(path).startswith(("/dev/std", "/dev/fd/", "/proc/"))):
            with path.open("wb") as file:
                yield file
        else:
            target = Path(os.path.realpath(path))
            with atomic_path(target, exclusive=True) as temporary, temporary.open("wb") as file:
                yield file
    except OSError as error:
        if error.filename not in (None, str(path)) or isinstance(error, BrokenPipeError):
            raise
        raise UserError(f"{path}: could not be written ({error.strerror or error})") from error


def is_stdout(path: Path) -> bool:
    """Whether a path that the user named means standard output."""
    return str(path) in ("-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")


@contextmanager
def atomic_folder(folder: Path, *, replaceable: str | None = None) -> Iterator[Path]:
    """Yield a temporary folder; give it the name ``folder`` when the block ends without an exception.

    It lies beside ``folder``, or inside it where that is a mount point or its parent cannot be written: then the files
    are moved up at the end, ``replaceable`` as the last one. When the block raises, the temporary folder is removed and
    ``folder`` is left as it was. A link to a folder stays a link.

    Args:
        folder: may exist if it is empty.
        replaceable: name of a file by which a folder that may be replaced is known; None: none may be.

    Raises:
        UserError: ``folder`` is a file or holds files that must not be lost, another process is writing it, or it
            cannot be written.
    """
    target = Path(os.path.realpath(folder))
    inside = target.is_dir() and not _can_be_renamed(target)
    beside = target / target.name if inside else target
    with ExitStack() as stack:
        try:
            beside.parent.mkdir(parents=True, exist_ok=True)
            with lock_folder(beside.parent, _OUTPUT_IN_USE, wait=_LOCK_SECONDS):
                _restore_replaced(target)
                check_free(folder, replaceable=replaceable)
                if _remove_abandoned(beside.parent, _prefix(target)):
                    raise UserError(f"{folder}: {_OUTPUT_IN_USE}")
                temporary = _create_temporary(beside, stack, folder=True)
            yield temporary
            with lock_folder(beside.parent, _OUTPUT_IN_USE, wait=_LOCK_SECONDS):
                check_free(folder, replaceable=replaceable)  # others may have written there in the meantime
                (_move_up if inside else _swap)(temporary, target, replaceable)
        except OSError as error:
            if error.filename is not None and not Path(str(error.filename)).is_relative_to(target.parent):
                raise  # the block read something else
            raise UserError(f"{folder}: could not be written ({error.strerror or error})") from error


def _can_be_renamed(folder: Path) -> bool:
    """Whether a folder is no mount point, and its parent may be changed."""
    if os.path.ismount(folder) or not os.access(folder.parent, os.W_OK | os.X_OK):
        return False
    try:  # a folder of the same disk that is mounted here (mount --bind, docker run -v) shows nowhere else
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return True
    return str(folder) not in {re.sub(r"\\(\d{3})", lambda m: chr(int(m[1], 8)), line.split()[4]) for line in mounts}


def _swap(temporary: Path, target: Path, replaceable: str | None) -> None:
    """Rename a temporary folder to ``target``, after what is there."""
    old = _temporary_name(target, "old")
    if not target.exists():
        temporary.rename(target)
        return
    target.rename(old)
    try:
        _check_content(old, target, replaceable)  # by now nobody writes there any more
        temporary.rename(target)
    except BaseException:
        if not target.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _restore_replaced(target: Path) -> None:
    """Give a folder its name back that a process was about to replace when it was killed; else remove what it left."""
    with suppress(OSError):
        for old in target.parent.glob(f"{glob.escape(_prefix(target))}*.old"):
            if _TEMPORARY.fullmatch(old.name) and old.is_dir():
                if target.exists():
                    shutil.rmtree(old, ignore_errors=True)
                else:
                    old.rename(target)


def _move_up(temporary: Path, target: Path, replaceable: str | None) -> None:
    """Move what is in a folder inside ``target`` to ``target``, in the place of what is there."""
    last = [replaceable] if replaceable else []
    for entry in sorted(target.iterdir(), key=lambda entry: entry.name not in last):
        if _counts(entry):
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    for entry in sorted(temporary.iterdir(), key=lambda entry: (entry.name in last, entry.name)):
        entry.rename(target / entry.name)


def check_free(folder: Path, *, replaceable: str | None = None) -> None:
    """Check that a folder may be written anew, as :func:`atomic_folder` does.

    Raises:
        UserError: it is a file, or holds files that must not be lost.
    """
    check_name(folder)
    if folder.resolve() == Path.cwd() or folder.resolve() in Path.cwd().parents:
        where = "is where you are" if folder.resolve() == Path.cwd() else "holds the folder where you are"
        raise UserError(f"{folder}: {where}; name a folder of its own")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file, but a folder is to be written; choose another name")
    if folder.is_dir():
        _check_content(folder, folder, replaceable)


def check_name(path: Path) -> None:
    """Check that the libraries below us, which take names in UTF-8 only, can open a path.

    Raises:
        UserError: it holds bytes that are not UTF-8.
    """
    try:
        str(path).encode()  # as given: a working directory of any name does no harm
    except UnicodeEncodeError:
        raise UserError(f"{path}: holds bytes that are not UTF-8, with which torch cannot open it; rename it") from None


def _check_content(folder: Path, name: Path, replaceable: str | None) -> None:
    """Check that what a folder holds may be lost; errors call it ``name``."""
    try:
        entries = [entry.name for entry in folder.iterdir() if _counts(entry)]
    except OSError as error:
        raise UserError(f"{name}: could not be read ({error.strerror or error})") from error
    if entries and replaceable is None:
        raise UserError(f"{name}: holds files already; choose another folder, or replace it with --force")
    if entries and replaceable not in entries:
        raise UserError(
            f"{name}: holds files that no export wrote ({replaceable} is missing), so --force does not replace "
            "it; choose another folder"
        )


def _counts(entry: Path) -> bool:
    """Whether an entry of a folder is content, and neither temporary nor what each disk has at its root."""
    return not _TEMPORARY.fullmatch(entry.name) and entry.name != "lost+found"


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files that killed processes left in ``folder`` and below it, and none in use."""
    for temporary in folder.rglob(".*.tmp"):
        if _TEMPORARY.fullmatch(temporary.name) and (not HAS_LOCKS or is_abandoned(temporary)):
            _remove(temporary)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8, atomically; what UTF-8 cannot hold (bytes of a file's name) is escaped."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")


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
