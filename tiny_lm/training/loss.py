"""The training loss: mean cross-entropy of the next token, plain and with less memory traffic.

Shapes: B batch, T tokens, N = B * T, D model width, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiny_lm.hardware.device import Precision
from tiny_lm.model.transformer import Transformer

LossFunction = Callable[[Any, Tensor, Tensor, int], Tensor]
"""Takes a model, inputs and targets int64 ``[B, T]``, and the target to ignore."""

_MAX_LOGITS = 2**28  # per chunk: half a gigabyte in 16 bits, and as much for their gradient


def next_token_loss(model: nn.Module, x: Tensor, y: Tensor, ignore_index: int) -> Tensor:
    """Return the mean cross-entropy of ``model`` on inputs and targets int64 ``[B, T]``, in nats per token."""
    logits = model(x)  # [B, T, V]
    return F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=ignore_index)


def lean_next_token_loss(model: Transformer, x: Tensor, y: Tensor, ignore_index: int) -> Tensor:
    """Return :func:`next_token_loss` under autocast to bfloat16, with less memory traffic.

    Outside its matrix products a step is memory-bound. Here the residual stream is in bfloat16, as in models with
    bfloat16 weights, and one kernel reads the logits for both the loss and its gradient.
    """
    hidden = model.hidden_states(x, dtype=torch.bfloat16)  # [B, T, D], float32 again after the norm
    hidden = hidden.to(torch.bfloat16).flatten(0, 1)  # [N, D]
    loss: Tensor = LinearCrossEntropy.apply(hidden, model.lm_head.weight, y.flatten(), ignore_index)  # type: ignore[no-untyped-call]
    return loss


class LinearCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of a linear head, with its gradient computed in the forward pass.

    The gradient of the logits, ``(softmax - onehot) / n``, needs the same inputs as the loss: compiled, one kernel
    computes both, and no logits are stored for the backward pass. Tokens are processed in chunks, so that not all
    logits are in memory at once (Hsu et al. 2024, arXiv:2410.10989, section 3.2).
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
        """Return the loss, float32.

        Args:
            ctx: autograd context.
            hidden: input of the head, [N, D]; products are computed in its dtype.
            weight: of the head, [V, D].
            targets: int64 [N].
            ignore_index: target to ignore.
        """
        weight = weight.to(hidden.dtype)
        counted = targets != ignore_index
        share = counted / counted.sum()  # of each token in the mean, [N]
        ids = torch.arange(len(weight), device=weight.device)  # [V]
        parts = -(-len(hidden) * len(weight) // _MAX_LOGITS)
        losses, of_hidden, of_weight = [], [], torch.zeros_like(weight, dtype=torch.float32)
        for h, y, s in zip(hidden.chunk(parts), targets.chunk(parts), share.chunk(parts), strict=True):
            logits = (h @ weight.T).float()  # [n, V], n of the N tokens
            normalizer = logits.logsumexp(dim=-1)  # [n]
            of_target = logits.gather(-1, y.clamp(min=0).unsqueeze(-1)).squeeze(-1)  # [n]
            losses.append(((normalizer - of_target) * s).sum())
            is_target = (ids == y.unsqueeze(-1)).float()  # [n, V]
            gradient = ((logits - normalizer.unsqueeze(-1)).exp() - is_target) * s.unsqueeze(-1)  # of the logits
            gradient = gradient.to(h.dtype)
            of_hidden.append(gradient @ weight)
            of_weight = of_weight + gradient.T @ h
        ctx.save_for_backward(torch.cat(of_hidden), of_weight)
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Scale the gradients of ``hidden`` and ``weight`` by that of the loss."""
        of_hidden, of_weight = ctx.saved_tensors
        (of_loss,) = grad_outputs
        return of_hidden * of_loss.to(of_hidden.dtype), of_weight * of_loss, None, None


def compiled_loss(precision: Precision) -> LossFunction:
    """Return the loss function for this precision, compiled together with the model passed to it."""
    # Computes GELU's tanh via exp: accurate to float32, and twice as fast on a CPU.
    options: dict[str, Any] = {"cpp.use_decompose_tanh": True}
    loss = lean_next_token_loss if precision == "bf16-mixed" else next_token_loss
    return torch.compile(loss, dynamic=False, options=options)
