"""Keys and values of what a model has read.

Shapes: B rows, T new tokens, S tokens seen (cached and new), G key and value heads, K head size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class KVCache:
    """Keys and values of the tokens that a model has read, so that each is computed once.

    Every row is a text of its own length, and new tokens stand behind those that the row holds. Memory is taken once,
    for ``max_length`` tokens a row. Setting a row's length to a smaller number forgets its last tokens. Only this class
    knows how many tokens are held: the model asks it for positions and mask.

    Attributes:
        keys: one tensor [B, G, max_length, K] per layer.
        values: one tensor [B, G, max_length, K] per layer.
        lengths: number of tokens that each row holds.
    """

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor], lengths: Sequence[int] | None = None) -> None:
        """Keep what is new in ``keys`` and ``values``, of which each row holds ``lengths`` tokens already (or none)."""
        self.keys, self.values = keys, values
        self.batch_size, _, self.max_length, _ = keys[0].shape
        self.lengths = list(lengths or [0] * self.batch_size)
        self._end = 0  # no row sees keys from here on
        self._places: tuple[Tensor, Tensor] | None = None  # rows [B, 1] and positions [B, T], where rows differ

    def prepare(self, batch_size: int, count: int) -> tuple[Tensor, Tensor | None]:
        """Return positions and mask of the next ``count`` tokens of each row.

        Returns:
            positions [T], or [B, T] where rows differ in length, and which tokens each may see: [T, S], [B, 1, T, S],
            or None where plain causality says so.

        Raises:
            ValueError: the cache was made for another number of rows, or a row has no room for them.
        """
        if batch_size != self.batch_size:
            raise ValueError(f"the cache is for a batch of {self.batch_size}, not of {batch_size}")
        longest = max(self.lengths)
        if longest + count > self.max_length:
            raise ValueError(f"the cache holds {longest} of at most {self.max_length} tokens: no room for {count} more")
        self._end = longest + count
        device = self.keys[0].device
        if min(self.lengths) == longest:
            self._places = None
            positions = torch.arange(longest, self._end, device=device)  # [T]
            if longest == 0 or count == 1:
                return positions, None
            return positions, torch.ones(count, self._end, dtype=torch.bool, device=device).tril(longest)
        held = torch.tensor(self.lengths, device=device)[:, None]  # [B, 1]
        positions = held + torch.arange(count, device=device)  # [B, T]
        self._places = torch.arange(batch_size, device=device)[:, None], positions
        return positions, torch.arange(self._end, device=device) <= positions[:, None, :, None]  # [B, 1, T, S]

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store new ``keys`` and ``values`` [B, G, T, K] of ``layer``; return all of that layer, [B, G, S, K] each."""
        stored = self.keys[layer], self.values[layer]
        for store, new in zip(stored, (keys, values), strict=True):
            if self._places is None:
                store[:, :, self._end - new.shape[2] : self._end] = new
            else:
                rows, positions = self._places
                store[rows, :, positions] = new.transpose(1, 2).to(store.dtype)  # [B, T, G, K]
        k, v = (store[:, :, : self._end].to(keys.dtype) for store in stored)
        return k, v

    def advance(self, count: int) -> None:
        """Count ``count`` more tokens in each row, once all layers have stored them."""
        self.lengths = [length + count for length in self.lengths]

    def rows(self, start: int, stop: int, lengths: Sequence[int]) -> "KVCache":
        """Return the rows from ``start`` to before ``stop`` as a cache of ``lengths``, which shares their memory."""
        keys, values = ([layer[start:stop] for layer in layers] for layers in (self.keys, self.values))
        return KVCache(keys, values, lengths)

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` tokens of a row to another one; only the memory, not the row's length."""
        for layer in (*self.keys, *self.values):
            layer[target, :, :length] = layer[source, :, :length]
