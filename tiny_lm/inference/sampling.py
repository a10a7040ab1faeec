"""From logits to the next token: pure functions."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tiny_lm.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
        temperature: divides the logits; 0 always takes the likeliest token.
        top_k: only the k likeliest tokens; None or 0 for all.
        top_p: only the likeliest tokens that together have this probability (nucleus sampling,
            Holtzman et al. 2020, arXiv:1904.09751); 1 for all.
    """

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 100:
            raise UserError(f"temperature must be between 0 and 100 (it is {self.temperature})")
        if self.top_k is not None and self.top_k < 0:
            raise UserError(f"top-k must be 0 (off) or more (it is {self.top_k})")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top-p must be above 0 and at most 1 (it is {self.top_p})")


def sample(logits: Tensor, sampling: Sampling, uniform: Tensor) -> Tensor:
    """Draw one token for each row.

    Args:
        logits: ``[B, V]``.
        sampling: temperature and truncation.
        uniform: one random number of [0, 1) for each row, ``[B]``; unused at temperature 0.

    Returns:
        token ids, int64 ``[B]``.
    """
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    ordered, ids = (logits.float() / sampling.temperature).sort(dim=-1, descending=True)  # [B, V] each
    probabilities = nucleus(top_k(ordered, sampling.top_k).softmax(dim=-1), sampling.top_p)
    # Inverse transform sampling: the first token at which the cumulative probability exceeds the random number.
    cumulative = probabilities.cumsum(dim=-1)
    threshold = uniform[:, None].to(cumulative) * cumulative[:, -1:]  # [B, 1]
    choice = torch.searchsorted(cumulative, threshold, right=True).clamp(max=logits.shape[-1] - 1)
    return ids.gather(-1, choice).squeeze(-1)


def top_k(ordered: Tensor, k: int | None) -> Tensor:
    """Keep the first k logits of each row of ``[B, V]``, which is sorted in descending order."""
    if not k or k >= ordered.shape[-1]:
        return ordered
    kept = ordered.clone()
    kept[:, k:] = float("-inf")
    return kept


def nucleus(probabilities: Tensor, p: float) -> Tensor:
    """Keep the fewest tokens that reach probability p; ``[B, V]``, sorted in descending order, not normalised again."""
    if p >= 1:
        return probabilities
    before = probabilities.cumsum(dim=-1) - probabilities
    return probabilities.masked_fill(before >= p, 0.0)
