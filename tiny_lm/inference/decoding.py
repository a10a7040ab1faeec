"""The decoding engine: token by token, for several texts at once.

Shapes: B rows, T tokens of a prompt, D model width, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tiny_lm.inference.sampling import Sampling, penalize, sample
from tiny_lm.model import KVCache, Transformer

_RANDOM_NUMBERS = 64
"""So many are drawn at once for each row: a call for each costs more than the numbers."""


def prefill(model: Transformer, prompts: Sequence[Sequence[int]], cache: KVCache) -> Tensor:
    """Read prompts of any lengths into an empty cache.

    Args:
        model: on any device.
        prompts: one or more ids for each row, at most as many as the cache has room for.
        cache: of as many rows.

    Returns:
        the logits ``[B, V]`` after the last token of each.
    """
    lengths = [len(prompt) for prompt in prompts]
    ids = torch.zeros(len(prompts), max(lengths), dtype=torch.int64)  # [B, T]; behind short prompts anything may stand
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
    device = cache.keys[0].device
    hidden = model.hidden_states(ids.to(device), cache)  # [B, T, D]
    cache.lengths = lengths  # forgets what was read behind them
    last = torch.tensor(lengths, device=device) - 1
    logits: Tensor = model.lm_head(hidden[torch.arange(len(prompts), device=device), last])
    return logits


def decode_step(model: Transformer, tokens: Tensor, cache: KVCache) -> Tensor:
    """Read one more token for each row, ``[B]``, and return the logits ``[B, V]`` after it."""
    logits: Tensor = model.lm_head(model.hidden_states(tokens[:, None], cache)[:, 0])
    return logits


@dataclass(frozen=True)
class Drawn:
    """A token that was drawn for a row."""

    row: int
    id: int
    logprob: float | None = None
    """Its log-probability by the model alone, before temperature, truncation and penalties; None: not asked for."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens in its place, with their log-probabilities."""


class BatchDecoder:
    """Continues several texts at once, a token for each at every step.

    A row draws what it would draw alone: its random numbers are its own, and rows do not see each other. A text that
    outgrows the context goes on in a sliding window: its later half is read again, from position 0. So learned
    positions and rotary ones are treated alike, and the oldest text is forgotten half a context at a time.

    Attributes:
        active: the rows that are going on, in the order of the arguments.
    """

    def __init__(
        self,
        model: Transformer,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int | None],
        *,
        forbidden: Tensor,
        ends: Sequence[int] = (),
        min_new_tokens: int = 0,
        logprobs: int | None = None,
    ) -> None:
        """Prepare to continue ``prompts``.

        Args:
            model: on any device, in evaluation mode.
            prompts: ids, at least one for each row; of those beyond the context the last ones are read.
            sampling: temperature, truncation and penalties.
            seeds: of each row's random numbers; None for others each time.
            forbidden: mask ``[V]`` of tokens that are never drawn.
            ends: tokens that are not drawn before ``min_new_tokens`` others.
            min_new_tokens: see ``ends``.
            logprobs: tell log-probabilities, and those of so many likeliest tokens.
        """
        self._model, self._sampling, self._logprobs = model, sampling, logprobs
        self._texts = [list(prompt) for prompt in prompts]
        self._random = [_generator(seed) for seed in seeds]
        self._uniform = torch.zeros(len(prompts), 0)
        self._forbidden = forbidden
        self._early = forbidden.clone()
        self._early[list(ends)] = True
        self._min_new_tokens = min_new_tokens
        self._context = model.config.context_length
        self._cache = model.new_cache(len(prompts))
        self._rows = list(range(len(prompts)))  # the text of each row of the cache
        self._steps = 0
        self._tokens = torch.empty(0)  # [rows of the cache], the last ones drawn
        if sampling.looks_back:
            size = (len(prompts), model.config.vocab_size)
            self._counts = torch.zeros(size, device=forbidden.device)
            self._seen = torch.zeros(size, dtype=torch.bool, device=forbidden.device)
            for row, prompt in enumerate(prompts):
                self._seen[row, list(prompt)] = True
        self.active = list(range(len(prompts)))

    def finish(self, row: int) -> None:
        """Let a row end; its place is given back once half of all places have ended."""
        self.active.remove(row)
        if self.active and 2 * len(self.active) <= len(self._rows):
            places = [self._rows.index(row) for row in self.active]
            self._cache, self._tokens = self._cache.keep(places), self._tokens[places]
            self._rows = list(self.active)

    @torch.inference_mode()
    def step(self) -> list[Drawn]:
        """Draw one token for each active row."""
        logits = self._next_logits().float()  # [B, V]
        plain = logits
        logits = logits.masked_fill(self._early if self._steps < self._min_new_tokens else self._forbidden, -torch.inf)
        if self._sampling.looks_back:
            logits = penalize(logits, self._seen[self._rows], self._counts[self._rows], self._sampling)
        self._tokens = sample(logits, self._sampling, self._next_uniform())
        if self._sampling.looks_back:
            self._counts[self._rows, self._tokens] += 1
            self._seen[self._rows, self._tokens] = True
        self._steps += 1
        ids = self._tokens.tolist()
        for row, token in zip(self._rows, ids, strict=True):
            self._texts[row].append(token)
        told = self._tell(plain) if self._logprobs is not None else [(None, ())] * len(ids)
        return [
            Drawn(row, token, logprob, top)
            for row, token, (logprob, top) in zip(self._rows, ids, told, strict=True)
            if row in self.active
        ]

    def _next_logits(self) -> Tensor:
        """Return the logits ``[B, V]`` of the next token of each row of the cache."""
        if self._steps == 0:
            return prefill(self._model, [text[-self._context :] for text in self._texts], self._cache)
        for place, length in enumerate(self._cache.lengths):
            if length == self._context:
                self._slide(place)
        return decode_step(self._model, self._tokens, self._cache)

    def _slide(self, place: int) -> None:
        """Fill the row of the cache with the later half of its text, but for the last token, which is read next."""
        half = (self._context + 1) // 2
        known = self._texts[self._rows[place]][-half:-1]
        if known:
            prefill(self._model, [known], self._cache.row(place))
        self._cache.lengths[place] = len(known)

    def _next_uniform(self) -> Tensor:
        """Return a random number for each row of the cache, ``[B]``."""
        place = self._steps % _RANDOM_NUMBERS
        if place == 0:
            self._uniform = torch.stack([torch.rand(_RANDOM_NUMBERS, generator=each) for each in self._random])
        return self._uniform[self._rows, place].to(self._forbidden.device)

    def _tell(self, logits: Tensor) -> list[tuple[float | None, tuple[tuple[int, float], ...]]]:
        """Return for each row of ``logits`` the log-probability of what was drawn, and the likeliest tokens."""
        logprobs = logits.log_softmax(dim=-1)  # [B, V]
        drawn = logprobs.gather(-1, self._tokens[:, None]).squeeze(-1)
        values, ids = logprobs.topk(min(self._logprobs or 0, logits.shape[-1]), dim=-1)
        tops = [tuple(zip(*row, strict=True)) for row in zip(ids.tolist(), values.tolist(), strict=True)]
        return list(zip(drawn.tolist(), tops, strict=True))


def _generator(seed: int | None) -> torch.Generator:
    """Return a source of random numbers, which lie on the CPU so that every device draws the same."""
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator
