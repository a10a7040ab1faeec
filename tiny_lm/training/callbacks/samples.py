"""``samples.md``: what the model in training tells at each validation."""

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
    """Continues the same begun stories again and again and adds them to a file, a section for each step.

    The random numbers are the same each time and its own: what changes from section to section is the model, and
    training draws what it would have drawn without them.
    """

    def __init__(self, run: Run, config: TrainingConfig, tokenizer: Tokenizer) -> None:
        """Continue ``sample_prompts`` by ``sample_tokens`` tokens.

        Raises:
            UserError: the tokenizer cannot encode a prompt.
        """
        self._path = run.samples
        self._name = run.name
        self._tokenizer = tokenizer
        self._prompts = config.sample_prompts if config.sample_tokens else ()
        self._tokens = config.sample_tokens
        for prompt in self._prompts:
            tokenizer.encode(prompt)  # better refused now than at the first validation

    def tell(self, trainer: pl.Trainer, module: Any, step: int, loss: float, tokens: int) -> None:
        """Tell the stories with the weights as they are, and add a section with the figures of this moment.

        The model must be in evaluation mode. Only the first process tells; with fsdp none, since none has all weights.
        """
        sharded = isinstance(trainer.strategy, FSDPStrategy)
        if not self._prompts or sharded or not trainer.is_global_zero:
            return
        generator = TextGenerator(module.model, self._tokenizer)
        lines = [f"## Step {step}", "", f"val loss {loss:.4f}, {tokens:,} tokens seen", ""]
        for prompt in self._prompts:
            story = generator.generate(prompt, self._tokens, temperature=TEMPERATURE, seed=SEED)
            lines += [_quote(prompt, story), ""]
        # Appended, since a long run's file is large. Half a section of a killed run is of a step after its checkpoint.
        text = "\n".join([*([] if self._path.exists() else [self._header()]), *lines, ""])
        try:
            with os.fdopen(open_append(self._path), "ab") as file:
                file.write(text.encode(errors="backslashreplace"))  # a name may hold bytes that are not UTF-8
        except OSError as error:
            raise UserError(f"{self._path}: could not be written ({error.strerror or error})") from error

    def _header(self) -> str:
        return (
            f"# Sample stories of {_escape(self._name)}\n\n"
            f"At each validation the model continues the same beginnings (in bold) by up to {self._tokens} tokens, at\n"
            f"temperature {TEMPERATURE} with the same random numbers (seed {SEED}): what changes is the model.\n"
        )


def truncate_samples(path: Path, step: int) -> None:
    """Forget the sections of steps after ``step``, which a resumed run is about to write again."""
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
    """Return a story as a Markdown block quote that shows it as it is, its beginning in bold."""
    beginning, text = _escape(prompt), _escape(story)
    if "\n" not in prompt and prompt == prompt.strip() != "":  # or Markdown sees no emphasis
        text = f"**{beginning}**" + text.removeprefix(beginning)
    return "  \n".join(f"> {line}" for line in text.split("\n"))  # two spaces keep a line break


def _escape(text: str) -> str:
    """Escape what Markdown or HTML would read as markup, and show control characters as such."""
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\N{REPLACEMENT CHARACTER}", text)
    text = re.sub(r"([\\`*_\[\]<>&~|$])", r"\\\1", text)
    text = re.sub(r"^(\s*)([#+=-])", r"\1\\\2", text, flags=re.MULTILINE)  # headings and lists
    text = re.sub(r"^(\s*\d+)([.)])", r"\1\\\2", text, flags=re.MULTILINE)
    return re.sub(r"^[ \t]+", lambda match: "&nbsp;" * len(match[0]), text, flags=re.MULTILINE)  # else a code block
