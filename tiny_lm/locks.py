"""Locks on folders in use: shared for readers, exclusive for a writer.

A folder is locked through its own descriptor (``flock``): this needs neither a lock file nor write permission, and the
system releases it when the process ends. Forked children close their copies, so that they do not hold the lock of a
killed parent. On a network disk such a lock holds between the processes of one machine; :func:`lock_file` holds between
machines. Where locks are not supported (such as on Windows), nothing is locked.
"""

import errno
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tiny_lm.errors import UserError

try:
    import fcntl

    HAS_LOCKS = True
except ImportError:  # Windows
    HAS_LOCKS = False

_BUSY = (errno.EACCES, errno.EAGAIN)
_NO_FOLLOW: int = getattr(os, "O_NOFOLLOW", 0)
_NO_BLOCK: int = getattr(os, "O_NONBLOCK", 0)  # opening a pipe in place of a file must not block

_descriptors: set[int] = set()  # open and locked by this process
_exclusive: set[tuple[int, int]] = set()  # folders locked exclusively, by device and inode
_locked_files: dict[tuple[int, int], list[int]] = {}  # descriptors of locked files, by device and inode


def _close_after_fork() -> None:
    """Close the locked descriptors in a forked child, which would otherwise hold the locks."""
    for descriptor in _descriptors:
        with suppress(OSError):
            os.close(descriptor)
    _descriptors.clear()
    _exclusive.clear()
    _locked_files.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_after_fork)


