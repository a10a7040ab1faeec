"""Checkpoint files: written whole or not at all, read without executing anything."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO

from tiny_lm.errors import UserError
from tiny_lm.files import atomic_path
from tiny_lm.model.checkpoint import check_whole, read_checkpoint


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints whole or not at all and reads them without executing anything."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write ``checkpoint`` through a temporary file, which gets its name when it has been read back whole.

        Raises:
            UserError: it could not be written, or what stands there is not what was written.
        """
        with atomic_path(Path(path)) as temporary:
            _save(checkpoint, temporary)
            try:
                check_whole(temporary)
            except UserError as error:
                raise UserError(
                    f"{path}: was not read back as it was written: is the disk failing? ({error})"
                ) from None

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint into memory."""
        return read_checkpoint(Path(path), mmap=False)  # it is about to be replaced by the next one


def _save(checkpoint: dict[str, Any], path: Path) -> None:
    """Write ``checkpoint``; where the disk refuses, its own error is raised.

    torch closes its archive then too, fails at that, and raises what it found wrong there.
    """
    try:
        with path.open("wb") as file:
            torch.save(checkpoint, file)
    except RuntimeError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        raise cause or error from None


def link(source: Path, target: Path) -> None:
    """Give ``source`` the second name ``target``, atomically."""
    if target.is_file() and target.samefile(source):
        return
    with atomic_path(target) as temporary:
        # A killed process of this number may have left one: to copy into it would be to overwrite another checkpoint.
        temporary.unlink(missing_ok=True)
        try:
            os.link(source, temporary)
        except OSError:  # a file system without hard links
            shutil.copyfile(source, temporary)
