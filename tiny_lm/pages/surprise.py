"""The surprise of a token, as the pages show it."""

import math
from dataclasses import dataclass
from typing import Any

from tiny_lm.pages.text import visible

LEVELS = (0.5, 1.0, 2.0, 3.0, 4.5, 6.5, 9.0)
"""Bits at which a token's color changes."""


@dataclass(frozen=True)
class TokenSurprise:
    """One token of a text and what the model predicted in its position."""

    text: str
    bits: float
    """Surprise: ``-log2`` of the token's probability."""
    rank: int
    """1: the likeliest token; 0: unknown, not among the alternatives."""
    alternatives: list[tuple[str, float]]
    """The likeliest tokens with their probabilities."""

    @classmethod
    def of(cls, text: str, logprob: float, rank: int, alternatives: list[tuple[str, float]]) -> "TokenSurprise":
        """Build from the token's log-probability in nats."""
        return cls(text, -logprob / math.log(2), rank, alternatives)

    @property
    def probability(self) -> float:
        """Probability of the token."""
        return float(2.0**-self.bits)

    @property
    def level(self) -> int:
        """Index of its color: how many of ``LEVELS`` it reaches."""
        return sum(self.bits >= level for level in LEVELS)

    def data(self) -> dict[str, Any]:
        """Return the token as the page's script reads it."""
        return {
            "text": visible(self.text),
            "bits": round(self.bits, 2),
            "p": float(f"{self.probability:.3g}"),
            "rank": self.rank,
            "others": [[visible(other), float(f"{share:.3g}")] for other, share in self.alternatives],
        }
