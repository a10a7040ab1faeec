"""What is asked of a generator, what it gives, and a text in the making."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Literal

from tiny_lm.errors import UserError
from tiny_lm.inference.decoding import Continuation, Drawn
from tiny_lm.inference.sampling import SamplingParams
from tiny_lm.inference.stopping import StopStrings
from tiny_lm.tokenizer import Tokenizer

MAX_NEW_TOKENS = 100_000
MAX_LOGPROBS = 100

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True)
class GenerationConfig(SamplingParams):
    """What to generate, besides the prompt.

    Attributes:
        max_new_tokens: most tokens to generate; generation also ends at the eos token.
        min_new_tokens: the eos token is not drawn before this many.
        stop: strings before the first of which the text ends, wherever token borders fall.
        stop_tokens: texts of special tokens, such as ``<|im_end|>``, that end it as eos does.
        add_bos: begin with the beginning-of-text token, as each document of the training stream does.
        strict: refuse a prompt that is longer than the context, instead of reading its end only.
        logprobs: tell the log-probability of each token, and those of so many likeliest ones in its place.
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
class Completion:
    """A continued prompt."""

    prompt: str
    text: str
    """The continuation only."""
    ids: list[int]
    """The tokens of the continuation, without the one that ended it. A stop string cuts the text, not these."""
    finish_reason: FinishReason
    """``stop``: at the eos token, a stop token or a stop string; ``length``: after ``max_new_tokens``."""
    drawn: list[Drawn]
    """Every token with its log-probability; empty unless ``logprobs`` was asked for."""


class GrowingText:
    """A text in the making: what becomes of the tokens that are drawn for it.

    Attributes:
        prompt: the beginning, as text.
        wanted: what is asked of the decoder.
        pieces: what each token made certain of the text.
        drawn: the tokens with log-probabilities, if these were asked for.
        end: the token that ended the text, if one did and log-probabilities were asked for.
        tokens: number of tokens drawn, the one that ended the text included.
        finish_reason: None while it goes on.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: str, wanted: Continuation, request: GenerationConfig) -> None:
        self.prompt, self.wanted = prompt, wanted
        self.pieces: list[str] = []
        self.drawn: list[Drawn] = []
        self.end: Drawn | None = None
        self.tokens = 0
        self.finish_reason: FinishReason | None = None if request.max_new_tokens else "length"
        self._ids: list[int] = []
        self._most = request.max_new_tokens
        self._decoder = tokenizer.stream_decoder()
        self._stops = StopStrings(request.stop)

    @property
    def longest(self) -> int:
        """Most tokens that prompt and text can have together."""
        return len(self.wanted.prompt) + self._most

    def take(self, drawn: Drawn) -> str:
        """Add a token and return the text that is now certain: all of it, once the text has ended."""
        self.tokens += 1
        piece = ""
        if drawn.id in self.wanted.ends:
            self.finish_reason = "stop"
            self.end = drawn if self.wanted.logprobs is not None else None
        else:
            self._ids.append(drawn.id)
            if self.wanted.logprobs is not None:
                self.drawn.append(drawn)
            piece = self._stops.push(self._decoder.push(drawn.id))
        if self._stops.found:
            self.finish_reason = "stop"
        elif self.finish_reason or self.tokens == self._most:
            piece += self._stops.push(self._decoder.flush())
            piece += self._stops.flush()
            self.finish_reason = "stop" if self._stops.found else self.finish_reason or "length"
        self.pieces.append(piece)
        return piece

    def completion(self) -> Completion:
        """Return the text, which has ended."""
        assert self.finish_reason is not None
        return Completion(self.prompt, "".join(self.pieces), self._ids, self.finish_reason, self.drawn)
