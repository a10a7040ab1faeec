"""``evaluation.json``: what ``tiny-lm eval`` writes into a run folder and the report reads.

Fields with a default were added later or may be missing; unknown ones are ignored, so newer files can be read, too.
"""

from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from tiny_lm.errors import UserError
from tiny_lm.files import write_json
from tiny_lm.reading import read_json
from tiny_lm.runs import Run

_CONFIG = ConfigDict(extra="ignore", frozen=True)

LONG_OVERLAP = 32
"""Consecutive tokens of the training stream that count as memorized: longer than stock phrases of stories."""


@dataclass(config=_CONFIG, kw_only=True)
class EvaluatedStream:
    """The validation stream and how it was cut into sequences."""

    path: str
    tokens: int
    """Number of targets; each was predicted once."""
    bytes: int
    """UTF-8 bytes of the text."""
    method: str
    """``blocked``: adjacent sequences. ``sliding``: all but a file's first sequence predict ``stride`` tokens each and
    read ``window - stride`` earlier tokens as context."""
    window: int
    """Tokens per sequence."""
    stride: int
    precision: str = ""


@dataclass(config=_CONFIG, kw_only=True)
class PositionLoss:
    """Mean loss in nats of the targets that follow ``first`` to ``last`` tokens of context."""

    first: int
    last: int
    tokens: int
    loss: float


@dataclass(config=_CONFIG, kw_only=True)
class LengthStats:
    """Lengths of the completions, in tokens."""

    mean: float
    median: float
    min: int
    max: int


@dataclass(config=_CONFIG, kw_only=True)
class OverlapStats:
    """Verbatim overlap of texts with the training stream, in tokens."""

    stories: int = 0
    longest: int
    """The longest verbatim match."""
    mean_longest: float
    """Mean over the texts of the longest match in each."""
    share: float = 0.0
    """Fraction of all tokens that lie in a match of at least ``long`` tokens."""
    long: int = LONG_OVERLAP


@dataclass(config=_CONFIG, kw_only=True)
class SampleOverlap(OverlapStats):
    """Verbatim overlap of the samples, and that of unseen text for comparison."""

    text: str = ""
    """The longest match."""
    validation: OverlapStats | None = None
    """The same for validation documents cut to the same lengths: the overlap of a model that memorized nothing."""


@dataclass(config=_CONFIG, kw_only=True)
class InventedWords:
    """Generated words that do not occur in the training text."""

    share: float
    """Fraction of all words."""
    examples: tuple[str, ...] = ()
    """The most frequent ones."""


@dataclass(config=_CONFIG, kw_only=True)
class SampleQuality:
    """Statistics of all samples. N-grams are of words, so they compare across tokenizers."""

    prompts: int
    samples: int
    temperature: float
    top_p: float = 1.0
    max_new_tokens: int
    seed: int
    distinct: dict[str, float]
    """Distinct n-grams over all n-grams of all samples (Li et al. 2016), by n."""
    repeated: dict[str, float]
    """Fraction of n-grams that occurred earlier in the same sample, by n."""
    ended: float
    """Fraction of samples that ended with eos."""
    length: LengthStats
    copied: SampleOverlap
    invented_words: InventedWords


@dataclass(config=_CONFIG, kw_only=True)
class EvaluatedSample:
    """One sample."""

    prompt: str
    text: str
    """The completion, without the prompt."""
    ended: bool = False
    tokens: int | None = None
    longest_copy: int | None = None
    """Tokens of its longest verbatim match in the training stream."""


@dataclass(config=_CONFIG, kw_only=True)
class Evaluation:
    """The content of ``evaluation.json``."""

    run: str = ""
    checkpoint: str
    step: int
    created: str
    stream: EvaluatedStream
    loss: float
    """Mean over the whole validation stream, in nats per token."""
    perplexity: float
    bits_per_byte: float
    position_loss: tuple[PositionLoss, ...]
    quality: SampleQuality
    samples: tuple[EvaluatedSample, ...]
    judge: dict[str, Any] | None = None
    """The judge's grades, as :class:`tiny_lm.evaluation.judge.JudgeResult` has them."""

    @property
    def when(self) -> str:
        """Time of the evaluation, formatted for the report."""
        try:
            return f"{datetime.fromisoformat(self.created):%d %B %Y, %H:%M} UTC"
        except ValueError:
            return self.created

    @property
    def grades(self) -> dict[str, float]:
        """The judge's grades by aspect; empty without a judge."""
        grades = (self.judge or {}).get("grades", self.judge or {})
        if not isinstance(grades, dict):
            return {}
        return {str(name): grade for name, grade in grades.items() if type(grade) in (int, float)}

    def with_judge(self, judge: dict[str, Any]) -> "Evaluation":
        """Return a copy with a judge's grades."""
        return replace(self, judge=judge)

    def to_dict(self) -> dict[str, Any]:
        """Return the evaluation as JSON values."""
        return asdict(self)

    def save(self, run: Run) -> Path:
        """Write ``evaluation.json`` into the run folder, atomically.

        Raises:
            UserError: the file cannot be written.
        """
        write_json(run.evaluation, self.to_dict())
        return run.evaluation


def read_evaluation(file: Path) -> Evaluation | None:
    """Read a run's evaluation; None if it was never evaluated.

    Raises:
        UserError: the file is not an evaluation that this version understands.
    """
    if not file.is_file():
        return None
    try:
        return TypeAdapter(Evaluation).validate_python(read_json(file))
    except ValidationError as error:
        key = ".".join(map(str, error.errors()[0]["loc"]))
        raise UserError(f"{file}: is not an evaluation that this version reads (see {key or 'the whole'})") from None
