"""Atomic writes of files and folders."""

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

_LOCK_SECONDS = 10.0  # a rename is instant, but the disk may be slow

_OUTPUT_IN_USE = "another process is writing there; wait until it has finished, or choose another name"

_NOT_IN_JSON_TEXT = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff]")
"""What :func:`to_json` escapes besides what JSON itself requires: characters that end a line for Unicode but not for
JSON, control characters that a terminal acts on, and lone surrogates, which UTF-8 cannot encode."""


@contextmanager
def atomic_path(path: Path, *, exclusive: bool = False) -> Iterator[Path]:
    """Yield a temporary file beside ``path``; rename it to ``path`` when the block ends without an exception.

    The file is synced to disk before the rename, so a reader (or a machine that loses power) sees the old file or the
    complete new one. If the block raises, the temporary file is removed and ``path`` is unchanged. It is locked while
    the block runs, so that the next writer of ``path`` recognizes and removes one that a killed process left.

    Args:
        path: the file to write.
        exclusive: fail if another process writes ``path`` exclusively; otherwise the last one wins.

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
            # None: a write to an open file on a full disk.
            ours = {None, str(temporary), str(path), *map(str, path.parents)}
            if error.filename not in ours and not str(error.filename).startswith(str(path.parent / _prefix(path))):
                raise  # from something else in the block
            raise UserError(f"{path}: could not be written ({error.strerror or error})") from error


@contextmanager
def scratch_folder(folder: Path | None = None, *, name: str = "scratch") -> Iterator[Path]:
    """Yield a temporary folder that only the user may read; it is removed at the end.

    It is created in ``folder``, by default the system's folder for temporary files. ``name`` is part of its name; those
    of the same name that killed processes left are removed first.

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
    """Turn an OSError of the block into a UserError that names ``path``, the final name of the file."""
    try:
        yield
    except OSError as error:
        if error.filename is not None and path.name not in str(error.filename):
            raise  # from something else in the block
        raise UserError(f"{path}: could not be written ({error.strerror or error})") from error


def _prefix(path: Path) -> str:
    return f".{path.name[:60]}."  # short enough for the maximum length of a name


def _temporary_name(path: Path, suffix: str = "tmp") -> Path:
    """Return a random name beside ``path``. A process id would not be unique: in containers all are 1."""
    return path.with_name(f"{_prefix(path)}{secrets.randbelow(10**12)}.{suffix}")


def _create_temporary(path: Path, stack: ExitStack, *, folder: bool = False) -> Path:
    """Create a temporary file or folder beside ``path`` and lock it; ``stack`` releases and removes it."""
    while True:
        temporary = _temporary_name(path)
        if folder:
            temporary.mkdir()
        else:
            os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        if not HAS_LOCKS:  # Windows, where open files cannot be renamed
            stack.callback(_remove, temporary)
            return temporary
        descriptor = os.open(temporary, os.O_RDONLY if folder else os.O_RDWR)
        if try_lock(descriptor) and temporary.exists():
            stack.callback(_remove, temporary)
            stack.enter_context(keep_open(descriptor))
            return temporary
        os.close(descriptor)  # another process removed it before it was locked


def _claim_temporary(path: Path, stack: ExitStack) -> Path:
    """Create a temporary file under the same name for all writers of ``path``.

    Raises:
        UserError: another process holds it.
    """
    temporary = path.with_name(f"{_prefix(path)}0.tmp")
    claimed = stack.enter_context(claim_file(temporary, f"{path}: {_OUTPUT_IN_USE}"))
    return temporary if claimed else _create_temporary(path, stack)


def _remove(path: Path) -> None:
    """Remove a temporary file or folder, ignoring errors: an earlier one matters more."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _remove_abandoned(folder: Path, prefix: str) -> bool:
    """Remove the unlocked temporary files and folders of this prefix; return whether any is locked."""
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
    """Open a file that the user named for writing, atomically if it is a regular file.

    ``-`` and ``/dev/stdout`` are standard output; a pipe or a device is written directly. The target of a link is
    replaced, not the link.

    Raises:
        UserError: it cannot be written, or another process is writing it.
    """
    try:
        if is_stdout(path):
            sys.stdout.flush()
            yield sys.stdout.buffer
            print_result(end="")  # ends the command if nobody reads it
        elif path.is_dir():
            raise UserError(f"{path}: is a folder, not a file; choose another name")
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
    """Return whether a path that the user named is standard output."""
    return str(path) in ("-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")


@contextmanager
def atomic_folder(folder: Path, *, replaceable: str | None = None) -> Iterator[Path]:
    """Yield a temporary folder; give it the name ``folder`` when the block ends without an exception.

    It is created beside ``folder``, or inside it if that is a mount point or its parent is not writable: then the files
    are moved up at the end, ``replaceable`` last. If the block raises, the temporary folder is removed and ``folder``
    is unchanged. A link to a folder stays a link.

    Args:
        folder: may exist if it is empty.
        replaceable: name of a file that marks a folder that may be replaced; None: none may be.

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
                check_free(folder, replaceable=replaceable)  # others may have written there meanwhile
                (_move_up if inside else _swap)(temporary, target, replaceable)
        except OSError as error:
            if error.filename is not None and not Path(str(error.filename)).is_relative_to(target.parent):
                raise  # from something else in the block
            raise UserError(f"{folder}: could not be written ({error.strerror or error})") from error


