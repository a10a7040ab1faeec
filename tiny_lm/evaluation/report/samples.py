"""The samples generated during training, parsed from ``samples.md``."""

import re
from dataclasses import dataclass

_SECTION = re.compile(r"^## Step (\d+)$", re.MULTILINE)
_METRICS = re.compile(r"^val loss ([\d.]+), ([\d,]+) tokens seen$", re.MULTILINE)
_PROMPT = re.compile(r"\*\*((?:\\.|[^*\\])*)\*\*")
_MARKUP = re.compile(r"\\(.)|&nbsp;", re.DOTALL)


@dataclass(frozen=True)
class TrainingSample:
    """A sample: its prompt and the completion."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class SampledStep:
    """The samples of one validation."""

    step: int
    loss: float | None
    tokens: int | None
    samples: list[TrainingSample]


def read_sampled_steps(text: str) -> list[SampledStep]:
    """Parse the sections of a ``samples.md``, oldest first; of a repeated step only the last."""
    _, *parts = _SECTION.split(text)
    steps = {}
    for step, section in zip(parts[::2], parts[1::2], strict=True):
        metrics = _METRICS.search(section)
        samples = [_parse_quote(quote) for quote in re.findall(r"(?:^>.*\n?)+", section, flags=re.MULTILINE)]
        if samples:
            loss, tokens = (float(metrics[1]), int(metrics[2].replace(",", ""))) if metrics else (None, None)
            steps[int(step)] = SampledStep(int(step), loss, tokens, samples)
    return [steps[step] for step in sorted(steps)]


def _parse_quote(quote: str) -> TrainingSample:
    lines = [line.removeprefix(">").removeprefix(" ") for line in quote.rstrip("\n").split("\n")]
    text = "\n".join(line.removesuffix("  ") for line in lines[:-1]) + "\n" * (len(lines) > 1) + lines[-1]
    prompt = _PROMPT.match(text)
    if prompt is None:
        return TrainingSample("", _unescape(text))
    return TrainingSample(_unescape(prompt[1]), _unescape(text[prompt.end() :]))


def _unescape(text: str) -> str:
    """Undo the escaping that keeps text from being read as Markdown."""
    return _MARKUP.sub(lambda match: match[1] or " ", text)


def choose_steps(steps: list[SampledStep]) -> list[tuple[str, SampledStep]]:
    """Return the first step, the one whose loss is closest to halfway between first and last, and the last."""
    if len(steps) < 3:
        return list(zip(["start", "end"][-len(steps) :], steps, strict=True)) if steps else []
    first, *between, last = steps
    losses = [step.loss for step in steps]
    middle = between[len(between) // 2]
    if None not in losses:
        half = ((first.loss or 0.0) + (last.loss or 0.0)) / 2
        middle = min(between, key=lambda step: abs((step.loss or 0.0) - half))
    return [("start", first), ("halfway down the loss", middle), ("end", last)]
