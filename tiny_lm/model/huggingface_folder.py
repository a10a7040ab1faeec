"""Load a model from a folder in Hugging Face layout: ``config.json`` and safetensors, nothing pickled."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiny_lm.config import shorten
from tiny_lm.errors import UserError
from tiny_lm.model.architectures import build_model
from tiny_lm.model.config import ModelConfig
from tiny_lm.model.huggingface import from_huggingface_config
from tiny_lm.model.huggingface_weights import from_huggingface_state
from tiny_lm.model.transformer import Transformer
from tiny_lm.reading import read_json

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def load_huggingface_model(
    folder: Path, *, dtype: torch.dtype | None = torch.float32
) -> tuple[Transformer, ModelConfig]:
    """Load one of our exports, or any model of the four equivalent classes.

    Args:
        folder: has ``config.json`` and ``model.safetensors``, or an index and its shards.
        dtype: dtype of the weights; None: as stored.

    Returns:
        the model, on the CPU and in evaluation mode, and its config. Biases of q, k and v that are all zero are removed
        from both, since the exporter adds them.

    Raises:
        UserError: a file is missing or damaged, the class is not supported, or the weights do not match the config.
    """
    config = read_huggingface_config(folder)
    state = read_safetensors(folder)
    source = str(folder / WEIGHTS_FILE)
    ours = from_huggingface_state(config, state, source=source)
    config, ours = _without_zero_biases(config, ours)
    for name, tensor in ours.items():
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{source}: {name} contains NaN or infinity: the model is broken; use another checkpoint")
    model = build_model(config)
    model.load_state_dict({name: tensor.to(dtype=dtype) for name, tensor in ours.items()}, assign=True)
    return model.eval(), config


def read_huggingface_config(folder: Path) -> ModelConfig:
    """Read ``config.json`` as one of our model configs.

    Raises:
        UserError: as for :func:`load_huggingface_model`.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"{folder}: not a model in Hugging Face layout (config.json is missing)")
    content = read_json(file)
    if not isinstance(content, dict):
        raise UserError(f"{file}: must be a mapping, but is {shorten(content)}")
    return from_huggingface_config(content, source=str(file))


def _without_zero_biases(config: ModelConfig, state: Mapping[str, Tensor]) -> tuple[ModelConfig, dict[str, Tensor]]:
    names = {name for name in state if name.endswith((".W_q.bias", ".W_k.bias", ".W_v.bias"))}
    if not names or any(bool(state[name].any()) for name in names):
        return config, dict(state)
    rest = {name: tensor for name, tensor in state.items() if name not in names}
    return dataclasses.replace(config, qkv_bias=False), rest


def read_safetensors(folder: Path) -> dict[str, Tensor]:
    """Read a folder's weights from its single file or from all shards.

    Raises:
        UserError: a file is missing or damaged.
    """
    if (folder / WEIGHTS_FILE).is_file():
        return _read_file(folder / WEIGHTS_FILE)
    index = folder / INDEX_FILE
    if not index.is_file():
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt"))
        hint = "; pickled weights are not supported: save them with safetensors" if pickled else ""
        raise UserError(f"{folder}: has no weights ({WEIGHTS_FILE} is missing){hint}")
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(f"{index}: has no weight_map from tensors to files")
    state: dict[str, Tensor] = {}
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name or "\0" in name:
            raise UserError(f"{index}: {shorten(name)} is outside the folder")
        if len(name.encode(errors="replace")) > 255:
            raise UserError(f"{index}: {shorten(name)} is too long for a file name")
        state |= _read_file(folder / name)
    missing = sorted(weight_map.keys() - state.keys())
    if missing:
        raise UserError(f"{index}: the tensor {shorten(missing[0])} is not in {weight_map[missing[0]]}")
    return state


def _first_line(error: Exception) -> str:
    """Return a message's first line, truncated: it may quote much of a damaged file."""
    line = str(error).partition("\n")[0]
    return line if len(line) <= 200 else f"{line[:200]}..."


def _read_file(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state: dict[str, Any] = load_file(file)
    except FileNotFoundError:
        raise UserError(f"{file}: missing, though the index lists it") from None
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise UserError(f"{file}: is damaged or not a safetensors file ({_first_line(error)})") from None
    return state
