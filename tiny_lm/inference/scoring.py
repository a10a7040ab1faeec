"""How surprised a model is by text: sums of negative log-likelihood, and the figures made of them."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Surprise:
    """Negative log-likelihood over a number of target tokens."""

    nats: float
    """Sum over all targets."""
    tokens: int

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood of a token, in nats."""
        return self.nats / max(self.tokens, 1)

    @property
    def perplexity(self) -> float:
        """``exp`` of the mean loss."""
        return math.exp(min(self.loss, 700.0))

    def bits_per_byte(self, bytes_per_token: float) -> float:
        """Bits per UTF-8 byte of text, ``loss / ln 2 / bytes_per_token``: compares across tokenizers."""
        return self.loss / math.log(2) / bytes_per_token


@torch.no_grad()
def measure_surprise(
    model: Callable[[Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    device: torch.device,
    ignore_index: int = -100,
) -> Surprise:
    """Sum the loss of ``model`` over all targets of ``batches``.

    Each target counts once with the same weight, however it falls into batches. The caller puts the model into
    evaluation mode and chooses the precision.

    Args:
        model: maps ids ``[B, T]`` to logits ``[B, T, V]``.
        batches: pairs of ids and targets, int64 ``[B, T]`` each.
        device: where the model lives.
        ignore_index: target that is not counted.
    """
    nats = (
        torch.zeros((), dtype=torch.float64, device=device) if device.type != "mps" else torch.zeros((), device=device)
    )
    tokens = 0
    for x, y in batches:
        targets = y.to(device, non_blocking=True)
        logits = model(x.to(device, non_blocking=True))  # [B, T, V]
        total = F.cross_entropy(
            logits.flatten(0, 1).float(), targets.flatten(), ignore_index=ignore_index, reduction="sum"
        )
        nats += total
        tokens += int((y != ignore_index).sum())
    return Surprise(float(nats), tokens)
