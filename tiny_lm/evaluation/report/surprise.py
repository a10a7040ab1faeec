"""How surprised a model is by each token of a text, and what it would have said instead."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tiny_lm.model import Transformer
from tiny_lm.tokenizer import Tokenizer

LEVELS = (0.5, 1.0, 2.0, 3.0, 4.5, 6.5, 9.0)
"""Bits at which the colour of a token changes."""

_ALTERNATIVES = 5


@dataclass(frozen=True)
class TokenSurprise:
    """One token of a text, and what the model thought before it came."""

    text: str
    level: int
    """Number of its colour: how many of ``LEVELS`` it reaches."""
    bits: float
    probability: float
    rank: int
    """1: the model's first guess."""
    alternatives: list[tuple[str, float]]
    """The likeliest tokens with their probabilities."""


@torch.inference_mode()
def measure_tokens(model: Transformer, tokenizer: Tokenizer, ids: Sequence[int]) -> list[TokenSurprise]:
    """Return the surprise ``-log2 p`` of each token but the first, which nothing foretells.

    Args:
        model: in evaluation mode.
        tokenizer: its tokenizer.
        ids: a text of 2 tokens up to the context of the model.
    """
    logits = model(torch.tensor([ids]))[0, :-1].float()  # [T-1, V]
    log_probabilities = logits.log_softmax(dim=-1)
    targets = torch.tensor(ids[1:])
    own = log_probabilities.gather(1, targets[:, None])  # [T-1, 1]
    ranks = (log_probabilities > own).sum(dim=-1) + 1
    best = log_probabilities.topk(min(_ALTERNATIVES, logits.shape[-1]), dim=-1)
    tokens = []
    for place, token in enumerate(targets.tolist()):
        bits = -float(own[place]) / math.log(2)
        alternatives = zip(best.indices[place].tolist(), best.values[place].exp().tolist(), strict=True)
        tokens.append(
            TokenSurprise(
                text=tokenizer.token_text(token),
                level=sum(bits >= level for level in LEVELS),
                bits=bits,
                probability=2.0**-bits,
                rank=int(ranks[place]),
                alternatives=[(_token_text(tokenizer, other), share) for other, share in alternatives],
            )
        )
    return tokens


def _token_text(tokenizer: Tokenizer, token: int) -> str:
    """Return a token as text; a model may have more ids than its tokenizer."""
    return tokenizer.token_text(token) if token < tokenizer.vocab_size else f"[{token}]"
