"""The stories that a model told in training, read back from ``samples.md``."""

import re
from dataclasses import dataclass

_SECTION = re.compile(r"^## Step (\d+)$", re.MULTILINE)
_FIGURES = re.compile(r"^val loss ([\d.]+), ([\d,]+) tokens seen$", re.MULTILINE)
_BEGINNING = re.compile(r"\*\*((?:\\.|[^*\\])*)\*\*")
_MARKUP = re.compile(r"\\(.)|&nbsp;", re.DOTALL)


@dataclass(frozen=True)
class ToldStory:
    """A story, parted into what was given and what the model wrote."""

    beginning: str
    continuation: str


@dataclass(frozen=True)
class Moment:
    """What a model told at one step."""

    step: int
    loss: float | None
    tokens: int | None
    stories: list[ToldStory]


def read_moments(text: str) -> list[Moment]:
    """Return the sections of a ``samples.md``, oldest first; a step that stands twice once."""
    _, *parts = _SECTION.split(text)
    moments = {}
    for step, section in zip(parts[::2], parts[1::2], strict=True):
        figures = _FIGURES.search(section)
        stories = [_read_story(quote) for quote in re.findall(r"(?:^>.*\n?)+", section, flags=re.MULTILINE)]
        if stories:
            loss, tokens = (float(figures[1]), int(figures[2].replace(",", ""))) if figures else (None, None)
            moments[int(step)] = Moment(int(step), loss, tokens, stories)
    return [moments[step] for step in sorted(moments)]


def _read_story(quote: str) -> ToldStory:
    lines = [line.removeprefix(">").removeprefix(" ") for line in quote.rstrip("\n").split("\n")]
    text = "\n".join(line.removesuffix("  ") for line in lines[:-1]) + "\n" * (len(lines) > 1) + lines[-1]
    beginning = _BEGINNING.match(text)
    if beginning is None:
        return ToldStory("", _plain(text))
    return ToldStory(_plain(beginning[1]), _plain(text[beginning.end() :]))


def _plain(text: str) -> str:
    """Take back what keeps Markdown from reading text as markup."""
    return _MARKUP.sub(lambda match: match[1] or " ", text)


def choose_moments(moments: list[Moment]) -> list[tuple[str, Moment]]:
    """Return the first moment, the one where the loss is halfway between first and last, and the last one."""
    if len(moments) < 3:
        return list(zip(["beginning", "end"][-len(moments) :], moments, strict=True)) if moments else []
    first, *between, last = moments
    losses = [moment.loss for moment in moments]
    middle = between[len(between) // 2]
    if None not in losses:
        half = ((first.loss or 0.0) + (last.loss or 0.0)) / 2
        middle = min(between, key=lambda moment: abs((moment.loss or 0.0) - half))
    return [("beginning", first), ("halfway down the loss", middle), ("end", last)]
