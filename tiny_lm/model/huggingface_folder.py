"""Our model out of a folder in Hugging Face's layout: ``config.json`` and safetensors, nothing pickled."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiny_lm.config import shorten
from tiny_lm.errors import UserError
from tiny_lm.model.config import ModelConfig
from tiny_lm.model.huggingface import from_huggingface_config
from tiny_lm.model.huggingface_weights import from_huggingface_state
from tiny_lm.model.transformer import Transformer, build_model
from tiny_lm.reading import read_json

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def load_huggingface_model(
    folder: Path, *, dtype: torch.dtype | None = torch.float32
) -> tuple[Transformer, ModelConfig]:
    """Load a model that we exported, or any of the four classes that computes what ours does.

    Args:
        folder: holds ``config.json`` and ``model.safetensors``, or an index and its shards.
        dtype: what the weights become; None leaves them as they are stored.

    Returns:
        the model, on the CPU and in evaluation mode, and its config. Biases of q, k and v that are all zero are left
        out of both, as the exporter added them.

    Raises:
        UserError: a file is missing or damaged, the class is not one of ours, or the weights do not fit the config.
    """
    config = read_huggingface_config(folder)
    state = read_safetensors(folder)
    source = str(folder / WEIGHTS_FILE)
    ours = from_huggingface_state(config, state, source=source)
    config, ours = _without_zero_biases(config, ours)
    for name, tensor in ours.items():
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{source}: {name} holds NaN or infinity, so this model is broken; export a sound one")
    model = build_model(config)
    model.load_state_dict({name: tensor.to(dtype=dtype) for name, tensor in ours.items()}, assign=True)
    return model.eval(), config


def read_huggingface_config(folder: Path) -> ModelConfig:
    """Read ``config.json`` as the config of our model.

    Raises:
        UserError: as :func:`load_huggingface_model`.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"{folder}: holds no model in Hugging Face's layout (config.json is missing)")
    content = read_json(file)
    if not isinstance(content, dict):
        raise UserError(f"{file}: must hold keys and values, but holds {shorten(content)}")
    return from_huggingface_config(content, source=str(file))


def _without_zero_biases(config: ModelConfig, state: Mapping[str, Tensor]) -> tuple[ModelConfig, dict[str, Tensor]]:
    names = {name for name in state if name.endswith((".W_q.bias", ".W_k.bias", ".W_v.bias"))}
    if not names or any(bool(state[name].any()) for name in names):
        return config, dict(state)
    rest = {name: tensor for name, tensor in state.items() if name not in names}
    return dataclasses.replace(config, qkv_bias=False), rest


def read_safetensors(folder: Path) -> dict[str, Tensor]:
    """Read the weights of a folder from its one file or from all its shards.

    Raises:
        UserError: there are none, or a file is missing or damaged.
    """
    if (folder / WEIGHTS_FILE).is_file():
        return _read_file(folder / WEIGHTS_FILE)
    index = folder / INDEX_FILE
    if not index.is_file():
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt"))
        hint = "; pickled weights are not read: save them again with safetensors" if pickled else ""
        raise UserError(f"{folder}: holds no weights ({WEIGHTS_FILE} is missing){hint}")
    content = read_json(index)
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        raise UserError(f"{index}: has no weight_map of tensors and files")
    state: dict[str, Tensor] = {}
    for place in sorted(set(places.values())):
        if Path(place).name != place or "\0" in place:
            raise UserError(f"{index}: {shorten(place)} leads out of the folder")
        if len(place.encode(errors="replace")) > 255:
            raise UserError(f"{index}: {shorten(place)} is too long for the name of a file")
        state |= _read_file(folder / place)
    missing = sorted(places.keys() - state.keys())
    if missing:
        raise UserError(f"{index}: the tensor {shorten(missing[0])} is not in {places[missing[0]]}")
    return state


def _first_line(error: Exception) -> str:
    """Return the beginning of a message, which may quote as much of a damaged file as there is."""
    line = str(error).partition("\n")[0]
    return line if len(line) <= 200 else f"{line[:200]}..."


def _read_file(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state: dict[str, Any] = load_file(file)
    except FileNotFoundError:
        raise UserError(f"{file}: no such file, though the index names it") from None
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise UserError(f"{file}: is damaged or not a safetensors file ({_first_line(error)})") from None
    return state
