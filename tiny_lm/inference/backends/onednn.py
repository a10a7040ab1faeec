"""A model laid out for decoding.

Decoding multiplies every matrix with a few vectors, which is as fast as the matrix can be read, and between these
products even the calls of Python count. On x86 CPUs oneDNN reads a matrix from a layout of its own in half the time
that the library behind ``F.linear`` takes where that one is Intel's and the CPU is not (dev/LOG.md).

Shapes as in :mod:`tiny_lm.model.attention`.
"""

import copy
import platform

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from tiny_lm.model import MultiHeadAttention, Transformer, attend
from tiny_lm.model.feedforward import FeedForward, SwiGLU

_FEW_ROWS = 32
"""The layout is the best one for products with about so many vectors; for one it is as good as any."""

_MANY_ROWS = 16
"""From so many rows on the keys and values lie in main memory, not in a cache of the processor."""


class BatchedDecodeAttention:
    """Does what :func:`~tiny_lm.model.attend` does; one query of many rows in kernels that read memory in its order.

    The fused kernel of torch waits for memory there. The sum of values by weight is an embedding bag: one for each
    head, whose embeddings are the cached values. It reads those of a row only, however long other rows are.
    """

    def __init__(self) -> None:
        self._last: tuple[Tensor | None, object, tuple[Tensor, Tensor]] | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout_p: float = 0.0) -> Tensor:
        """Take and return what :func:`~tiny_lm.model.attend` does; a row of the mask is true up to its last key."""
        batch, heads, queries, size = q.shape
        if queries > 1 or batch < _MANY_ROWS:
            return attend(q, k, v, mask, dropout_p)
        _, groups, seen, _ = v.shape
        grouped = (q * size**-0.5).view(batch, groups, -1, size)  # [B, H, 1, K] -> [B, G, H/G, K]
        scores = k @ grouped.transpose(2, 3)  # [B, G, S, H/G]
        if mask is not None:
            scores.masked_fill_(~mask.transpose(2, 3), -torch.inf)
        weights = scores.softmax(dim=2).transpose(2, 3).reshape(-1)  # [B, G, H/G, S] -> [B*H*S]
        places, starts = self._bags(v, mask, heads)
        # All of the memory from the first value to the last one, as vectors of K.
        vectors = ((batch - 1) * v.stride(0) + (groups - 1) * v.stride(1)) // size + seen
        table = v.as_strided((vectors, size), (size, 1))
        y = F.embedding_bag(places, table, starts, mode="sum", per_sample_weights=weights)  # [B*H, K]
        return y.view(batch, heads, 1, size)

    def _bags(self, v: Tensor, mask: Tensor | None, heads: int) -> tuple[Tensor, Tensor]:
        """Return what :func:`embedding_bag_indices` does, which is the same in all layers of a step."""
        layout, last = (v.shape, v.stride()), self._last
        if last is None or last[0] is not mask or last[1] != layout:
            last = self._last = mask, layout, embedding_bag_indices(v, mask, heads)
        return last[2]


def embedding_bag_indices(v: Tensor, mask: Tensor | None, heads: int) -> tuple[Tensor, Tensor]:
    """Return where the values of each head lie in memory, in vectors of K, and where a head begins among them.

    Args:
        v: values [B, G, S, K].
        mask: [B, 1, 1, S], or None where every row sees all. What a row does not see is its last value again: it has
            no weight, and is at hand.
        heads: number H of query heads.

    Returns:
        int32 [B*H*S] and [B*H].
    """
    batch, groups, seen, size = v.shape
    rows = torch.arange(batch, dtype=torch.int32)[:, None, None, None] * (v.stride(0) // size)
    inner = torch.arange(groups, dtype=torch.int32)[:, None, None] * (v.stride(1) // size)
    tokens = torch.arange(seen, dtype=torch.int32)
    if mask is not None:
        tokens = torch.minimum(tokens, mask.sum(dim=-1, keepdim=True, dtype=torch.int32) - 1)  # [B, 1, 1, S]
    places = (rows + inner + tokens).expand(-1, -1, heads // groups, -1)  # [B, G, H/G, S]
    return places.reshape(-1), torch.arange(0, batch * heads * seen, seen, dtype=torch.int32)


class MkldnnLinear(nn.Module):
    """``nn.Linear`` for inference, with its weight [out, in] in oneDNN's layout, and perhaps an activation after it."""

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: tuple[str, str] = ("none", "")) -> None:
        """Take an activation by the names that oneDNN has for its kind and its form."""
        super().__init__()
        self._weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _FEW_ROWS)
        self._bias = None if bias is None else bias.detach()
        self._activation, self._form = activation

    @classmethod
    def joined(cls, *parts: nn.Linear) -> Self:
        """Make one product of several that read the same; all have biases or none has."""
        biases = tuple(part.bias for part in parts)
        weight = torch.cat([part.weight for part in parts])  # [out, in]
        return cls(weight, None if biases[0] is None else torch.cat(biases))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` [..., in] to [..., out]."""
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, self._activation, [], self._form)
        return y


class MkldnnQKV:
    """The projections to q, k and v as one product."""

    def __init__(self, attention: MultiHeadAttention) -> None:
        parts = (attention.W_q, attention.W_k, attention.W_v)
        self._linear = MkldnnLinear.joined(*parts)
        self._heads = attention.heads
        self._sizes = [part.out_features // attention.head_size for part in parts]

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """Do what ``MultiHeadAttention.project`` does."""
        return torch.split(self._heads(self._linear.forward(x)), self._sizes, dim=1)  # [B, H+G+G, T, K] -> three


class MkldnnSwiGLU(nn.Module):
    """``SwiGLU`` with gate and up as one product."""

    def __init__(self, ffn: SwiGLU) -> None:
        super().__init__()
        self.gate_up, self.down = MkldnnLinear.joined(ffn.w1, ffn.w3), MkldnnLinear.joined(ffn.w2)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` [B, T, D] to [B, T, D]."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)  # [B, T, F] each
        y: Tensor = self.down(F.silu(gate) * up)
        return y


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
    attend_rows = BatchedDecodeAttention()
    for module in packed.modules():
        if isinstance(module, MultiHeadAttention):
            object.__setattr__(module, "project", MkldnnQKV(module))
            module.attend = attend_rows
        if isinstance(module, FeedForward):
            module.fc1 = MkldnnLinear(module.fc1.weight, module.fc1.bias, ("gelu", "tanh"))  # type: ignore[assignment]
            module.activation = nn.Identity()  # type: ignore[assignment]
        for name, child in module.named_children():
            if isinstance(child, SwiGLU):
                setattr(module, name, MkldnnSwiGLU(child))
            elif isinstance(child, nn.Linear):
                setattr(module, name, MkldnnLinear.joined(child))
    _call_directly(packed)
    return packed


def _call_directly(model: Transformer) -> None:
    """Let modules call the ``forward`` of their parts: looking for hooks first is a fifth of a small model's time."""
    for module in model.modules():
        for name, child in module.named_children():
            if not isinstance(child, nn.ModuleList):
                object.__setattr__(module, name, child.forward)
    object.__setattr__(model, "blocks", [block.forward for block in model.blocks])