def _can_be_renamed(folder: Path) -> bool:
    """Return whether a folder is not a mount point and its parent is writable."""
    if os.path.ismount(folder) or not os.access(folder.parent, os.W_OK | os.X_OK):
        return False
    try:  # bind mounts of the same disk (mount --bind, docker run -v) are listed only here
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return True
    return str(folder) not in {re.sub(r"\\(\d{3})", lambda m: chr(int(m[1], 8)), line.split()[4]) for line in mounts}


def _swap(temporary: Path, target: Path, replaceable: str | None) -> None:
    """Rename a temporary folder to ``target``, replacing what exists."""
    old = _temporary_name(target, "old")
    if not target.exists():
        temporary.rename(target)
        return
    target.rename(old)
    try:
        _check_content(old, target, replaceable)  # nobody can write there any more
        temporary.rename(target)
    except BaseException:
        if not target.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _restore_replaced(target: Path) -> None:
    """Restore a folder that a killed process was about to replace; otherwise remove what it left."""
    with suppress(OSError):
        for old in target.parent.glob(f"{glob.escape(_prefix(target))}*.old"):
            if _TEMPORARY.fullmatch(old.name) and old.is_dir():
                if target.exists():
                    shutil.rmtree(old, ignore_errors=True)
                else:
                    old.rename(target)


def _move_up(temporary: Path, target: Path, replaceable: str | None) -> None:
    """Move the contents of a folder inside ``target`` up into ``target``, replacing what exists."""
    last = [replaceable] if replaceable else []
    for entry in sorted(target.iterdir(), key=lambda entry: entry.name not in last):
        if _counts(entry):
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    for entry in sorted(temporary.iterdir(), key=lambda entry: (entry.name in last, entry.name)):
        entry.rename(target / entry.name)


def check_free(folder: Path, *, replaceable: str | None = None) -> None:
    """Check that :func:`atomic_folder` may write a folder.

    Raises:
        UserError: it is a file, or holds files that must not be lost.
    """
    check_name(folder)
    if folder.resolve() == Path.cwd() or folder.resolve() in Path.cwd().parents:
        where = "is the working directory" if folder.resolve() == Path.cwd() else "contains the working directory"
        raise UserError(f"{folder}: {where}; choose another folder")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file, not a folder; choose another name")
    if folder.is_dir():
        _check_content(folder, folder, replaceable)


def check_name(path: Path) -> None:
    """Check that libraries that accept only UTF-8 paths can open a path.

    Raises:
        UserError: it is not UTF-8.
    """
    try:
        str(path).encode()  # as given: the name of the working directory does not matter
    except UnicodeEncodeError:
        raise UserError(f"{path}: holds bytes that are not UTF-8, with which torch cannot open it; rename it") from None


def _check_content(folder: Path, name: Path, replaceable: str | None) -> None:
    """Check that the contents of a folder may be replaced; errors name it ``name``."""
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
    """Return whether an entry of a folder is content, not a temporary file or ``lost+found``."""
    return not _TEMPORARY.fullmatch(entry.name) and entry.name != "lost+found"


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files that killed processes left in and below ``folder``."""
    for temporary in folder.rglob(".*.tmp"):
        if _TEMPORARY.fullmatch(temporary.name) and (not HAS_LOCKS or is_abandoned(temporary)):
            _remove(temporary)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8, atomically; lone surrogates (bytes of file names) are escaped."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Return ``value`` as JSON, on one line without ``indent``, for any definition of a line.

    ``str.splitlines`` and many HTTP clients also split at U+0085, U+2028 and U+2029, so these are escaped.

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
