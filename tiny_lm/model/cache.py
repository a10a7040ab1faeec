"""KV cache.

Shapes: B rows, T new tokens, S all tokens (cached and new), G key-value heads, K head size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class KVCache:
    """Keys and values of earlier tokens, so that each is computed once.

    Every row is a sequence of its own length, to which new tokens are appended. Memory for ``max_length`` tokens per
    row is allocated once. Setting a row's length to a smaller number drops its last tokens. Only this class knows the
    number of cached tokens: the model asks it for positions and mask.

    Attributes:
        keys: one tensor [B, G, max_length, K] per layer.
        values: one tensor [B, G, max_length, K] per layer.
        lengths: number of cached tokens per row.
    """

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor], lengths: Sequence[int] | None = None) -> None:
        """Use ``keys`` and ``values`` as storage, in which each row has ``lengths`` tokens already (default: none)."""
        self.keys, self.values = keys, values
        self.batch_size, _, self.max_length, _ = keys[0].shape
        self.lengths = list(lengths or [0] * self.batch_size)
        self._end = 0  # no row attends to keys from here on
        self._indices: tuple[Tensor, Tensor] | None = None  # rows [B, 1] and positions [B, T], if lengths differ

    def prepare(self, batch_size: int, count: int) -> tuple[Tensor, Tensor | None]:
        """Return positions and mask of the next ``count`` tokens of each row.

        Returns:
            positions [T], or [B, T] if rows differ in length, and the mask: [T, S], [B, 1, T, S], or None if plain
            causal attention is right.

        Raises:
            ValueError: the cache has another number of rows, or a row has too little room.
        """
        if batch_size != self.batch_size:
            raise ValueError(f"the cache is for a batch of {self.batch_size}, not of {batch_size}")
        longest = max(self.lengths)
        if longest + count > self.max_length:
            raise ValueError(f"the cache holds {longest} of at most {self.max_length} tokens: no room for {count} more")
        self._end = longest + count
        device = self.keys[0].device
        if min(self.lengths) == longest:
            self._indices = None
            positions = torch.arange(longest, self._end, device=device)  # [T]
            if longest == 0 or count == 1:
                return positions, None
            return positions, torch.ones(count, self._end, dtype=torch.bool, device=device).tril(longest)
        cached = torch.tensor(self.lengths, device=device)[:, None]  # [B, 1]
        positions = cached + torch.arange(count, device=device)  # [B, T]
        self._indices = torch.arange(batch_size, device=device)[:, None], positions
        return positions, torch.arange(self._end, device=device) <= positions[:, None, :, None]  # [B, 1, T, S]

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store new ``keys`` and ``values`` [B, G, T, K] of ``layer``; return all of that layer, [B, G, S, K] each."""
        stored = self.keys[layer], self.values[layer]
        for store, new in zip(stored, (keys, values), strict=True):
            if self._indices is None:
                store[:, :, self._end - new.shape[2] : self._end] = new
            else:
                rows, positions = self._indices
                store[rows, :, positions] = new.transpose(1, 2).to(store.dtype)  # [B, T, G, K]
        k, v = (store[:, :, : self._end].to(keys.dtype) for store in stored)
        return k, v

    def advance(self, count: int) -> None:
        """Add ``count`` to each row's length, once all layers have stored their tokens."""
        self.lengths = [length + count for length in self.lengths]

    def rows(self, start: int, stop: int, lengths: Sequence[int]) -> "KVCache":
        """Return rows ``start`` to ``stop`` (exclusive) as a cache with ``lengths`` that shares their memory."""
        keys, values = ([layer[start:stop] for layer in layers] for layers in (self.keys, self.values))
        return KVCache(keys, values, lengths)

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` tokens of a row to another one; lengths are not changed."""
        for layer in (*self.keys, *self.values):
            layer[target, :, :length] = layer[source, :, :length]
