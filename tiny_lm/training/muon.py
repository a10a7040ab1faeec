"""Muon in a precision that is fast on the hardware."""

from collections.abc import Callable

import torch
from torch import Tensor

from tiny_lm.hardware.device import computes_in_bf16


class Muon(torch.optim.Muon):
    """torch's Muon with AdamW-sized updates, and with Newton-Schulz in float32 where bf16 is emulated.

    torch always iterates in bf16. On a CPU without bf16 instructions that took three quarters of a quickstart step
    (dev/LOG.md). Parameter groups and state are torch's.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> None:  # type: ignore[override]
        """Update each matrix by its orthogonalized momentum."""
        assert closure is None  # MuonAdamW calls it
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            for weight in weights:
                state = self.state[weight]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(weight.grad)
                momentum = state["momentum_buffer"]
                momentum.lerp_(weight.grad, 1 - group["momentum"])
                update = weight.grad.lerp(momentum, group["momentum"])  # Nesterov's
                update = orthogonalize(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                # Scale updates to an RMS of 0.2, like AdamW's: Liu et al. 2025, arXiv:2502.16982, section 2.2.
                weight.add_(update, alpha=-group["lr"] * 0.2 * max(weight.shape) ** 0.5)


def orthogonalize(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Bring the singular values of a matrix near 1 by Newton-Schulz iterations.

    Args:
        matrix: ``[rows, columns]``.
        coefficients: of the odd polynomial ``a x + b x^3 + c x^5`` that each iteration applies to the singular values
            (Jordan et al. 2024, kellerjordan.github.io/posts/muon).
        steps: the number of iterations.
        eps: lower bound of the norm that the matrix is divided by.

    Returns:
        ``[rows, columns]`` in bf16, or in float32 where the device does not compute in bf16.
    """
    a, b, c = coefficients
    x = matrix.to(torch.bfloat16 if computes_in_bf16(matrix.device.type) else torch.float32, copy=True)
    rows, columns = matrix.shape
    if rows > columns:
        x = x.T  # the Gram matrix of the shorter side is smaller
    x.div_(x.norm().clamp(min=eps))
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if rows > columns else x
