"""``samples.md``: completions of fixed prompts, written at each validation."""

import os
import re
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.strategies import FSDPStrategy

from tiny_lm.errors import UserError
from tiny_lm.files import atomic_path
from tiny_lm.inference import TextGenerator
from tiny_lm.locks import open_append
from tiny_lm.reading import open_regular
from tiny_lm.runs import Run
from tiny_lm.tokenizer import Tokenizer
from tiny_lm.training.config import TrainingConfig

TEMPERATURE = 0.8
SEED = 0

_LINE_LIMIT = 2**20  # bytes: memory stays small, whatever the file holds


class SampleWriter:
    """Completes the same prompts at each validation and appends them to a file, a section per step.

    The seed is the same each time and the random generator is separate: only the model changes from section to
    section, and training is not affected.
    """

    def __init__(self, run: Run, config: TrainingConfig, tokenizer: Tokenizer) -> None:
        """Complete ``sample_prompts`` with ``sample_tokens`` tokens each.

        Raises:
            UserError: the tokenizer cannot encode a prompt.
        """
        self._path = run.samples
        self._name = run.name
        self._tokenizer = tokenizer
        self._prompts = config.sample_prompts if config.sample_tokens else ()
        self._tokens = config.sample_tokens
        for prompt in self._prompts:
            tokenizer.encode(prompt)  # fail now rather than at the first validation

    def on_validation(self, trainer: pl.Trainer, module: Any, step: int, loss: float, tokens: int) -> None:
        """Append a section with the current loss and samples from the current weights.

        The model must be in evaluation mode. Only rank 0 writes; with fsdp none does, since none has all weights.
        """
        sharded = isinstance(trainer.strategy, FSDPStrategy)
        if not self._prompts or sharded or not trainer.is_global_zero:
            return
        generator = TextGenerator(module.model, self._tokenizer)
        lines = [f"## Step {step}", "", f"val loss {loss:.4f}, {tokens:,} tokens seen", ""]
        for prompt in self._prompts:
            story = generator.generate(prompt, self._tokens, temperature=TEMPERATURE, seed=SEED)
            lines += [_quote(prompt, story), ""]
        # Append: a long run's file is large. A killed run's half-written section is of a step after its checkpoint.
        text = "\n".join([*([] if self._path.exists() else [self._header()]), *lines, ""])
        try:
            with os.fdopen(open_append(self._path), "ab") as file:
                file.write(text.encode(errors="backslashreplace"))  # a name may hold bytes that are not UTF-8
        except OSError as error:
            raise UserError(f"{self._path}: could not be written ({error.strerror or error})") from error

    def _header(self) -> str:
        return (
            f"# Sample stories of {_escape(self._name)}\n\n"
            f"At each validation the model completes the same prompts (in bold) with up to {self._tokens} tokens, at\n"
            f"temperature {TEMPERATURE} with the same seed ({SEED}): only the model changes.\n"
        )


def truncate_samples(path: Path, step: int) -> None:
    """Remove the sections after ``step``, which a resumed run will write again."""
    if not path.exists():
        return
    is_kept = True
    with atomic_path(path) as temporary, open_regular(path) as before, temporary.open("wb") as after:
        while line := before.readline(_LINE_LIMIT):
            if heading := re.fullmatch(rb"## Step ([0-9]{1,18})\r?\n?", line):
                is_kept = int(heading[1]) <= step
            if is_kept and (line.endswith(b"\n") or len(line) == _LINE_LIMIT):  # else its process was killed
                after.write(line)


def _quote(prompt: str, story: str) -> str:
    """Return a completion as a Markdown block quote, verbatim, with the prompt in bold."""
    start, text = _escape(prompt), _escape(story)
    if "\n" not in prompt and prompt == prompt.strip() != "":  # otherwise Markdown shows no emphasis
        text = f"**{start}**" + text.removeprefix(start)
    return "  \n".join(f"> {line}" for line in text.split("\n"))  # two spaces keep a line break


def _escape(text: str) -> str:
    """Escape Markdown and HTML markup, and replace control characters."""
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\N{REPLACEMENT CHARACTER}", text)
    text = re.sub(r"([\\`*_\[\]<>&~|$])", r"\\\1", text)
    text = re.sub(r"^(\s*)([#+=-])", r"\1\\\2", text, flags=re.MULTILINE)  # headings and lists
    text = re.sub(r"^(\s*\d+)([.)])", r"\1\\\2", text, flags=re.MULTILINE)
    return re.sub(r"^[ \t]+", lambda match: "&nbsp;" * len(match[0]), text, flags=re.MULTILINE)  # else a code block
