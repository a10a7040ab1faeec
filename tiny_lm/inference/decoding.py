"""Prefill and decode step: forward passes with a KV cache.

Shapes: B sequences, T tokens of a prompt, D model width, V vocabulary.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tiny_lm.model import KVCache, Transformer

LENGTH_MULTIPLE = 16
"""Prompts are padded to a multiple of this: oneDNN compiles and caches a kernel for each new shape."""


def prefill_hidden(model: Transformer, prompts: Sequence[Sequence[int]], cache: KVCache) -> Tensor:
    """Run prompts of any lengths through the model, each after what its row of the cache holds.

    Args:
        model: on any device.
        prompts: one or more ids for each row; the cache has room for the longest of them after its longest row.
        cache: has one row for each prompt.

    Returns:
        the input of the head, ``[B, T, D]``; T is at least the length of the longest prompt, and values after the end
        of a prompt are meaningless.
    """
    lengths = [len(prompt) for prompt in prompts]
    num_cached = cache.lengths
    width = min(-(-max(lengths) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE, cache.max_length - max(num_cached))
    ids = torch.zeros(len(prompts), width, dtype=torch.int64)  # [B, T]; the padding may be any token
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
    hidden = model.hidden_states(ids.to(cache.keys[0].device), cache)  # [B, T, D]
    cache.lengths = [a + b for a, b in zip(num_cached, lengths, strict=True)]  # drops the padding
    return hidden


def prefill(model: Transformer, prompts: Sequence[Sequence[int]], cache: KVCache) -> Tensor:
    """Prefill as :func:`prefill_hidden` does, and return the logits ``[B, V]`` after the last token of each prompt."""
    hidden = prefill_hidden(model, prompts, cache)  # [B, T, D]
    last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=hidden.device)
    logits: Tensor = model.lm_head(hidden[torch.arange(len(prompts), device=hidden.device), last])
    return logits


def decode_step(model: Transformer, tokens: Tensor, cache: KVCache) -> Tensor:
    """Append one token to each row, ``[B]``, and return the logits ``[B, V]`` after it."""
    logits: Tensor = model.lm_head(model.hidden_states(tokens[:, None], cache)[:, 0])
    return logits


DecodeStep = Callable[[Transformer, Tensor, KVCache], Tensor]
"""The signature of :func:`decode_step`."""
