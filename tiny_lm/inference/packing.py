"""Matrices laid out for decoding.

Decoding multiplies every matrix with a few vectors, which is as fast as the matrix can be read. On x86 CPUs oneDNN does
it from a layout of its own, twice as fast as the library behind ``F.linear`` where that one is Intel's and the CPU is
not (docs/experiments.md).
"""

import copy
import platform

import torch
from torch import Tensor, nn

from tiny_lm.model import Transformer


class PackedLinear(nn.Module):
    """``nn.Linear`` for inference, with its weight in oneDNN's layout."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self._weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _FEW_ROWS)
        self._bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` [..., in] to [..., out]."""
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return y


_FEW_ROWS = 8
"""The layout is the best one for products with about so many vectors."""


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
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, PackedLinear(child))
    return packed
