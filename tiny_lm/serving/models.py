"""Which models are served, and under which names."""

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
    """A model with the loop that works for it.

    Attributes:
        name: what requests call it.
        generator: the model and its tokenizer.
        loop: takes requests for it.
        template: how messages become its prompt; None for a model that was trained on stories only.
        created: when its weights were written, in seconds since 1970.
        digest: SHA-256 (hex) of its weights.
    """

    name: str
    generator: TextGenerator
    loop: Scheduler
    template: ChatTemplate | None
    created: int
    digest: str

    @property
    def context_length(self) -> int:
        """Most tokens that the model sees at once."""
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
        """Memory of the weights."""
        return sum(parameter.nbytes for parameter in self.generator.model.parameters())


def find_models(words: Sequence[str]) -> dict[str, Path]:
    """Return the models that ``words`` mean, by name.

    Args:
        words: each a run folder, a checkpoint inside one, a folder in Hugging Face's layout, or a folder of such; a
            model has the name of its folder, and ``NAME=PATH`` gives it another.

    Raises:
        UserError: a word means no model, or two models have one name.
    """
    found: dict[str, Path] = {}
    for word in words:
        for name, path in _models_of(word):
            if name in found and found[name].resolve() != path.resolve():
                raise UserError(
                    f"{found[name]} and {path} are both named {name!r}: give one of them another name, "
                    f"as in other={path}"
                )
            found[name] = path
    return found


def _models_of(word: str) -> list[tuple[str, Path]]:
    name, equals, rest = word.partition("=")
    named = bool(equals) and not Path(word).exists()
    path = Path(rest if named else word)
    if named and not (name and name == name.strip() and name.isprintable()):
        raise UserError(f"{word}: {name!r} is no name of a model")
    if path.is_file() or _is_model(path):
        return [(name if named else _name_of(path), path)]
    if not path.is_dir():
        raise UserError(f"{path}: no such run, checkpoint or exported folder{nearest(str(path), _runs_beside(path))}")
    inside = [child for child in sorted(path.iterdir()) if _is_model(child)]
    if not inside:
        raise UserError(f"{path}: is no trained run and no exported folder, and holds none")
    if named:
        raise UserError(f"{word}: {path} holds {len(inside)} models, which cannot all be named {name!r}")
    return [(child.name, child) for child in inside]


def _is_model(path: Path) -> bool:
    """Return whether a folder is a run that has a checkpoint, or is in Hugging Face's layout."""
    is_export = (path / "config.json").is_file() and any(path.glob("*.safetensors"))
    return is_export or ((path / "run.json").is_file() and any((path / "checkpoints").glob("*.ckpt")))


def _name_of(path: Path) -> str:
    path = path.resolve()
    if path.suffix == ".ckpt":
        return f"{run_folder_of(path).name}-{path.stem}"
    return path.parent.name if path.is_file() else path.name


def _runs_beside(path: Path) -> list[str]:
    folder = path.parent
    return [str(child) for child in folder.iterdir() if _is_model(child)] if folder.is_dir() else []


def load_model(name: str, path: Path, limits: Limits, *, device: str | None = None) -> ServedModel:
    """Load a model; its loop is not yet started.

    Raises:
        UserError: it is damaged, or its chat template is.
    """
    generator = run_in_thread(TextGenerator.from_path, path, device=device)
    loop = Scheduler(generator, slots=limits.slots, queue=limits.queue)
    template = load_chat_template(_template_folder(path), generator.tokenizer)
    return ServedModel(name, generator, loop, template, int(_written(path)), run_in_thread(_digest, generator.model))


def _digest(model: Transformer) -> str:
    digest = hashlib.sha256()
    for weight in model.state_dict().values():
        digest.update(weight.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def _cache_bytes(model: Transformer) -> int:
    """Return the bytes of a text's keys and values, by numbers alone: only the loop's thread may make tensors."""
    config = model.config
    numbers = 2 * config.n_layers * config.kv_heads * config.head_size * config.context_length
    return numbers * model.token_emb.weight.element_size()


def check_memory(models: Sequence[ServedModel], limits: Limits) -> int:
    """Return the bytes that the keys and values of all texts at once take, which each model takes at its first request.

    Raises:
        UserError: they are more than is free.
    """
    taken = limits.slots * sum(_cache_bytes(model.generator.model) for model in models)
    try:
        free = free_memory(cast(Device, models[0].generator.model.token_emb.weight.device.type))
    except UserError:  # this system does not tell
        return taken
    if taken > free:
        raise UserError(
            f"keys and values of {limits.slots} texts at once take {taken / 2**20:,.0f} MiB, and "
            f"{free / 2**20:,.0f} are free: choose fewer --slots"
        )
    return taken


def _template_folder(path: Path) -> Path:
    """Return the folder in which a model's tokenizer lies."""
    if path.suffix == ".ckpt":
        return Run(run_folder_of(path)).tokenizer
    folder = path.parent if path.is_file() else path
    return folder if (folder / "config.json").is_file() else Run(folder).tokenizer


def _written(path: Path) -> float:
    """Return when the weights of a model were written."""
    if path.is_file():
        return path.stat().st_mtime
    is_export = (path / "config.json").is_file()
    files = list(path.glob("*.safetensors")) if is_export else [Run(path).model_checkpoint()]
    return max(file.stat().st_mtime for file in files)
