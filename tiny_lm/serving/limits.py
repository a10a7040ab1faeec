"""What one request may ask for, and how long it may take."""

from dataclasses import dataclass

from tiny_lm.errors import UserError

MOST_CHOICES = 16
"""Most texts of one prompt (``n``)."""

MOST_PROMPTS = 64
"""Most prompts of one request, and most texts of one request in all."""

MOST_LOGPROBS = 20
"""Most alternatives that are told in the place of one token."""

PROMPT_CHARACTERS = 2**17
"""Most characters of a prompt or a message: far more than any context here holds."""

_ARRIVAL_SECONDS = 30.0
"""For the head of a request, and then for its body, unless the whole request has less."""


@dataclass(frozen=True)
class Limits:
    """Limits of a server.

    Attributes:
        body_bytes: of the body of a request.
        max_tokens: most tokens of a text; who asks for more gets these.
        seconds: from the arrival of a request to the end of its answer.
        slots: texts of a model that are told at once.
        queue: texts of a model that wait for a slot; further ones are refused.
    """

    body_bytes: int = 2**20
    max_tokens: int = 4096
    seconds: float = 300.0
    slots: int = 32
    queue: int = 256

    def __post_init__(self) -> None:
        for name, value, least, most in (
            ("max-tokens", self.max_tokens, 1, 100_000),
            ("timeout", self.seconds, 1, 86_400),
            ("slots", self.slots, 1, 1024),
            ("queue", self.queue, 0, 100_000),
        ):
            if not least <= value <= most:
                raise UserError(f"{name} must be between {least} and {most:,} (it is {value})")

    @property
    def arrival_seconds(self) -> float:
        """Most seconds in which the head of a request comes, and then its body."""
        return min(_ARRIVAL_SECONDS, self.seconds)

    def tokens(self, asked: int) -> int:
        """Return the most tokens of a text for which ``asked`` were asked."""
        return min(asked, self.max_tokens)
