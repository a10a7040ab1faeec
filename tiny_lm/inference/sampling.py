"""Sampling the next token from logits: pure functions.

Shapes: B sequences, V vocabulary, C candidates.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tiny_lm.errors import UserError

_MIN_TEMPERATURE = 1e-6
"""Dividing logits by less overflows; at this temperature sampling is already greedy."""

_BELOW_ONE = 1 - 2.0**-23
"""Any normal float32 gets smaller when multiplied by this."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the next token is sampled: penalties are applied first, then temperature, top-k, top-p and min-p.

    Attributes:
        temperature: divides the logits; 0 for greedy decoding.
        top_k: keep only the k likeliest tokens; None or 0 for all.
        top_p: keep only the fewest likeliest tokens that together have this probability (nucleus sampling, Holtzman et
            al. 2020, arXiv:1904.09751); 1 for all.
        min_p: keep only tokens with at least this fraction of the likeliest one's probability (Nguyen et al. 2024,
            arXiv:2407.01082); 0 for all.
        repetition_penalty: divides the positive logits of tokens in the prompt or the text so far, and multiplies the
            negative ones (Keskar et al. 2019, arXiv:1909.05858); 1 for none.
        presence_penalty: subtracted from the logits of tokens that were generated before, as in OpenAI's API.
        frequency_penalty: the same, once for each occurrence.
    """

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 100:
            raise UserError(f"temperature must be between 0 and 100 (it is {self.temperature})")
        if self.top_k is not None and self.top_k < 0:
            raise UserError(f"top-k must be 0 (off) or more (it is {self.top_k})")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top-p must be above 0 and at most 1 (it is {self.top_p})")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min-p must be between 0 and 1 (it is {self.min_p})")
        if not 0.01 <= self.repetition_penalty <= 100:
            raise UserError(f"repetition-penalty must be between 0.01 and 100 (it is {self.repetition_penalty})")
        for name, value in (("presence", self.presence_penalty), ("frequency", self.frequency_penalty)):
            if not -100 <= value <= 100:
                raise UserError(f"{name}-penalty must be between -100 and 100 (it is {value})")

    @property
    def uses_penalties(self) -> bool:
        """Whether a penalty needs to know which tokens the text contains."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


def penalize(logits: Tensor, seen: Tensor, counts: Tensor, sampling: SamplingParams) -> Tensor:
    """Apply the penalties and return the logits ``[B, V]``.

    Args:
        logits: ``[B, V]``.
        seen: bool ``[B, V]``, whether a token occurs in the prompt or the text generated so far.
        counts: ``[B, V]``, how often it was generated.
        sampling: the three penalties.
    """
    factor = sampling.repetition_penalty
    repeated = torch.where(logits > 0, logits / factor, logits * factor)
    logits = torch.where(seen, repeated, logits)
    return logits - sampling.frequency_penalty * counts - sampling.presence_penalty * (counts > 0)


def sample(logits: Tensor, sampling: SamplingParams, uniform: Tensor) -> Tensor:
    """Sample one token for each row.

    Args:
        logits: ``[B, V]``.
        sampling: temperature and truncation.
        uniform: one random number of [0, 1) for each row, ``[B]``; unused at temperature 0.

    Returns:
        token ids, int64 ``[B]``.
    """
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    scaled = logits.float() / max(sampling.temperature, _MIN_TEMPERATURE)
    k = sampling.top_k if sampling.top_k and sampling.top_k < scaled.shape[-1] else None
    if k is None and sampling.top_p == 1:
        return _sample_index(min_p(scaled.softmax(dim=-1), sampling.min_p), uniform)
    candidates, ids = likeliest(scaled, k, sampling.top_p)  # [B, C] each
    kept = min_p(nucleus(candidates, sampling.top_p), sampling.min_p)
    return ids.gather(-1, _sample_index(kept, uniform)[:, None]).squeeze(-1)


def likeliest(logits: Tensor, k: int | None, p: float) -> tuple[Tensor, Tensor]:
    """Return probabilities and ids ``[B, C]`` of the likeliest tokens, in descending order.

    They are the first ``k``, or enough to reach probability ``p`` in every row. In most texts few tokens are enough,
    and a small top-k is much faster than sorting all.
    """
    if k is not None:
        kept, ids = logits.topk(k, dim=-1)
        return kept.softmax(dim=-1), ids
    probabilities = logits.softmax(dim=-1)
    top, ids = probabilities.topk(min(128, logits.shape[-1]), dim=-1)
    if bool((top.sum(dim=-1) >= p).all()):
        return top, ids
    every, ids = probabilities.sort(dim=-1, descending=True)
    return every, ids


def nucleus(probabilities: Tensor, p: float) -> Tensor:
    """Zero all but the fewest tokens that reach probability p; ``[B, C]``, in descending order, not renormalized."""
    if p >= 1:
        return probabilities
    before = probabilities.cumsum(dim=-1) - probabilities
    return probabilities.masked_fill(before >= p, 0.0)


def min_p(probabilities: Tensor, fraction: float) -> Tensor:
    """Zero tokens with less than ``fraction`` of the likeliest one's probability; ``[B, C]``, not renormalized."""
    if fraction == 0:
        return probabilities
    return probabilities.masked_fill(probabilities < fraction * probabilities.amax(dim=-1, keepdim=True), 0.0)


def _sample_index(weights: Tensor, uniform: Tensor) -> Tensor:
    """Return the first index of each row of ``[B, C]`` whose cumulative weight exceeds ``uniform`` times the total."""
    cumulative = weights.cumsum(dim=-1)
    total = cumulative[:, -1:]  # [B, 1]
    # Scaled down a little: rounding could make the product equal to the total, which no cumulative weight exceeds.
    threshold = uniform[:, None].to(total) * (total * _BELOW_ONE)
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)  # [B]
