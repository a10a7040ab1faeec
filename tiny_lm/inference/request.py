"""What is asked of a generator, what it gives, and a text in the making."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from tiny_lm.errors import UserError
from tiny_lm.inference.decoding import Drawn
from tiny_lm.inference.sampling import Sampling
from tiny_lm.inference.stopping import StopStrings
from tiny_lm.tokenizer import Tokenizer

MAX_NEW_TOKENS = 100_000
MAX_LOGPROBS = 100

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Request:
    """What to generate, besides the prompt.

    Attributes:
        max_new_tokens: most tokens to generate; generation also ends at the eos token.
        min_new_tokens: the eos token is not drawn before this many.
        sampling: temperature, truncation and penalties.
        stop: strings before the first of which the text ends, wherever token borders fall.
        stop_tokens: texts of special tokens, such as ``<|im_end|>``, that end it as eos does.
        add_bos: begin with the beginning-of-text token, as each document of the training stream does.
        strict: refuse a prompt that is longer than the context, instead of reading its end only.
        logprobs: tell the log-probability of each token, and those of so many likeliest ones in its place.
    """

    max_new_tokens: int = 200
    min_new_tokens: int = 0
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[str, ...] = ()
    add_bos: bool = True
    strict: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.max_new_tokens <= MAX_NEW_TOKENS:
            raise UserError(f"max-new-tokens must be between 0 and {MAX_NEW_TOKENS:,} (it is {self.max_new_tokens})")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise UserError(f"min-new-tokens must be between 0 and max-new-tokens (it is {self.min_new_tokens})")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise UserError(f"logprobs must be between 0 and {MAX_LOGPROBS} (it is {self.logprobs})")
        StopStrings(self.stop)


@dataclass(frozen=True)
class Generated:
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
    """A text in the making: what becomes of the tokens that are drawn for it."""

    def __init__(
        self, tokenizer: Tokenizer, prompt: str, prompt_ids: list[int], ends: Sequence[int], request: Request
    ) -> None:
        self.prompt, self.prompt_ids = prompt, prompt_ids
        self.ids: list[int] = []
        self.pieces: list[str] = []
        self.drawn: list[Drawn] = []
        self.finish_reason: FinishReason = "length"
        self._ends = ends
        self._tells = request.logprobs is not None
        self._decoder = tokenizer.stream_decoder()
        self._stops = StopStrings(request.stop)

    def take(self, drawn: Drawn) -> str:
        """Add a token and return the text that is now certain."""
        if drawn.id in self._ends:
            self.finish_reason = "stop"
            return ""
        self.ids.append(drawn.id)
        if self._tells:
            self.drawn.append(drawn)
        piece = self._stops.push(self._decoder.push(drawn.id))
        if self._stops.found:
            self.finish_reason = "stop"
        return piece

    def flush(self) -> str:
        """End the text and return what was not certain before."""
        rest = self._stops.push(self._decoder.flush())
        if self._stops.found:
            self.finish_reason = "stop"
        return rest + self._stops.flush()

    def result(self) -> Generated:
        """Return the text as it is now."""
        return Generated(self.prompt, "".join(self.pieces), self.ids, self.finish_reason, self.drawn)
