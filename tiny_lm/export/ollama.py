"""A folder for Ollama: GGUF files, each with a Modelfile; and, where Ollama is installed, the model made from them."""

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
from tiny_lm.export.source import Source
from tiny_lm.export.verify import PROMPTS, OwnEngine, perplexity
from tiny_lm.reading import read_text

_CREATE_SECONDS = 600.0
_RUN_SECONDS = 300.0
_LONGEST_NAME = 80


@dataclass(frozen=True)
class OllamaModel:
    """A model as Ollama is to know it.

    Attributes:
        name: such as ``tiny`` or ``tiny:q8_0``.
        modelfile: its Modelfile.
    """

    name: str
    modelfile: Path

    @property
    def commands(self) -> list[list[str]]:
        """The two commands that make it and run it."""
        return [
            ["ollama", "create", self.name, "-f", str(self.modelfile)],
            ["ollama", "run", self.name, PROMPTS[0]],
        ]


def export_ollama(
    source: Source,
    folder: Path,
    kinds: Sequence[str],
    *,
    name: str | None = None,
    license_text: str = NO_LICENSE,
    force: bool = False,
    tell: Callable[[str], None] = lambda line: None,
) -> tuple[list[GGUFFile], list[OllamaModel]]:
    """Write GGUF files, checked in llama.cpp, and a Modelfile for each.

    The first type has the plain name and ``Modelfile``; each further one is a tag, with ``Modelfile.TYPE``.

    Args:
        source: what to export.
        folder: to write.
        kinds: types of GGUF files, such as ``F16`` or ``Q4_K_M``.
        name: of the model in Ollama; None: the run's.
        license_text: of the model.
        force: replace an earlier export.
        tell: gets lines on what is about to happen.

    Returns:
        the files as :func:`export_gguf` gives them, and the models.

    Raises:
        UserError: as :func:`export_gguf` says, or a name is none for Ollama.
    """
    kinds = check_kinds(kinds)
    name = ollama_name(source.name) if name is None else check_name(name)
    models = [
        OllamaModel(f"{name}:{kind.lower()}" if place else name, folder / f"Modelfile{f'.{kind}' if place else ''}")
        for place, kind in enumerate(kinds)
    ]
    texts = {
        model.modelfile.name: modelfile(source, file_name(source, kind), license_text=license_text)
        for model, kind in zip(models, kinds, strict=True)
    }
    return export_gguf(source, folder, kinds, form="ollama", beside=texts, force=force, tell=tell), models


def ollama_name(name: str) -> str:
    """Make a name that Ollama takes: letters, digits and ``._-`` only."""
    plain = re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-._")
    return plain[:_LONGEST_NAME] or "tiny-lm"


def check_name(name: str) -> str:
    """Return ``name`` if Ollama takes it.

    Raises:
        UserError: it does not.
    """
    if not re.fullmatch(rf"[A-Za-z0-9_][A-Za-z0-9._-]{{0,{_LONGEST_NAME - 1}}}", name):
        raise UserError(f"--name {name}: Ollama takes letters, digits, '.', '_' and '-', and no sign first")
    return name


def read_license(value: str | None) -> str:
    """Return the text of a license: of the file that ``value`` names, else ``value`` itself, such as ``MIT``.

    Raises:
        UserError: it looks like a file, but there is none.
    """
    if not value:
        return NO_LICENSE
    if Path(value).is_file():
        return read_text(Path(value), limit=2**20).strip()
    if "/" in value or value.endswith((".txt", ".md")):
        raise UserError(f"--license {value}: there is no such file")
    return value.strip()


# --- with Ollama itself ----------------------------------------------------------------------------------------------


def find_ollama() -> str:
    """Return the path of the program ``ollama``.

    Raises:
        UserError: it is not installed.
    """
    found = shutil.which("ollama")
    if found is None:
        raise UserError("--create needs Ollama, but there is no `ollama` on the PATH: install it, or leave it out")
    return found


def create_model(source: Source, model: OllamaModel) -> str:
    """Make the model in Ollama, let it continue a prompt, and check that our model would say such a thing.

    Args:
        source: what was exported.
        model: to make.

    Returns:
        the continuation.

    Raises:
        UserError: Ollama is not installed or does not run, or what comes out is not from this model.
    """
    program = find_ollama()
    create, run = ([program, *command[1:]] for command in model.commands)
    _run(create, _CREATE_SECONDS)
    text = _run(run, _RUN_SECONDS)
    surprise, limit = continuation_surprise(source, run[-1], text), garbled_from(source)
    if not surprise <= limit:
        raise UserError(
            f"ollama run {model.name}: the answer is not from this model ({surprise:.1f} nats a token, which may be "
            f"{limit:.1f}): {text[:60]!r}"
        )
    return text


def continuation_surprise(source: Source, prompt: str, text: str) -> float:
    """Return the mean of -log p that our model gives the tokens of a continuation, in nats; infinite for none."""
    begin = source.tokenizer.encode(prompt, bos=True)
    ids = [*begin, *source.tokenizer.encode(text)][: source.config.context_length]
    if len(ids) <= len(begin):
        return math.inf
    found = OwnEngine(source).log_probabilities(ids)[len(begin) - 1 : -1]
    return -float(found.gather(1, torch.tensor(ids[len(begin) :])[:, None]).mean())


def garbled_from(source: Source) -> float:
    """Return the surprise, in nats, half-way from validation text to tokens drawn blindly."""
    return (math.log(perplexity(source, OwnEngine(source))) + math.log(source.config.vocab_size)) / 2


def _run(command: list[str], seconds: float) -> str:
    shown = " ".join(["ollama", *command[1:3]])
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        raise UserError(f"{shown}: gave no answer within {seconds:.0f} seconds") from None
    except OSError as error:
        raise UserError(f"{shown}: could not be started ({error.strerror or error})") from error
    if done.returncode:
        reason = (done.stderr or done.stdout).decode("utf-8", errors="replace").strip().split("\n")[-1]
        raise UserError(f"{shown}: {reason or f'exit code {done.returncode}'}")
    return done.stdout.decode("utf-8", errors="replace").rstrip()
