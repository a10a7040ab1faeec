"""A decode step that torch.compile makes for one text.

One text meets every matrix with one vector, so a step takes at least as long as reading all matrices once. Libraries
for matrix products, made for many vectors, read them at half the speed that the memory allows; written as a sum of
products, a matrix is read by a loop that the compiler writes, together with what stands before and after it. What is
computed is the forward of ``model/``, with other leaves.

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
"""So many float32 the processor adds at once."""


class GemvLinear(nn.Module):
    """``nn.Linear`` for few vectors, as a sum of products.

    The weight [out, in] lies as [out/L, in, L] in a copy: L outputs side by side are the L lanes of a register, so that
    memory is read in its order, and no sum goes across a register.
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
    """Do what :func:`~tiny_lm.model.attend` does for one query, which sees all keys, as sums of products."""
    batch, heads, queries, size = q.shape
    grouped = (q * size**-0.5).view(batch, k.shape[1], -1, 1, size)  # [B, H, 1, K] -> [B, G, H/G, 1, K]
    scores = (grouped * k.unsqueeze(2)).sum(dim=-1)  # [B, G, H/G, S]
    y: Tensor = (scores.softmax(dim=-1).unsqueeze(-1) * v.unsqueeze(2)).sum(dim=-2)  # [B, G, H/G, K]
    return y.view(batch, heads, queries, size)


class _TracedCache(KVCache):
    """A cache of one row whose length is that of a tensor: a number of Python would be a constant of the code.

    It has only what the model asks for while it is traced.
    """

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor], seen: Tensor) -> None:
        """Take keys and values [1, G, max_length, K] of each layer, and all positions [S], the new token's included."""
        self.keys, self.values, self._seen = keys, values, seen

    def prepare(self, batch_size: int, count: int) -> tuple[Tensor, Tensor | None]:
        """Return the position of the new token, [1], which sees all."""
        return self._seen[-1:], None

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store key and value [1, G, 1, K], and return all, [1, G, S, K] each."""
        stored = self.keys[layer], self.values[layer]
        for store, new in zip(stored, (keys, values), strict=True):
            store.index_copy_(2, self._seen[-1:], new)
        k, v = (store[:, :, : len(self._seen)] for store in stored)
        return k, v

    def advance(self, count: int) -> None:
        """Leave the length to the cache that has these tensors."""


def _summed(model: Transformer) -> Transformer:
    """Return a copy of ``model`` in sums of products; it shares all parameters but the matrices."""
    copied = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    for module in list(copied.modules()):
        if isinstance(module, MultiHeadAttention):
            module.attend = gemv_attention
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, GemvLinear(child))
    summed = [module for module in copied.modules() if isinstance(module, GemvLinear)]
    sizes = [module.weight.numel() for module in summed]
    for module, part in zip(summed, torch.split(_large_pages(sum(sizes)), sizes), strict=True):
        module.weight = part.view_as(module.weight).copy_(module.weight)
    return copied


def _large_pages(size: int) -> Tensor:
    """Return memory for so many float32, whose addresses cost the processor less to look up where the kernel allows.

    On Linux a page is then 2 MB instead of 4 kB, and a step reads all matrices in four fifths of the time.
    """
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size)
    memory = mmap.mmap(-1, 4 * size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel built without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.float32)


def _step(model: Transformer, tokens: Tensor, seen: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
    return decode_step(model, tokens, _TracedCache(keys, values, seen))


class CompiledStep:
    """Does what :func:`~tiny_lm.inference.decoding.decode_step` does with one model; for a single text, compiled.

    Compiling takes 5 to 30 seconds, and less the next time: torch keeps what its compiler made.
    """

    def __init__(self, model: Transformer) -> None:
        """Compile, and take a step.

        Raises:
            UserError: the model is not on a CPU, or there is no compiler.
        """
        device = model.token_emb.weight.device.type
        missing = missing_compiler("cpu") if device == "cpu" else f"the model is on {device}, not on a CPU"
        if missing:
            raise UserError(f"the decoding step cannot be compiled: {missing}")
        self._model = _summed(model)
        # torch.compile keeps its results with the code of a function, and only a few: each model has code of its own.
        own = FunctionType(_step.__code__.replace(), globals())
        options: dict[str, Any] = {
            # All calls come from here with the same shapes, so nothing is checked before each: that would cost a tenth.
            "guard_filter_fn": lambda guards: [False] * len(guards),
            "size_asserts": False,
            # What a product reads is computed before it, not once more for each row of the matrix: a fifth. Both are
            # needed; the second one also forbids to choose by timing, and nothing here is chosen so.
            "realize_reads_threshold": 0,
            "deterministic": True,
        }
        self._compiled = torch.compile(own, fullgraph=True, dynamic=False, options=options)
        cache = model.new_cache(1)
        self._positions = torch.arange(cache.max_length)
        with torch.inference_mode():
            seen = self._positions[:3]
            torch._dynamo.mark_dynamic(seen, 0)  # texts grow; every other size stays
            self._compiled(self._model, torch.tensor([0]), seen, cache.keys, cache.values)

    def __call__(self, model: Transformer, tokens: Tensor, cache: KVCache) -> Tensor:
        """Read one more token for each row, ``[B]``, and return the logits ``[B, V]`` after it.

        Args:
            model: the one that was compiled, in whatever layout is best for several rows, which it reads.
            tokens: ``[B]``.
            cache: of as many rows, made by the model for the whole context.
        """
        if cache.batch_size > 1:
            return decode_step(model, tokens, cache)
        assert cache.max_length == len(self._positions)  # the compiled code does not check
        seen = self._positions[: cache.lengths[0] + 1]
        logits: Tensor = self._compiled(self._model, tokens, seen, cache.keys, cache.values)
        cache.advance(1)
        return logits