@contextmanager
def lock_folder(
    folder: Path, in_use: str, *, shared: bool = False, wait: float = 0.0, create: bool = False
) -> Iterator[None]:
    """Lock a folder while the block runs. A process that holds it exclusively may lock it again.

    Args:
        folder: what to lock.
        in_use: error text: what another process does there, and what to do.
        shared: several processes may hold such a lock, but none beside an exclusive one.
        wait: seconds to wait for others to release it.
        create: create missing folders, and remove them at the end if they are still empty.

    Raises:
        UserError: another process holds a conflicting lock, or the folder could not be created.
    """
    created: list[Path] = []
    if create:
        created = [path for path in (folder, *folder.parents) if not path.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not folder.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
        except OSError as error:
            raise UserError(f"{folder}: could not be written ({error.strerror or error})") from error
    try:
        with _locked(folder, in_use, shared, wait):
            yield
    finally:
        with suppress(OSError):  # not empty, and neither are its parents
            for path in created:
                path.rmdir()


@contextmanager
def _locked(folder: Path, in_use: str, shared: bool, wait: float) -> Iterator[None]:
    end = time.monotonic() + wait
    while True:
        try:
            descriptor = os.open(folder, os.O_RDONLY)
        except OSError:  # no read permission, or Windows
            yield
            return
        key = _identity(os.fstat(descriptor))
        if key in _exclusive:
            os.close(descriptor)
            yield
            return
        if not try_lock(descriptor, shared=shared):
            holders = _describe_holders(descriptor)
            os.close(descriptor)
            if time.monotonic() >= end:
                raise UserError(f"{folder}: {in_use}{holders}")
            time.sleep(0.05)
        elif _is_at(folder, key):
            break
        else:  # it was renamed or removed meanwhile
            os.close(descriptor)
    with keep_open(descriptor, shared=shared):
        yield


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _is_at(path: Path, identity: tuple[int, int]) -> bool:
    try:
        return _identity(path.stat()) == identity
    except OSError:
        return False


def try_lock(descriptor: int, *, shared: bool = False) -> bool:
    """Lock an open file or folder without waiting; return False if another process holds it."""
    if not HAS_LOCKS:
        return True
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in _BUSY  # otherwise the disk does not support locks
    return True


@contextmanager
def keep_open(descriptor: int, *, shared: bool = False) -> Iterator[None]:
    """Close a locked descriptor at the end of the block, which releases its lock; forked children close it too."""
    key = _identity(os.fstat(descriptor))
    _descriptors.add(descriptor)
    if not shared:
        _exclusive.add(key)
    try:
        yield
    finally:
        if not shared:
            _exclusive.discard(key)
        if descriptor in _descriptors:  # otherwise this is a forked child
            _descriptors.discard(descriptor)
            os.close(descriptor)


def is_abandoned(path: Path) -> bool:
    """Return whether no process holds a lock on ``path``, a temporary file or folder that its writer locks."""
    if not HAS_LOCKS:
        return False
    try:
        # Opened for writing, as network disks require for an exclusive lock.
        descriptor = os.open(path, (os.O_RDONLY if path.is_dir() else os.O_RDWR) | _NO_FOLLOW | _NO_BLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # locked, or a disk without locks
        return False
    finally:
        os.close(descriptor)
    return True


@contextmanager
def lock_file(path: Path, in_use: str, *, shared: bool = False) -> Iterator[None]:
    """Lock a file, also between machines if the network disk supports it. A shared lock needs no write permission.

    A process that holds the lock may lock again. Such a lock ends when the process closes *any* descriptor of the file,
    so all are closed together, at the end of the outermost block.

    Args:
        path: the file; an exclusive lock creates it. Links are not followed.
        in_use: error text: what another process does there, and what to do.
        shared: several processes may hold such a lock; if the file is missing, nothing is locked.

    Raises:
        UserError: another process holds it, or it could not be created.
    """
    if not HAS_LOCKS:
        yield
        return
    try:
        descriptor = os.open(path, (os.O_RDONLY if shared else os.O_RDWR | os.O_CREAT) | _NO_FOLLOW | _NO_BLOCK)
    except OSError as error:
        if shared:
            yield
            return
        if error.errno == errno.ELOOP:
            raise UserError(f"{path}: is a link, which is not followed; remove it") from error
        raise UserError(f"{path.parent}: could not be written ({error.strerror or error})") from error
    key = _identity(os.fstat(descriptor))
    is_nested = key in _locked_files
    descriptors = _locked_files.setdefault(key, [])
    descriptors.append(descriptor)
    _descriptors.add(descriptor)
    try:
        if not (is_nested and shared):  # it would downgrade an exclusive lock of this process
            try:  # not flock: this lock works between machines, and belongs to the process
                fcntl.lockf(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in _BUSY:
                    raise UserError(f"{path.parent}: {in_use}") from None
        yield
    finally:
        if not is_nested and _locked_files.pop(key, None) is not None:  # otherwise this is a forked child
            for opened in descriptors:
                _descriptors.discard(opened)
                os.close(opened)


@contextmanager
def claim_file(path: Path, in_use: str) -> Iterator[bool]:
    """Create a temporary file that one process at a time may have; remove it at the end, unless it was renamed.

    What a killed process left under this name is taken over. Yields False, and creates nothing, where the system or the
    disk has no locks.

    Raises:
        UserError: ``in_use``: another process has it.
        OSError: it cannot be created, or is not a regular file of one name.
    """
    while HAS_LOCKS:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | _NO_FOLLOW | _NO_BLOCK, 0o666)
        status = os.fstat(descriptor)
        try:
            if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
                raise OSError(errno.EEXIST, "what is there is not a temporary file", str(path))
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if error.errno in _BUSY:
                raise UserError(in_use) from None
            if error.errno == errno.EEXIST:
                raise
            path.unlink(missing_ok=True)
            break
        if not _is_at(path, _identity(status)):  # the process that had it renamed or removed it in the meantime
            os.close(descriptor)
            continue
        with keep_open(descriptor):
            try:
                yield True
            finally:
                if _is_at(path, _identity(status)):
                    path.unlink()
        return
    yield False


def open_append(path: Path) -> int:
    """Return a descriptor that appends to a file, without following links.

    Raises:
        OSError: it could not be opened, or is not a regular file.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | _NO_FOLLOW | _NO_BLOCK
    descriptor = os.open(path, flags, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return descriptor


def _describe_holders(descriptor: int) -> str:
    """Describe the processes that lock an open folder, in parentheses; empty if the system does not list them."""
    inode = str(os.fstat(descriptor).st_ino)
    found = []
    with suppress(OSError):
        for line in Path("/proc/locks").read_text(encoding="ascii").splitlines():
            fields = line.split()
            if len(fields) > 5 and fields[1] == "FLOCK" and fields[5].rpartition(":")[2] == inode:
                found.append(_describe_process(fields[4]))
    return f" ({'; '.join(dict.fromkeys(found))})" if found else ""


def _describe_process(number: str) -> str:
    with suppress(OSError):
        words = Path(f"/proc/{number}/cmdline").read_text(encoding="utf-8", errors="replace").rstrip("\0").split("\0")
        if len(words) > 1 and Path(words[0]).name.startswith("python") and not words[1].startswith("-"):
            del words[0]
        command = " ".join([Path(words[0]).name, *words[1:]])
        command = "".join(character if character.isprintable() else "?" for character in command)
        return f"process {number}: {command[:80]}"
    return f"process {number}"
