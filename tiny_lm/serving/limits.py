"""Limits of requests: size, number of sequences, time."""

from dataclasses import dataclass

from tiny_lm.errors import UserError

MAX_N = 16
"""Completions of one prompt."""

MAX_SEQUENCES = 64
"""Maximum number of prompts of one request, and of its completions in total."""

MAX_TOP_LOGPROBS = 20
"""Likeliest alternatives that are returned for each token."""

MAX_PROMPT_CHARACTERS = 2**17
"""Of a prompt or a message: far more than fit into the context of a small model."""

_ARRIVAL_SECONDS = 30.0
"""Time for the headers of a request to arrive, and then for its body, unless the whole request has less time."""


@dataclass(frozen=True)
class Limits:
    """Limits of a server.

    Attributes:
        body_bytes: maximum size of a request body.
        max_tokens: maximum number of tokens of a completion; requests for more get this many.
        seconds: maximum time from the arrival of a request to the end of its response.
        slots: maximum number of running sequences of a model.
        queue: maximum number of waiting ones; further requests are refused.
    """

    body_bytes: int = 2**20
    max_tokens: int = 4096
    seconds: float = 300.0
    slots: int = 32
    queue: int = 256

    def __post_init__(self) -> None:
        for name, value, low, high in (
            ("max-tokens", self.max_tokens, 1, 100_000),
            ("timeout", self.seconds, 1, 86_400),
            ("slots", self.slots, 1, 1024),
            ("queue", self.queue, 0, 100_000),
        ):
            if not low <= value <= high:
                raise UserError(f"{name} must be between {low} and {high:,} (it is {value})")

    @property
    def arrival_seconds(self) -> float:
        """Maximum seconds until the headers of a request have arrived, and then its body."""
        return min(_ARRIVAL_SECONDS, self.seconds)

    def cap(self, max_tokens: int) -> int:
        """Return the maximum number of tokens for a request of ``max_tokens``."""
        return min(max_tokens, self.max_tokens)
