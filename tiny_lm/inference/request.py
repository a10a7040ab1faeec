"""What a caller asks for, and what it gets."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Literal

from tiny_lm.errors import UserError
from tiny_lm.inference.sampling import SamplingParams
from tiny_lm.inference.stopping import StopStrings

MAX_NEW_TOKENS = 100_000
MAX_LOGPROBS = 100

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True)
class GenerationConfig(SamplingParams):
    """How to generate: the fields of :class:`SamplingParams` and these.

    Attributes:
        max_new_tokens: generation ends after this many tokens, unless the eos token comes first.
        min_new_tokens: the eos token and stop tokens are not sampled before this many tokens.
        stop: stop strings; the text ends before the first one, wherever token boundaries fall.
        stop_tokens: special tokens as text, such as ``<|im_end|>``, that end the text as eos does.
        add_bos: prepend the bos token, as each document of the training stream has it.
        strict: refuse a prompt that is longer than the context, instead of keeping only its end.
        logprobs: return the log-probability of each token, and those of this many of the likeliest alternatives.
    """

    max_new_tokens: int = 200
    min_new_tokens: int = 0
    stop: Sequence[str] = ()
    stop_tokens: Sequence[str] = ()
    add_bos: bool = True
    strict: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("stop", "stop_tokens"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        if not 0 <= self.max_new_tokens <= MAX_NEW_TOKENS:
            raise UserError(f"max-new-tokens must be between 0 and {MAX_NEW_TOKENS:,} (it is {self.max_new_tokens})")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise UserError(f"min-new-tokens must be between 0 and max-new-tokens (it is {self.min_new_tokens})")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise UserError(f"logprobs must be between 0 and {MAX_LOGPROBS} (it is {self.logprobs})")
        StopStrings(self.stop)

    @cached_property
    def sampling(self) -> SamplingParams:
        """The sampling parameters alone: sequences with equal ones are sampled together."""
        return SamplingParams(**{field.name: getattr(self, field.name) for field in fields(SamplingParams)})


@dataclass(frozen=True)
class TokenLogprobs:
    """A token and how likely the model found it, before temperature, truncation and penalties."""

    id: int
    logprob: float | None
    """None for the first token of a prompt, which follows nothing."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens at its position with their log-probabilities, in descending order."""


@dataclass(frozen=True)
class Completion:
    """A completed prompt."""

    prompt: str
    text: str
    """The completion without the prompt."""
    ids: list[int]
    """Its tokens, without the one that ended it. A stop string truncates the text, not these."""
    finish_reason: FinishReason
    """``stop``: at the eos token, a stop token or a stop string; ``length``: after ``max_new_tokens``."""
    logprobs: list[TokenLogprobs]
    """One for each of ``ids``; empty unless ``logprobs`` was set."""
