"""Decoding with oneDNN's packed weights.

Decoding multiplies every matrix by a few vectors, so it is bound by memory bandwidth, and between these products even
the overhead of Python calls counts. On x86 CPUs oneDNN reads a matrix from its own layout in half the time of
``F.linear``, where that uses Intel's library on another vendor's CPU (dev/LOG.md).

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

_PACKED_BATCH_SIZE = 32
"""The batch size that the packed layout is optimized for; at batch size 1 it is as good as any other."""

_MIN_BATCH_SIZE = 16
"""From this batch size on, keys and values exceed the processor's caches."""


class BatchedDecodeAttention:
    """Replacement of :func:`~tiny_lm.model.attend` that is faster for one query of each of many sequences.

    Torch's fused kernel is bound by memory latency there; these kernels read memory sequentially. The weighted sum of
    values is an embedding bag for each head, whose embeddings are the cached values; it reads those of its own sequence
    only, however long the others are.
    """

    def __init__(self) -> None:
        self._last: tuple[Tensor | None, object, tuple[Tensor, Tensor]] | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout_p: float = 0.0) -> Tensor:
        """Compute :func:`~tiny_lm.model.attend`; a row of the mask is true up to its last key."""
        batch, heads, queries, size = q.shape
        if queries > 1 or batch < _MIN_BATCH_SIZE:
            return attend(q, k, v, mask, dropout_p)
        _, groups, length, _ = v.shape
        grouped = (q * size**-0.5).view(batch, groups, -1, size)  # [B, H, 1, K] -> [B, G, H/G, K]
        scores = k @ grouped.transpose(2, 3)  # [B, G, S, H/G]
        if mask is not None:
            scores.masked_fill_(~mask.transpose(2, 3), -torch.inf)
        weights = scores.softmax(dim=2).transpose(2, 3).reshape(-1)  # [B, G, H/G, S] -> [B*H*S]
        indices, offsets = self._bags(v, mask, heads)
        # The whole memory from the first value to the last one, as vectors of K.
        vectors = ((batch - 1) * v.stride(0) + (groups - 1) * v.stride(1)) // size + length
        table = v.as_strided((vectors, size), (size, 1))
        y = F.embedding_bag(indices, table, offsets, mode="sum", per_sample_weights=weights)  # [B*H, K]
        return y.view(batch, heads, 1, size)

    def _bags(self, v: Tensor, mask: Tensor | None, heads: int) -> tuple[Tensor, Tensor]:
        """Return :func:`embedding_bag_indices`, cached, since it is the same in all layers of a step."""
        layout, last = (v.shape, v.stride()), self._last
        if last is None or last[0] is not mask or last[1] != layout:
            last = self._last = mask, layout, embedding_bag_indices(v, mask, heads)
        return last[2]


def embedding_bag_indices(v: Tensor, mask: Tensor | None, heads: int) -> tuple[Tensor, Tensor]:
    """Return indices and offsets of the embedding bags: the positions of each head's values in memory, in vectors of K.

    Args:
        v: values [B, G, S, K].
        mask: [B, 1, 1, S], or None where every row sees all. Masked positions repeat the last valid index: their weight
            is 0 and the line is cached.
        heads: number H of query heads.

    Returns:
        int32 [B*H*S] and [B*H].
    """
    batch, groups, length, size = v.shape
    rows = torch.arange(batch, dtype=torch.int32)[:, None, None, None] * (v.stride(0) // size)
    inner = torch.arange(groups, dtype=torch.int32)[:, None, None] * (v.stride(1) // size)
    tokens = torch.arange(length, dtype=torch.int32)
    if mask is not None:
        tokens = torch.minimum(tokens, mask.sum(dim=-1, keepdim=True, dtype=torch.int32) - 1)  # [B, 1, 1, S]
    indices = (rows + inner + tokens).expand(-1, -1, heads // groups, -1)  # [B, G, H/G, S]
    return indices.reshape(-1), torch.arange(0, batch * heads * length, length, dtype=torch.int32)


class MkldnnLinear(nn.Module):
    """``nn.Linear`` for inference, with its weight [out, in] in oneDNN's layout and an optional fused activation."""

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: tuple[str, str] = ("none", "")) -> None:
        """Pack ``weight``; ``activation`` is oneDNN's name of a function and of its algorithm."""
        super().__init__()
        self._weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _PACKED_BATCH_SIZE)
        self._bias = None if bias is None else bias.detach()
        self._activation, self._form = activation

    @classmethod
    def joined(cls, *parts: nn.Linear) -> Self:
        """Fuse layers with the same input into one; all have biases or none has."""
        biases = tuple(part.bias for part in parts)
        weight = torch.cat([part.weight for part in parts])  # [out, in]
        return cls(weight, None if biases[0] is None else torch.cat(biases))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` [..., in] to [..., out]."""
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, self._activation, [], self._form)
        return y


class MkldnnQKV:
    """The projections to q, k and v, fused."""

    def __init__(self, attention: MultiHeadAttention) -> None:
        parts = (attention.W_q, attention.W_k, attention.W_v)
        self._linear = MkldnnLinear.joined(*parts)
        self._heads = attention.heads
        self._sizes = [part.out_features // attention.head_size for part in parts]

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute ``MultiHeadAttention.project``."""
        return torch.split(self._heads(self._linear.forward(x)), self._sizes, dim=1)  # [B, H+G+G, T, K] -> three


class MkldnnSwiGLU(nn.Module):
    """``SwiGLU`` with gate and up projection fused."""

    def __init__(self, ffn: SwiGLU) -> None:
        super().__init__()
        self.gate_up, self.down = MkldnnLinear.joined(ffn.w1, ffn.w3), MkldnnLinear.joined(ffn.w2)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` [B, T, D] to [B, T, D]."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)  # [B, T, F] each
        y: Tensor = self.down(F.silu(gate) * up)
        return y


def pack(model: Transformer) -> Transformer:
    """Return a copy of ``model`` for inference with packed matrices.

    The copy shares all other parameters. Where packing gains nothing (on a GPU or another kind of CPU), return
    ``model`` itself.
    """
    weight = model.token_emb.weight
    on_x86 = weight.device.type == "cpu" and platform.machine() in ("x86_64", "AMD64")
    has_onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # untyped in torch
    if not (on_x86 and has_onednn and weight.dtype == torch.float32):
        return model
    packed = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    batched_attention = BatchedDecodeAttention()
    for module in packed.modules():
        if isinstance(module, MultiHeadAttention):
            object.__setattr__(module, "project", MkldnnQKV(module))
            module.attend = batched_attention
        if isinstance(module, FeedForward):
            module.fc1 = MkldnnLinear(module.fc1.weight, module.fc1.bias, ("gelu", "tanh"))  # type: ignore[assignment]
            module.activation = nn.Identity()  # type: ignore[assignment]
        for name, child in module.named_children():
            if isinstance(child, SwiGLU):
                setattr(module, name, MkldnnSwiGLU(child))
            elif isinstance(child, nn.Linear):
                setattr(module, name, MkldnnLinear.joined(child))
    _bypass_hooks(packed)
    return packed


def _bypass_hooks(model: Transformer) -> None:
    """Call ``forward`` of child modules directly: looking for hooks takes a fifth of a small model's time."""
    for module in model.modules():
        for name, child in module.named_children():
            if not isinstance(child, nn.ModuleList):
                object.__setattr__(module, name, child.forward)
    object.__setattr__(model, "blocks", [block.forward for block in model.blocks])
