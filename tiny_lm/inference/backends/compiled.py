"""A decode step for a single sequence, compiled by torch.compile.

Decoding one sequence multiplies every matrix by one vector, so a step takes at least as long as reading all matrices
once. Libraries for matrix products are optimized for many vectors and read them at half the memory bandwidth. Written
as a sum of products, a matrix-vector product becomes a loop of the compiler's, fused with the operations around it. The
forward pass is that of ``model/``; only its leaf modules are replaced.

Shapes as in :mod:`tiny_lm.model.attention`.
"""

import contextlib
import copy
import mmap
from collections.abc import Sequence
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiny_lm.errors import UserError
from tiny_lm.hardware.compiler import missing_compiler
from tiny_lm.inference.decoding import decode_step
from tiny_lm.model import KVCache, MultiHeadAttention, Transformer

_LANES = 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8
"""Number of float32 in a vector register."""


class GemvLinear(nn.Module):
    """``nn.Linear`` as a matrix-vector product that the compiler vectorizes.

    The weight [out, in] is copied to the layout [out/L, in, L]: L adjacent outputs are the L lanes of a register, so
    memory is read sequentially, and no sum crosses lanes.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = F.pad(linear.weight.detach(), (0, 0, 0, -linear.out_features % _LANES))
        self.weight = weight.view(-1, _LANES, linear.in_features).transpose(1, 2).contiguous()  # [out/L, in, L]
        self.bias, self._size = linear.bias, linear.out_features

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` [..., in] to [..., out]."""
        sums = (x[..., None, :, None] * self.weight).sum(dim=-2)  # [..., 1, in, 1] * [out/L, in, L] -> [..., out/L, L]
        y: Tensor = sums.flatten(-2)[..., : self._size]  # [..., out]
        return y if self.bias is None else y + self.bias


def gemv_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout_p: float = 0.0) -> Tensor:
    """Compute :func:`~tiny_lm.model.attend` for one query that sees all keys, as sums of products."""
    batch, heads, queries, size = q.shape
    grouped = (q * size**-0.5).view(batch, k.shape[1], -1, 1, size)  # [B, H, 1, K] -> [B, G, H/G, 1, K]
    scores = (grouped * k.unsqueeze(2)).sum(dim=-1)  # [B, G, H/G, S]
    y: Tensor = (scores.softmax(dim=-1).unsqueeze(-1) * v.unsqueeze(2)).sum(dim=-2)  # [B, G, H/G, K]
    return y.view(batch, heads, queries, size)


class _TracedCache(KVCache):
    """A cache of one row whose length is that of a tensor: a Python number would be a constant of the compiled code.

    It implements only what the model uses while it is traced.
    """

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor], positions: Tensor) -> None:
        """Wrap keys and values [1, G, max_length, K] of each layer; ``positions`` [S] includes the new token's."""
        self.keys, self.values, self._positions = keys, values, positions

    def prepare(self, batch_size: int, count: int) -> tuple[Tensor, Tensor | None]:
        """Return the position of the new token, [1]; no mask is needed."""
        return self._positions[-1:], None

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store key and value [1, G, 1, K], and return all, [1, G, S, K] each."""
        stored = self.keys[layer], self.values[layer]
        for store, new in zip(stored, (keys, values), strict=True):
            store.index_copy_(2, self._positions[-1:], new)
        k, v = (store[:, :, : len(self._positions)] for store in stored)
        return k, v

    def advance(self, count: int) -> None:
        """Do nothing: the caller advances the cache that owns these tensors."""


def _with_gemv(model: Transformer) -> Transformer:
    """Return a copy of ``model`` with :class:`GemvLinear` layers; it shares all parameters except the matrices."""
    copied = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    for module in list(copied.modules()):
        if isinstance(module, MultiHeadAttention):
            module.attend = gemv_attention
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, GemvLinear(child))
    layers = [module for module in copied.modules() if isinstance(module, GemvLinear)]
    sizes = [module.weight.numel() for module in layers]
    for module, part in zip(layers, torch.split(_huge_pages(sum(sizes)), sizes), strict=True):
        module.weight = part.view_as(module.weight).copy_(module.weight)
    return copied


def _huge_pages(size: int) -> Tensor:
    """Return uninitialized memory for ``size`` float32, in huge pages where the kernel has them.

    On Linux a page is then 2 MB instead of 4 kB, which saves TLB misses: a step takes four fifths of the time.
    """
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size)
    memory = mmap.mmap(-1, 4 * size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel built without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.float32)


def _step(
    model: Transformer, tokens: Tensor, positions: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]
) -> Tensor:
    return decode_step(model, tokens, _TracedCache(keys, values, positions))


class CompiledStep:
    """Replacement of :func:`~tiny_lm.inference.decoding.decode_step` for one model, compiled for a single sequence.

    Compiling takes 5 to 30 seconds, and less the next time, since torch caches the compiled code.
    """

    def __init__(self, model: Transformer) -> None:
        """Compile, which runs a step.

        Raises:
            UserError: the model is not on a CPU, or no compiler is installed.
        """
        device = model.token_emb.weight.device.type
        missing = missing_compiler("cpu") if device == "cpu" else f"the model is on {device}, not on a CPU"
        if missing:
            raise UserError(f"the decoding step cannot be compiled: {missing}")
        self._model = _with_gemv(model)
        # torch.compile stores its results by code object, and only a few for each: each model gets a copy of the code.
        step = FunctionType(_step.__code__.replace(), globals())
        options: dict[str, Any] = {
            # All calls come from here with the same shapes, so guards are not checked: they take a tenth of the time.
            "guard_filter_fn": lambda guards: [False] * len(guards),
            "size_asserts": False,
            # Compute the input of a product before it, not again for each row of the matrix: saves a fifth. Both are
            # needed; the second one also disables autotuning, which nothing here uses.
            "realize_reads_threshold": 0,
            "deterministic": True,
        }
        self._compiled = torch.compile(step, fullgraph=True, dynamic=False, options=options)
        cache = model.new_cache(1)
        self._positions = torch.arange(cache.max_length)
        with torch.inference_mode():
            positions = self._positions[:3]
            torch._dynamo.mark_dynamic(positions, 0)  # sequences grow; every other size is static
            self._compiled(self._model, torch.tensor([0]), positions, cache.keys, cache.values)

    def __call__(self, model: Transformer, tokens: Tensor, cache: KVCache) -> Tensor:
        """Append one token to each row, ``[B]``, and return the logits ``[B, V]`` after it.

        ``cache`` is allocated for the whole context. ``model``, the same one in the layout for batches, is used for
        more than one row.
        """
        if cache.batch_size > 1:
            return decode_step(model, tokens, cache)
        assert cache.max_length == len(self._positions)  # the compiled code does not check it
        positions = self._positions[: cache.lengths[0] + 1]
        logits: Tensor = self._compiled(self._model, tokens, positions, cache.keys, cache.values)
        cache.advance(1)
        return logits
