"""Load a model from a training checkpoint, without executing anything the file may contain."""

import pickle
import re
import stat
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tiny_lm.errors import UserError
from tiny_lm.files import check_name
from tiny_lm.model.architectures import build_model
from tiny_lm.model.config import ModelConfig, model_config_from_dict
from tiny_lm.model.transformer import Transformer

CHECKPOINT_KEY = "tiny_lm"
"""Key of our metadata in a Lightning checkpoint: ``model`` (the config), ``tokenizer_hash`` and more."""

AVERAGE_KEY = "average"
"""Key of the weights' moving average, if the run keeps one; it is then what is loaded."""

_TENSOR = re.compile(r"/data/\d+$")
"""Zip members with a tensor's values."""

_MODULE_PREFIX = "model."  # CausalLMModule has the network as its attribute `model`


@dataclass(frozen=True)
class CheckpointModel:
    """A model loaded from a checkpoint."""

    model: Transformer
    config: ModelConfig
    tokenizer_hash: str
    step: int


def read_checkpoint(path: Path, *, mmap: bool = True, whole: bool = False) -> dict[str, Any]:
    """Load a tiny-lm checkpoint onto the CPU with ``weights_only=True``, which allows tensors and plain values only.

    Args:
        path: a ``.ckpt`` file written by training.
        mmap: read tensors from the file on first use; not for tensors used while the file may be replaced.
        whole: verify the whole file first, to find damage that loading would not.

    Raises:
        UserError: the file is missing, damaged, not a tiny-lm checkpoint, or contains more than weights.
    """
    _check_readable(path)
    # torch.save writes a zip file; anything else would be read as a bare pickle.
    if not _is_zip(path):
        raise UserError(f"{path}: is damaged or not a checkpoint (not a zip file as torch.save writes it)")
    check_whole(path, weights=whole)
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError:
        raise UserError(f"{path}: rejected: damaged, or contains more than weights and plain values") from None
    except Exception as error:  # a malformed pickle can raise any exception
        first_line = str(error).partition("\n")[0]
        raise UserError(f"{path}: is damaged and cannot be read ({first_line or type(error).__name__})") from None
    if not _is_ours(checkpoint):
        raise UserError(f"{path}: is not a tiny-lm checkpoint")
    return checkpoint


def _check_readable(path: Path) -> None:
    """Raise UserError unless a checkpoint is a readable file."""
    check_name(path)
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait forever
            what = "is a folder" if path.is_dir() else "is not a file"
            raise UserError(f"{path}: {what}, where a checkpoint was expected")
        with path.open("rb"):
            pass
    except FileNotFoundError:
        what = "is a link to a missing file" if path.is_symlink() else "no such checkpoint"
        raise UserError(f"{path}: {what}") from None
    except OSError as error:
        raise UserError(f"{path}: could not be read ({error.strerror or error})") from None


def _is_zip(path: Path) -> bool:
    with suppress(Exception):  # the file may only look like one
        return zipfile.is_zipfile(path)
    return False


def check_whole(path: Path, *, weights: bool = True) -> None:
    """Verify the checksums of a file written by ``torch.save``, which loading does not.

    Args:
        path: the file.
        weights: also verify the tensors' values, which are nearly all of the file.

    Raises:
        UserError: a part is missing or damaged.
    """
    try:
        with zipfile.ZipFile(path) as file:
            for part in file.infolist():
                # Compressed parts, which torch.save never writes, could expand beyond any memory.
                if part.compress_type != zipfile.ZIP_STORED:
                    raise UserError(
                        f"{path}: is damaged or was not written by tiny-lm (its part {part.filename} is compressed)"
                    )
                if (weights or not _TENSOR.search(part.filename)) and not _has_valid_checksum(file, part):
                    raise UserError(f"{path}: is damaged (wrong checksum of its part {part.filename})")
    except UserError:
        raise
    except Exception as error:  # zipfile raises many classes for malformed files
        raise UserError(f"{path}: is damaged ({error})") from None


def _has_valid_checksum(file: zipfile.ZipFile, part: zipfile.ZipInfo) -> bool:
    with file.open(part) as content:
        try:
            while content.read(2**20):
                pass
        except zipfile.BadZipFile:  # raised at the end, where the checksum is compared
            return False
    return True


def _is_ours(checkpoint: Any) -> bool:
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("global_step"), int):
        return False
    ours = checkpoint.get(CHECKPOINT_KEY)
    if not isinstance(ours, dict) or not {"model", "tokenizer_hash"} <= ours.keys():
        return False
    if not all(isinstance(ours.get(section, {}), dict) for section in ("model", "training", "data")):
        return False
    return _are_weights(checkpoint.get("state_dict")) and _are_weights(checkpoint.get(AVERAGE_KEY, {}))


def _are_weights(weights: Any) -> bool:
    return isinstance(weights, dict) and all(isinstance(weight, torch.Tensor) for weight in weights.values())


def load_checkpoint_model(path: Path, *, config: ModelConfig | None = None) -> CheckpointModel:
    """Build a checkpoint's model, on the CPU and in evaluation mode.

    Args:
        path: a ``.ckpt`` file written by training.
        config: the expected config, if any; it must equal the checkpoint's.

    Raises:
        UserError: as for :func:`read_checkpoint`, or the weights do not match the config.
    """
    checkpoint = read_checkpoint(path)
    ours = checkpoint[CHECKPOINT_KEY]
    stored = model_config_from_dict(ours["model"], source=str(path))
    if config is not None and config != stored:
        theirs, expected = config.to_dict(), stored.to_dict()
        keys = sorted(key for key in {*theirs, *expected} if theirs.get(key) != expected.get(key))
        if config.architecture != stored.architecture:
            keys = ["architecture"]  # the other differences follow from it
        differences = ", ".join(f"{key} is {expected.get(key)}, not {theirs.get(key)}" for key in keys)
        raise UserError(f"{path}: was trained with another model config: {differences}")
    model = build_model(stored)
    stored_weights = checkpoint.get(AVERAGE_KEY, checkpoint["state_dict"])
    weights = {key.removeprefix(_MODULE_PREFIX): value for key, value in stored_weights.items()}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        problem = " ".join(str(error).split())
        raise UserError(f"{path}: its weights do not match its config ({problem[:200]})") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return CheckpointModel(model.eval(), stored, ours["tokenizer_hash"], int(checkpoint["global_step"]))
