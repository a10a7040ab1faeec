"""Finding and loading the models to serve."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from tiny_lm.config import nearest
from tiny_lm.errors import UserError
from tiny_lm.hardware.device import Device
from tiny_lm.hardware.memory import free_memory
from tiny_lm.inference import TextGenerator
from tiny_lm.model import Transformer
from tiny_lm.runs import Run, run_folder_of
from tiny_lm.serving.chat import ChatTemplate, load_chat_template
from tiny_lm.serving.limits import Limits
from tiny_lm.serving.scheduler import Scheduler, run_in_thread


@dataclass(frozen=True)
class ServedModel:
    """A model with its scheduler.

    Attributes:
        name: by which requests select it.
        generator: the model and its tokenizer.
        scheduler: accepts sequences for it.
        template: turns messages into a prompt; None for a model that was trained on plain text only.
        created: modification time of its weights, in seconds since 1970.
        digest: SHA-256 (hex) of its weights.
    """

    name: str
    generator: TextGenerator
    scheduler: Scheduler
    template: ChatTemplate | None
    created: int
    digest: str

    @property
    def context_length(self) -> int:
        """Maximum number of tokens that the model attends to."""
        return self.generator.model.config.context_length

    @property
    def architecture(self) -> str:
        """Family of the model, such as ``gpt2``."""
        return str(self.generator.model.config.architecture)

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(parameter.numel() for parameter in self.generator.model.parameters())

    @property
    def bytes(self) -> int:
        """Size of the weights."""
        return sum(parameter.nbytes for parameter in self.generator.model.parameters())


def find_models(arguments: Sequence[str]) -> dict[str, Path]:
    """Return the models to serve, by name.

    Args:
        arguments: run folders, checkpoints inside one, folders in Hugging Face's layout, or folders of these; a model
            is named after its folder, or by ``NAME=PATH``.

    Raises:
        UserError: a model does not exist, or two models have the same name.
    """
    found: dict[str, Path] = {}
    for argument in arguments:
        for name, path in _models_of(argument):
            if name in found and found[name].resolve() != path.resolve():
                raise UserError(
                    f"{found[name]} and {path} are both named {name!r}: give one of them another name, "
                    f"as in other={path}"
                )
            found[name] = path
    return found


def _models_of(argument: str) -> list[tuple[str, Path]]:
    name, equals, rest = argument.partition("=")
    named = bool(equals) and not Path(argument).exists()
    path = Path(rest if named else argument)
    if named and not (name and name == name.strip() and name.isprintable()):
        raise UserError(f"{argument}: {name!r} is not a valid name of a model")
    if path.is_file() or _is_model(path):
        return [(name if named else _name_of(path), path)]
    if not path.is_dir():
        raise UserError(
            f"{path}: no such run, checkpoint or exported folder{nearest(str(path), _sibling_models(path))}"
        )
    inside = [child for child in sorted(path.iterdir()) if _is_model(child)]
    if not inside:
        raise UserError(f"{path}: is neither a trained run nor an exported folder, and contains none")
    if named:
        raise UserError(f"{argument}: {path} contains {len(inside)} models, which cannot all be named {name!r}")
    return [(child.name, child) for child in inside]


def _is_model(path: Path) -> bool:
    """Return whether a folder is a run with a checkpoint, or in Hugging Face's layout."""
    is_export = (path / "config.json").is_file() and any(path.glob("*.safetensors"))
    return is_export or ((path / "run.json").is_file() and any((path / "checkpoints").glob("*.ckpt")))


def _name_of(path: Path) -> str:
    path = path.resolve()
    if path.suffix == ".ckpt":
        return f"{run_folder_of(path).name}-{path.stem}"
    return path.parent.name if path.is_file() else path.name


def _sibling_models(path: Path) -> list[str]:
    folder = path.parent
    return [str(child) for child in folder.iterdir() if _is_model(child)] if folder.is_dir() else []


def load_model(name: str, path: Path, limits: Limits, *, device: str | None = None) -> ServedModel:
    """Load a model; its scheduler is not started yet.

    Raises:
        UserError: the model or its chat template is damaged.
    """
    generator = run_in_thread(TextGenerator.from_path, path, device=device)
    scheduler = Scheduler(generator, slots=limits.slots, queue=limits.queue)
    template = load_chat_template(_template_folder(path), generator.tokenizer)
    return ServedModel(
        name, generator, scheduler, template, int(_modified_at(path)), run_in_thread(_digest, generator.model)
    )


def _digest(model: Transformer) -> str:
    digest = hashlib.sha256()
    for weight in model.state_dict().values():
        digest.update(weight.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def _cache_bytes(model: Transformer) -> int:
    """Return the bytes of the KV cache of one slot, without tensors: only the scheduler's thread may compute."""
    config = model.config
    num_values = 2 * config.n_layers * config.kv_heads * config.head_size * config.context_length
    return num_values * model.token_emb.weight.element_size()


def check_memory(models: Sequence[ServedModel], limits: Limits) -> int:
    """Return the bytes of all KV caches, which each model allocates at its first request.

    Raises:
        UserError: they exceed the free memory.
    """
    needed = limits.slots * sum(_cache_bytes(model.generator.model) for model in models)
    try:
        free = free_memory(cast(Device, models[0].generator.model.token_emb.weight.device.type))
    except UserError:  # unknown on this system
        return needed
    if needed > free:
        raise UserError(
            f"the KV caches of {limits.slots} slots take {needed / 2**20:,.0f} MiB, and "
            f"{free / 2**20:,.0f} are free: choose fewer --slots"
        )
    return needed


def _template_folder(path: Path) -> Path:
    """Return the folder of a model's tokenizer."""
    if path.suffix == ".ckpt":
        return Run(run_folder_of(path)).tokenizer
    folder = path.parent if path.is_file() else path
    return folder if (folder / "config.json").is_file() else Run(folder).tokenizer


def _modified_at(path: Path) -> float:
    """Return the modification time of a model's weights."""
    if path.is_file():
        return path.stat().st_mtime
    is_export = (path / "config.json").is_file()
    files = list(path.glob("*.safetensors")) if is_export else [Run(path).model_checkpoint()]
    return max(file.stat().st_mtime for file in files)
