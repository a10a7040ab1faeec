"""How surprised a model is by a token: what the pages show of it."""

import math
from dataclasses import dataclass
from typing import Any

from tiny_lm.pages.text import visible

LEVELS = (0.5, 1.0, 2.0, 3.0, 4.5, 6.5, 9.0)
"""Bits at which the colour of a token changes."""


@dataclass(frozen=True)
class TokenSurprise:
    """One token of a text, and what the model thought before it came."""

    text: str
    bits: float
    """Surprise: ``-log2`` of the token's probability."""
    rank: int
    """1: the model's first guess; 0: beyond the alternatives, where no more is known."""
    alternatives: list[tuple[str, float]]
    """The likeliest tokens with their probabilities."""

    @classmethod
    def of(cls, text: str, logprob: float, rank: int, alternatives: list[tuple[str, float]]) -> "TokenSurprise":
        """Return the surprise of a token with a log-probability in nats."""
        return cls(text, -logprob / math.log(2), rank, alternatives)

    @property
    def probability(self) -> float:
        """Probability of the token."""
        return float(2.0**-self.bits)

    @property
    def level(self) -> int:
        """Number of its colour: how many of ``LEVELS`` it reaches."""
        return sum(self.bits >= level for level in LEVELS)

    def data(self) -> dict[str, Any]:
        """Return what the script of a page reads."""
        return {
            "text": visible(self.text),
            "bits": round(self.bits, 2),
            "p": float(f"{self.probability:.3g}"),
            "rank": self.rank,
            "others": [[visible(other), float(f"{share:.3g}")] for other, share in self.alternatives],
        }
