"""A model laid out for decoding.

Decoding multiplies every matrix with a few vectors, which is as fast as the matrix can be read, and between these
products even the calls of Python count. On x86 CPUs oneDNN reads a matrix from a layout of its own in half the time
that the library behind ``F.linear`` takes where that one is Intel's and the CPU is not (docs/experiments.md).
"""

import copy
import platform

import torch
from torch import Tensor, nn

from tiny_lm.model import MultiHeadAttention, Transformer

_FEW_ROWS = 32
"""The layout is the best one for products with about so many vectors; for one it is as good as any."""


class PackedLinear(nn.Module):
    """``nn.Linear`` for inference, with its weight [out, in] in oneDNN's layout."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self._weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _FEW_ROWS)
        self._bias = None if bias is None else bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` [..., in] to [..., out]."""
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return y


class PackedProjection:
    """The projections to q, k and v as one product."""

    def __init__(self, attention: MultiHeadAttention) -> None:
        parts = (attention.W_q, attention.W_k, attention.W_v)
        has_bias = attention.W_q.bias is not None
        bias = torch.cat([part.bias for part in parts]) if has_bias else None
        self._linear = PackedLinear(torch.cat([part.weight for part in parts]), bias)
        self._heads = attention.heads
        self._sizes = [part.out_features // attention.head_size for part in parts]

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """Do what ``MultiHeadAttention.project`` does."""
        return torch.split(self._heads(self._linear.forward(x)), self._sizes, dim=1)  # [B, H+G+G, T, K] -> three


def pack(model: Transformer) -> Transformer:
    """Return a copy of ``model`` for inference whose matrices are packed, where this machine gains by it.

    The copy shares all other parameters. Elsewhere (a GPU, another kind of CPU) it is the model itself.
    """
    weight = model.token_emb.weight
    here = weight.device.type == "cpu" and platform.machine() in ("x86_64", "AMD64")
    has_onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    if not (here and has_onednn and weight.dtype == torch.float32):
        return model
    packed = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    for module in packed.modules():
        if isinstance(module, MultiHeadAttention):
            object.__setattr__(module, "project", PackedProjection(module))
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, PackedLinear(child.weight, child.bias))
    _call_directly(packed)
    return packed


def _call_directly(model: Transformer) -> None:
    """Let modules call the ``forward`` of their parts: looking for hooks first is a fifth of a small model's time."""
    for module in model.modules():
        for name, child in module.named_children():
            if not isinstance(child, nn.ModuleList):
                object.__setattr__(module, name, child.forward)
    object.__setattr__(model, "blocks", [block.forward for block in model.blocks])
