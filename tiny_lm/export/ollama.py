"""Export for Ollama: GGUF files with Modelfiles, and optionally the model created from them."""

import math
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tiny_lm.errors import UserError
from tiny_lm.export.gguf import GGUFFile, check_kinds, export_gguf, file_name
from tiny_lm.export.modelfile import NO_LICENSE, modelfile
from tiny_lm.export.source import ExportSource
from tiny_lm.export.verify import PROMPTS, OwnEngine, perplexity
from tiny_lm.reading import read_text

_CREATE_SECONDS = 600.0
_RUN_SECONDS = 300.0
_MAX_NAME = 80


@dataclass(frozen=True)
class OllamaModel:
    """A model to create in Ollama.

    Attributes:
        name: such as ``tiny`` or ``tiny:q8_0``.
        modelfile: its Modelfile.
    """

    name: str
    modelfile: Path

    @property
    def commands(self) -> list[list[str]]:
        """The commands that create and run it."""
        return [
            ["ollama", "create", self.name, "-f", str(self.modelfile)],
            ["ollama", "run", self.name, PROMPTS[0]],
        ]


def export_ollama(
    source: ExportSource,
    folder: Path,
    kinds: Sequence[str],
    *,
    name: str | None = None,
    license_text: str = NO_LICENSE,
    force: bool = False,
    log: Callable[[str], None] = lambda line: None,
) -> tuple[list[GGUFFile], list[OllamaModel]]:
    """Write GGUF files, checked in llama.cpp, and a Modelfile for each.

    The first type gets the plain name and ``Modelfile``; each further one is a tag, with ``Modelfile.TYPE``.

    Args:
        source: what to export.
        folder: output folder.
        kinds: types of GGUF files, such as ``F16`` or ``Q4_K_M``.
        name: model name in Ollama; None: the run's.
        license_text: license of the model.
        force: replace an earlier export.
        log: called with warnings about the chosen types.

    Returns:
        the files as :func:`export_gguf` returns them, and the models.

    Raises:
        UserError: as for :func:`export_gguf`, or the name is invalid.
    """
    kinds = check_kinds(kinds)
    name = ollama_name(source.name) if name is None else check_name(name)
    models = [
        OllamaModel(f"{name}:{kind.lower()}" if index else name, folder / f"Modelfile{f'.{kind}' if index else ''}")
        for index, kind in enumerate(kinds)
    ]
    texts = {
        model.modelfile.name: modelfile(source, file_name(source, kind), license_text=license_text)
        for model, kind in zip(models, kinds, strict=True)
    }
    return export_gguf(source, folder, kinds, form="ollama", beside=texts, force=force, log=log), models


def ollama_name(name: str) -> str:
    """Convert to a valid Ollama name: letters, digits and ``._-`` only."""
    plain = re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-._")
    return plain[:_MAX_NAME] or "tiny-lm"


def check_name(name: str) -> str:
    """Return ``name`` if it is valid in Ollama, else raise UserError."""
    if not re.fullmatch(rf"[A-Za-z0-9_][A-Za-z0-9._-]{{0,{_MAX_NAME - 1}}}", name):
        raise UserError(
            f"--name {name}: Ollama allows letters, digits, '.', '_' and '-', starting with a letter, digit or '_'"
        )
    return name


def read_license(value: str | None) -> str:
    """Return a license text: the content of the file ``value``, else ``value`` itself, such as ``MIT``.

    Raises:
        UserError: ``value`` looks like the name of a missing file.
    """
    if not value:
        return NO_LICENSE
    if Path(value).is_file():
        return read_text(Path(value), limit=2**20).strip()
    if "/" in value or value.endswith((".txt", ".md")):
        raise UserError(f"--license {value}: no such file")
    return value.strip()


# --- with Ollama itself ----------------------------------------------------------------------------------------------


def find_ollama() -> str:
    """Return the path of the program ``ollama``; raise UserError if it is not installed."""
    found = shutil.which("ollama")
    if found is None:
        raise UserError("--create needs Ollama, but `ollama` is not on the PATH: install it, or omit --create")
    return found


def create_model(source: ExportSource, model: OllamaModel) -> str:
    """Create the model in Ollama, run a prompt, and check that the completion is likely under our model.

    Args:
        source: what was exported.
        model: the model to create.

    Returns:
        the completion.

    Raises:
        UserError: Ollama is not installed or does not run, or the completion is not from this model.
    """
    program = find_ollama()
    create, run = ([program, *command[1:]] for command in model.commands)
    _run(create, _CREATE_SECONDS)
    text = _run(run, _RUN_SECONDS)
    loss, limit = completion_loss(source, run[-1], text), garbled_from(source)
    if not loss <= limit:
        raise UserError(
            f"ollama run {model.name}: the answer is not from this model ({loss:.1f} nats per token, at most "
            f"{limit:.1f} expected): {text[:60]!r}"
        )
    return text


def completion_loss(source: ExportSource, prompt: str, text: str) -> float:
    """Return our model's mean loss on a completion, in nats per token; infinite if it is empty."""
    begin = source.tokenizer.encode(prompt, bos=True)
    ids = [*begin, *source.tokenizer.encode(text)][: source.config.context_length]
    if len(ids) <= len(begin):
        return math.inf
    found = OwnEngine(source).log_probabilities(ids)[len(begin) - 1 : -1]
    return -float(found.gather(1, torch.tensor(ids[len(begin) :])[:, None]).mean())


def garbled_from(source: ExportSource) -> float:
    """Return the loss, in nats, halfway between validation text and uniformly random tokens."""
    return (math.log(perplexity(source, OwnEngine(source))) + math.log(source.config.vocab_size)) / 2


def _run(command: list[str], seconds: float) -> str:
    shown = " ".join(["ollama", *command[1:3]])
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        raise UserError(f"{shown}: no response within {seconds:.0f} seconds") from None
    except OSError as error:
        raise UserError(f"{shown}: could not be started ({error.strerror or error})") from error
    if done.returncode:
        reason = (done.stderr or done.stdout).decode("utf-8", errors="replace").strip().split("\n")[-1]
        raise UserError(f"{shown}: {reason or f'exit code {done.returncode}'}")
    return done.stdout.decode("utf-8", errors="replace").rstrip()
