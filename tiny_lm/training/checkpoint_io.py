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
        """Write ``checkpoint`` to a temporary file, read it back, and rename it.

        Raises:
            UserError: it could not be written or read back.
        """
        with atomic_path(Path(path)) as temporary:
            _save(checkpoint, temporary)
            try:
                check_whole(temporary)
            except UserError as error:
                raise UserError(
                    f"{path}: could not be read back after writing: is the disk failing? ({error})"
                ) from None

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint into memory."""
        return read_checkpoint(Path(path), mmap=False)  # not mapped: the file will be replaced


def _save(checkpoint: dict[str, Any], path: Path) -> None:
    """Write ``checkpoint``; if the disk fails, raise its OSError, not torch's RuntimeError on closing the archive."""
    try:
        with path.open("wb") as file:
            torch.save(checkpoint, file)
    except RuntimeError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        raise cause or error from None


def link(source: Path, target: Path) -> None:
    """Hard-link ``source`` to ``target``, atomically."""
    if target.is_file() and target.samefile(source):
        return
    with atomic_path(target) as temporary:
        # A killed process may have left a hard link here: copying into it would overwrite another checkpoint.
        temporary.unlink(missing_ok=True)
        try:
            os.link(source, temporary)
        except OSError:  # a file system without hard links
            shutil.copyfile(source, temporary)
