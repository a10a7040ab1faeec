"""Find the files of a local data set: one file, all below a folder, or those a glob matches."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tiny_lm.dataset.config import DatasetConfig, Split
from tiny_lm.dataset.names import name_from_path, path_from_name
from tiny_lm.errors import UserError

FORMATS = (".txt", ".jsonl", ".json", ".csv", ".parquet")
_GLOB = "*?["
_SHOWN = 3  # names of skipped files


@dataclass
class FoundFiles:
    """The files of a data set, sorted, and the skipped ones: hidden, of unknown format, or duplicates."""

    files: list[Path] = field(default_factory=list)
    skipped: list[Path] = field(default_factory=list)


def find_files(config: DatasetConfig, split: Split) -> FoundFiles:
    """Return the files of ``split``.

    Raises:
        UserError: no files were found, or the two splits of ``config`` share a file.
    """
    with _as_user_error(config.name):
        root = path_from_name(config.name)
        is_folder = root.is_dir()
    if config.splits is None:
        return _find(Path(root.anchor), root)
    if not is_folder:
        name = name_from_path(root)
        raise UserError(f"{name}: not a folder, so it has no splits; remove `splits` or name the folder of the files")
    if config.splits.validation is None:
        return _find(root, root / path_from_name(config.splits.train))
    found: dict[Split, FoundFiles] = {
        "train": _find(root, root / path_from_name(config.splits.train)),
        "validation": _find(root, root / path_from_name(config.splits.validation)),
    }
    train = {os.path.realpath(file) for file in found["train"].files}
    shared = [file for file in found["validation"].files if os.path.realpath(file) in train]
    if shared:
        name = name_from_path(shared[0])
        raise UserError(f"{name}: belongs to both splits.train and splits.validation; name each file once")
    return found[split]


def _find(base: Path, path: Path) -> FoundFiles:
    """Find one file, the files below a folder, or those that a glob below ``base`` matches.

    An existing path is never treated as a glob, such as a folder ``corpus [2024]``.
    """
    with _as_user_error(path):
        if "\0" in str(path):
            raise ValueError("embedded NUL")
        if path.is_dir():
            found = _select(_below(path), path)
            what = "no supported file below this folder"
        elif path.exists() or not any(character in str(path.relative_to(base)) for character in _GLOB):
            format_of(path)
            return FoundFiles([path])
        else:
            base, pattern = literal_part(base, path)
            found = _select(_matches(base, pattern), base)
            what = "no supported file matches"
    if not found.files:
        skipped = f"; skipped {describe_skipped(found.skipped)}" if found.skipped else ""
        raise UserError(f"{name_from_path(path)}: {what} ({_supported()}){skipped}")
    return found


def literal_part(base: Path, path: Path) -> tuple[Path, Path]:
    """Split a path into its existing parent folder and the glob below it."""
    parts = list(path.relative_to(base).parts)
    while len(parts) > 1 and (base / parts[0]).is_dir():
        base /= parts.pop(0)
    return base, Path(*parts)


def _matches(base: Path, pattern: Path) -> Iterator[Path]:
    """Yield the matches of a glob; hidden folders only if the glob names one."""
    names_hidden = any(part.startswith(".") for part in pattern.parts)
    for path in base.glob(pattern.as_posix()):
        folders = path.relative_to(base).parts[:-1]
        if names_hidden or not any(part.startswith(".") for part in folders):
            yield path


def _select(paths: Iterator[Path], base: Path) -> FoundFiles:
    """Keep files of known formats, each once even if linked several times, except those written by tiny-lm."""
    found = FoundFiles()
    seen: set[tuple[int, int]] = set()
    is_output = {base: False}
    for path in sorted(paths, key=lambda path: path.as_posix()):
        is_hidden = path.name.startswith(".")  # from editors, file managers and notebooks
        if path.is_dir() and not is_hidden:
            continue
        if path.parent not in is_output:
            is_output[path.parent] = _is_output(path.parent)
        is_skipped = is_hidden or is_output[path.parent] or _extension(path) not in FORMATS
        status = None if is_skipped else path.stat()
        if status is not None and not stat.S_ISREG(status.st_mode):
            status = None  # a pipe or device, which may never end
        identity = status and (status.st_dev, status.st_ino)
        if identity is None or identity in seen:
            found.skipped.append(path)
        else:
            seen.add(identity)
            found.files.append(path)
    return found


def _is_output(folder: Path) -> bool:
    """Whether a folder has a tokenizer or token stream, which may be written below the corpus."""
    contents = ("tokenizer.json", "tokenizer.model", "train.bin")
    return (folder / "metadata.json").is_file() and any((folder / name).is_file() for name in contents)


def describe_skipped(skipped: list[Path]) -> str:
    """Return the number and first names of skipped files."""
    names = ", ".join(name_from_path(path.name) for path in skipped[:_SHOWN])
    more = ", ..." if len(skipped) > _SHOWN else ""
    return f"{len(skipped):,} other {'file' if len(skipped) == 1 else 'files'} ({names}{more})"


@contextmanager
def _as_user_error(path: Path | str) -> Iterator[None]:
    """Convert errors of file access to UserError."""
    try:
        yield
    except OSError as error:
        name = name_from_path(error.filename or str(path))
        raise UserError(f"{name}: could not be read ({error.strerror or error})") from error
    except (ValueError, RuntimeError) as error:  # RuntimeError: home directory of an unknown user
        raise UserError(f"{str(path)!r}: not a valid path or glob ({error})") from None


def _below(folder: Path) -> Iterator[Path]:
    """Yield all files and hidden folders below ``folder``, following symbolic links but visiting each folder once."""

    def stop(error: OSError) -> None:
        raise error

    seen: set[str] = set()
    for directory, folders, files in os.walk(folder, onerror=stop, followlinks=True):
        real = os.path.realpath(directory)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        yield from (Path(directory, name) for name in files)
        yield from (Path(directory, name) for name in folders if name.startswith("."))
        folders[:] = [name for name in folders if not name.startswith(".")]


def _extension(path: Path) -> str:
    plain = path.with_suffix("") if path.suffix.lower() == ".gz" else path
    return plain.suffix.lower()


def format_of(path: Path) -> str:
    """Return a file's format by its name.

    Raises:
        UserError: the format is not supported, or the file does not exist.
    """
    extension = _extension(path)
    if extension not in FORMATS:
        name = name_from_path(path)
        raise UserError(
            f"{name}: no such file or folder" if not path.exists() else f"{name}: not one of {_supported()}"
        )
    return extension


def _supported() -> str:
    return f"{', '.join(FORMATS)}, each also with .gz"
