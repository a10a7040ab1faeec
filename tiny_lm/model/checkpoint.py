"""Reading the model out of a training checkpoint, without executing anything that the file may hold."""

import pickle
import struct
import zipfile
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tiny_lm.errors import UserError
from tiny_lm.model.config import ModelConfig, model_config_from_dict
from tiny_lm.model.transformer import Transformer, build_model

CHECKPOINT_KEY = "tiny_lm"
"""Key of a Lightning checkpoint under which ours is kept: ``model`` (its config), ``tokenizer_hash`` and more."""

AVERAGE_KEY = "average"
"""Key of a checkpoint for the moving average of the weights, if the run keeps one; who uses the model gets that."""

_MODULE_PREFIX = "model."  # CausalLMModule holds the network as its attribute `model`


@dataclass(frozen=True)
class CheckpointModel:
    """A model as a checkpoint holds it."""

    model: Transformer
    config: ModelConfig
    tokenizer_hash: str
    step: int


def read_checkpoint(path: Path, *, mmap: bool = True, whole: bool = False) -> dict[str, Any]:
    """Read a checkpoint of ours onto the CPU with ``weights_only=True``, which admits tensors and plain values only.

    Args:
        path: a ``.ckpt`` file that training wrote.
        mmap: read tensors from the file when they are used; not for what is kept while the file may be replaced.
        whole: read the file from end to end first, to find damage that loading would not.

    Raises:
        UserError: the file is missing, damaged, no checkpoint of tiny-lm, or holds more than weights.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    # torch.save writes a zip file; anything else would be read as a bare pickle, which is not even tried.
    if not _is_zip(path):
        raise UserError(f"{path}: is damaged or no checkpoint (not a zip file as torch.save writes it)")
    if whole:
        check_whole(path)
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError:
        raise UserError(f"{path}: refused, since it is damaged or holds more than weights and values") from None
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        first_line = str(error).partition("\n")[0]
        raise UserError(f"{path}: is damaged and cannot be read ({first_line})") from None
    if not _is_ours(checkpoint):
        raise UserError(f"{path}: is no checkpoint of tiny-lm")
    return checkpoint


def _is_zip(path: Path) -> bool:
    with suppress(zipfile.BadZipFile):  # at the end it looks like one
        return zipfile.is_zipfile(path)
    return False


def check_whole(path: Path) -> None:
    """Read a file that ``torch.save`` wrote from end to end and compare its parts with their check sums.

    Loading does not: it believes what it reads.

    Raises:
        UserError: a part is missing, or another than was written.
    """
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
    except (zipfile.BadZipFile, zlib.error, struct.error, OSError, EOFError, RuntimeError, ValueError) as error:
        raise UserError(f"{path}: is damaged ({error})") from None
    if damaged is not None:
        raise UserError(f"{path}: is damaged (the check sum of its part {damaged} is another)")


def _is_ours(checkpoint: Any) -> bool:
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("global_step"), int):
        return False
    ours = checkpoint.get(CHECKPOINT_KEY)
    if not isinstance(ours, dict) or not {"model", "tokenizer_hash"} <= ours.keys():
        return False
    return _are_weights(checkpoint.get("state_dict")) and _are_weights(checkpoint.get(AVERAGE_KEY, {}))


def _are_weights(weights: Any) -> bool:
    return isinstance(weights, dict) and all(isinstance(weight, torch.Tensor) for weight in weights.values())


def load_checkpoint_model(path: Path, *, config: ModelConfig | None = None) -> CheckpointModel:
    """Build the model of a checkpoint, on the CPU and in evaluation mode.

    Args:
        path: a ``.ckpt`` file that training wrote.
        config: what the caller believes the model to be; it must equal what the checkpoint says.

    Raises:
        UserError: as :func:`read_checkpoint`, or the weights do not fit the config.
    """
    checkpoint = read_checkpoint(path)
    ours = checkpoint[CHECKPOINT_KEY]
    stored = model_config_from_dict(ours["model"], source=str(path))
    if config is not None and config != stored:
        theirs, expected = config.to_dict(), stored.to_dict()
        keys = sorted(key for key in {*theirs, *expected} if theirs.get(key) != expected.get(key))
        if config.architecture != stored.architecture:
            keys = ["architecture"]  # the rest follows from it
        differences = ", ".join(f"{key} is {expected.get(key)} and not {theirs.get(key)}" for key in keys)
        raise UserError(f"{path}: was trained with another model config: {differences}")
    model = build_model(stored)
    stored_weights = checkpoint.get(AVERAGE_KEY, checkpoint["state_dict"])
    weights = {key.removeprefix(_MODULE_PREFIX): value for key, value in stored_weights.items()}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        problem = " ".join(str(error).split())
        raise UserError(f"{path}: its weights do not fit its config ({problem[:200]})") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return CheckpointModel(model.eval(), stored, ours["tokenizer_hash"], int(checkpoint["global_step"]))
