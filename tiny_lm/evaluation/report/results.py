"""``evaluation.json``, as far as a report shows it."""

from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from tiny_lm.errors import UserError
from tiny_lm.reading import read_json

_open = ConfigDict(extra="ignore", frozen=True)  # a later version may tell more


@dataclass(config=_open)
class EvaluatedStream:
    """The stream that was scored, and how it was cut into windows."""

    path: str
    tokens: int
    bytes: int
    method: str
    window: int | None = None
    stride: int | None = None


@dataclass(config=_open)
class PositionLoss:
    """Mean loss (nats) of the targets at positions ``first`` to ``last`` of the context."""

    first: int
    last: int
    tokens: int
    loss: float


@dataclass(config=_open)
class Lengths:
    """Lengths of generated stories, in tokens."""

    mean: float
    median: float
    min: float
    max: float


@dataclass(config=_open)
class CopyLengths:
    """Tokens of the longest passage that texts have in common with the training text."""

    longest: int
    mean_longest: float


@dataclass(config=_open)
class Copied(CopyLengths):
    """The longest passages that a story has in common with the training text."""

    text: str = ""
    validation: CopyLengths | None = None
    """The same of validation stories, which nobody copied."""


@dataclass(config=_open)
class InventedWords:
    """Words that the corpus does not have."""

    share: float
    examples: tuple[str, ...] = ()


@dataclass(config=_open)
class Quality:
    """Figures of generated stories."""

    samples: int
    temperature: float
    max_new_tokens: int
    distinct: dict[str, float]
    repeated: dict[str, float]
    ended: float
    length: Lengths
    copied: Copied | None = None
    invented_words: InventedWords | None = None
    seed: int | None = None


@dataclass(config=_open)
class Sample:
    """One generated story."""

    prompt: str
    text: str
    ended: bool = False
    tokens: int | None = None
    longest_copy: int | None = None


@dataclass(config=_open)
class Evaluation:
    """One evaluation of a run."""

    loss: float
    perplexity: float
    bits_per_byte: float
    step: int | None = None
    checkpoint: str = ""
    created: str = ""
    stream: EvaluatedStream | None = None
    position_loss: tuple[PositionLoss, ...] = ()
    quality: Quality | None = None
    samples: tuple[Sample, ...] = ()
    judge: dict[str, Any] | None = None

    @property
    def when(self) -> str:
        """The time of the evaluation, as the page writes times."""
        try:
            return f"{datetime.fromisoformat(self.created):%d %B %Y, %H:%M} UTC"
        except ValueError:
            return self.created

    @property
    def grades(self) -> dict[str, float]:
        """The grades among what a judge said."""
        grades = (self.judge or {}).get("grades", self.judge or {})
        if not isinstance(grades, dict):
            return {}
        return {str(name): grade for name, grade in grades.items() if type(grade) in (int, float)}


def read_evaluation(file: Path) -> Evaluation | None:
    """Return the evaluation of a run, or None where none was made.

    Raises:
        UserError: the file is no evaluation that this version understands.
    """
    if not file.is_file():
        return None
    try:
        return TypeAdapter(Evaluation).validate_python(read_json(file))
    except ValidationError as error:
        place = ".".join(map(str, error.errors()[0]["loc"]))
        raise UserError(f"{file}: is no evaluation that this version reads (see {place or 'the whole'})") from None
