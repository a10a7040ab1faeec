"""``samples.md``: what the model in training tells at each validation."""

import re
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.strategies import FSDPStrategy

from tiny_lm.files import write_text
from tiny_lm.inference import TextGenerator
from tiny_lm.reading import read_text
from tiny_lm.runs import Run
from tiny_lm.tokenizer import Tokenizer
from tiny_lm.training.config import TrainingConfig

TEMPERATURE = 0.8
SEED = 0


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
        before = read_text(self._path, errors="replace") if self._path.exists() else self._header()
        write_text(self._path, before.rstrip("\n") + "\n\n" + "\n".join(lines))

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
    text = read_text(path, errors="replace")
    header, *sections = re.split(r"^(?=## Step [0-9]{1,18}$)", text, flags=re.MULTILINE)
    kept = [section for section in sections if int(section.split(maxsplit=3)[2]) <= step]
    write_text(path, "".join([header, *kept]))


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
