"""The decoding engine: token by token, for several texts at once.

Shapes: B rows, T tokens of a prompt, D model width, V vocabulary.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tiny_lm.errors import UserError
from tiny_lm.inference.sampling import SamplingParams, penalize, sample
from tiny_lm.model import KVCache, Transformer

_RANDOM_NUMBERS = 64
"""So many are drawn at once for each row: a call for each costs more than the numbers."""

_ROUND = 16
"""Prompts are read in lengths that are multiples of this: oneDNN compiles, and keeps, a product for each new shape."""

_PATIENCE = 8
"""A prompt waits at most so many steps for others, which cost little more together, and none where there is one prompt
or more to so many rows that draw."""


def read(model: Transformer, prompts: Sequence[Sequence[int]], cache: KVCache) -> Tensor:
    """Read prompts of any lengths, each behind what its row of the cache holds.

    Args:
        model: on any device.
        prompts: one or more ids for each row; the cache has room for the longest of them behind its longest row.
        cache: of as many rows.

    Returns:
        what the head sees, ``[B, T, D]``; T is the length of the longest prompt or more, and what stands behind a
        prompt means nothing.
    """
    lengths = [len(prompt) for prompt in prompts]
    held = cache.lengths
    width = min(-(-max(lengths) // _ROUND) * _ROUND, cache.max_length - max(held))
    ids = torch.zeros(len(prompts), width, dtype=torch.int64)  # [B, T]; behind short prompts anything may stand
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
    hidden = model.hidden_states(ids.to(cache.keys[0].device), cache)  # [B, T, D]
    cache.lengths = [a + b for a, b in zip(held, lengths, strict=True)]  # forgets what was read behind them
    return hidden


def prefill(model: Transformer, prompts: Sequence[Sequence[int]], cache: KVCache) -> Tensor:
    """Read prompts as :func:`read` does, and return the logits ``[B, V]`` after the last token of each."""
    hidden = read(model, prompts, cache)  # [B, T, D]
    last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=hidden.device)
    logits: Tensor = model.lm_head(hidden[torch.arange(len(prompts), device=hidden.device), last])
    return logits


def decode_step(model: Transformer, tokens: Tensor, cache: KVCache) -> Tensor:
    """Read one more token for each row, ``[B]``, and return the logits ``[B, V]`` after it."""
    logits: Tensor = model.lm_head(model.hidden_states(tokens[:, None], cache)[:, 0])
    return logits


DecodeStep = Callable[[Transformer, Tensor, KVCache], Tensor]
"""What :func:`decode_step` is."""


@dataclass(frozen=True)
class Drawn:
    """A token that was drawn for a row."""

    row: int
    id: int
    logprob: float | None = None
    """Its log-probability by the model alone, before temperature, truncation and penalties; None: not asked for."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens in its place, with their log-probabilities."""


@dataclass(frozen=True, eq=False)
class Continuation:
    """What a row is to continue, and how.

    Attributes:
        prompt: ids, at least one; of those beyond the context the last ones are read.
        forbidden: mask ``[V]`` of tokens that are never drawn, but for ``ends``.
        sampling: temperature, truncation and penalties.
        seed: of the row's random numbers; None for others each time.
        ends: tokens that end the text, and are not drawn before ``min_new_tokens`` others.
        min_new_tokens: see ``ends``.
        logprobs: tell log-probabilities, and those of so many likeliest tokens.
    """

    prompt: Sequence[int]
    forbidden: Tensor
    sampling: SamplingParams = field(default_factory=SamplingParams)
    seed: int | None = None
    ends: Sequence[int] = ()
    min_new_tokens: int = 0
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if self.seed is not None and not -(2**63) <= self.seed < 2**64:
            raise UserError(f"a seed must be between -2^63 and 2^64 - 1 (it is {self.seed})")


class _Row:
    """A text in a row, and how far it has come."""

    def __init__(self, wanted: Continuation, context: int) -> None:
        self.wanted = wanted
        self.text = list(wanted.prompt)
        self.window = self.text[-context:]  # what is read before the next token is drawn
        self.held = 0  # tokens of the text in the cache
        self.steps = 0
        self._random = _generator(wanted.seed)
        self._uniform: list[float] = []

    def next_uniform(self) -> float:
        """Return the next random number of [0, 1), a float32."""
        place = self.steps % _RANDOM_NUMBERS
        if place == 0:
            self._uniform = torch.rand(_RANDOM_NUMBERS, generator=self._random).tolist()
        return self._uniform[place]


class BatchDecoder:
    """Continues several texts at once, a token for each at every step.

    Texts join and leave between steps. A row draws what it would draw alone: its random numbers are its own, and rows
    do not see each other. A text that outgrows the context goes on in a sliding window: its later half is read again,
    from position 0. So learned positions and rotary ones are treated alike, and the oldest text is forgotten half a
    context at a time.

    The rows that draw lie side by side at the beginning of the cache, so that a step costs what its rows cost: where
    one leaves, the last one moves. A prompt is read behind them; then its row is one of them.
    """

    def __init__(
        self,
        model: Transformer,
        rows: int,
        *,
        length: int | None = None,
        prompt_tokens: int | None = None,
        step: DecodeStep = decode_step,
    ) -> None:
        """Have room for texts.

        Args:
            model: on any device, in evaluation mode.
            rows: most texts at once.
            length: most tokens of a text, its prompt included, where that is known: memory is taken for these only.
            prompt_tokens: at most so many tokens of prompts are read in a step, so that long ones do not keep the
                other rows waiting; None for all there are.
            step: does what :func:`decode_step` does.
        """
        self._model, self._decode_step = model, step
        self._context = model.config.context_length
        self._prompt_tokens = rows * self._context if prompt_tokens is None else prompt_tokens
        longest = self._context if length is None else -(-length // _ROUND) * _ROUND
        self._cache = model.new_cache(rows, min(longest, self._context))
        self._device = self._cache.keys[0].device
        self._rows: dict[int, _Row] = {}
        self._free = list(range(rows))[::-1]
        self._drawing: list[int] = []  # the row at each place of the cache
        self._reading: deque[int] = deque()  # rows whose window is not yet read, but for a part of the first one's
        self._waited = 0  # steps that the first of them has waited for others
        # Added to logits [B, V]: minus infinity for tokens that may not be drawn.
        self._biases = torch.zeros(rows, model.config.vocab_size, device=self._device)
        self._seen = self._counts = torch.zeros(0, device=self._device)  # made when a penalty is
        self._view: KVCache | None = None  # of the rows that draw; None when these have changed
        self._groups: list[_Group] = []  # of the same rows; empty when they have changed
        self._bias = self._biases[:0]  # of the same rows

    @property
    def free(self) -> int:
        """Number of texts that can join."""
        return len(self._free)

    @torch.inference_mode()
    def join(self, wanted: Continuation) -> int:
        """Take a text in, whose first token is drawn as soon as its prompt is read; return its row.

        Raises:
            IndexError: there is no free row.
        """
        row = self._free.pop()
        self._rows[row] = _Row(wanted, self._context)
        self._reading.append(row)
        self._biases[row] = torch.where(wanted.forbidden, -torch.inf, 0.0)
        self._biases[row, list(wanted.ends)] = -torch.inf if wanted.min_new_tokens > 0 else 0.0
        if wanted.sampling.uses_penalties:
            if not len(self._seen):
                self._seen = torch.zeros_like(self._biases, dtype=torch.bool)
                self._counts = torch.zeros_like(self._biases)
            self._seen[row] = self._counts[row] = 0
            self._seen[row, list(wanted.prompt)] = True
        return row

    @torch.inference_mode()
    def finish(self, row: int) -> None:
        """Let a row end, and give its place back."""
        if row in self._reading:
            self._reading.remove(row)
        else:
            self._leave(row)
        del self._rows[row]
        self._free.append(row)

    @torch.inference_mode()
    def step(self) -> list[Drawn]:
        """Draw one token for each row, but for those whose prompt is still to be read."""
        self._slide()
        logits = [self._decode_step(self._model, *self._last_tokens())] if self._drawing else []
        for row in self._drawing:
            self._rows[row].held += 1
        logits += self._read()
        if not logits:
            return []
        return self._draw(torch.cat(logits).float() if len(logits) > 1 else logits[0].float())

    def _last_tokens(self) -> tuple[Tensor, KVCache]:
        """Return the last token of each row that draws, ``[B]``, and the part of the cache that these rows have."""
        rows = [self._rows[row] for row in self._drawing]
        if self._view is None:
            self._view = self._cache.rows(0, len(rows), [row.held for row in rows])
        return torch.tensor([row.text[-1] for row in rows], device=self._device), self._view

    def _slide(self) -> None:
        """Let rows whose context is full read the later half of their text again."""
        for row in [row for row in self._drawing[::-1] if self._rows[row].held == self._context]:
            self._leave(row)
            state = self._rows[row]
            state.window, state.held = state.text[-((self._context + 1) // 2) :], 0
            self._reading.append(row)

    def _leave(self, row: int) -> None:
        """Take a row out of those that draw, and close the gap."""
        place, last = self._drawing.index(row), len(self._drawing) - 1
        if place != last:
            self._drawing[place] = self._drawing[last]
            self._cache.copy_row(last, place, self._rows[self._drawing[place]].held)
        self._drawing.pop()
        if self._reading and (held := self._rows[self._reading[0]].held):
            self._cache.copy_row(last + 1, last, held)
        self._changed()

    def _changed(self) -> None:
        self._view, self._groups = None, []

    def _read(self) -> list[Tensor]:
        """Read prompts, and let those rows draw that are ready; return their logits, ``[B, V]`` in some parts."""
        if self._wait_for_more():
            return []
        left, logits = self._prompt_tokens, []
        while self._reading and left > 0:
            rows = [self._rows[row] for row in self._readable(left)]
            parts = [row.window[row.held : row.held + left] for row in rows]
            place = len(self._drawing)
            cache = self._cache.rows(place, place + len(rows), [row.held for row in rows])
            read = prefill(self._model, parts, cache)  # [B, V]
            left -= len(parts) * max(map(len, parts))
            for row, part in zip(rows, parts, strict=True):
                row.held += len(part)
            if rows[0].held < len(rows[0].window):
                break
            self._drawing += [self._reading.popleft() for _ in rows]
            self._changed()
            logits.append(read)
        return logits

    def _wait_for_more(self) -> bool:
        """Return whether the rows that draw go on alone for a step, so that more prompts are read together."""
        few = 0 < len(self._reading) * _PATIENCE < len(self._drawing)
        begun = few and self._rows[self._reading[0]].held > 0
        self._waited = self._waited + 1 if few and not begun and self._waited < _PATIENCE else 0
        return self._waited > 0

    def _readable(self, most: int) -> list[int]:
        """Return the rows that are read next: the first one, and those after it which ``most`` tokens have room for."""
        first, *others = self._reading
        chosen, longest = [first], len(self._rows[first].window)
        if self._rows[first].held:
            return chosen
        for row in others:
            longest = max(longest, len(self._rows[row].window))
            if longest * (len(chosen) + 1) > most:
                break
            chosen.append(row)
        return chosen

    def _draw(self, plain: Tensor) -> list[Drawn]:
        """Draw a token for each row from its logits, ``[B, V]``."""
        if not self._groups:
            self._groups = self._grouped()
            self._bias = self._biases[self._drawing]  # [B, V]
        rows = [self._rows[row] for row in self._drawing]
        logits = plain + self._bias
        uniform = torch.tensor([row.next_uniform() for row in rows], device=self._device)
        ids = [0] * len(rows)
        for group in self._groups:
            for place, token in zip(group.places, self._sample(group, logits, uniform), strict=True):
                ids[place] = token
        for number, row, token in zip(self._drawing, rows, ids, strict=True):
            row.text.append(token)
            row.steps += 1
            if row.steps == row.wanted.min_new_tokens:
                self._biases[number, list(row.wanted.ends)] = 0.0
                self._groups = []
        told = self._tell(plain, ids)
        return [
            Drawn(row, token, *told.get(place, ()))
            for place, (row, token) in enumerate(zip(self._drawing, ids, strict=True))
        ]

    def _grouped(self) -> list["_Group"]:
        """Return the places of rows that are sampled alike."""
        alike: dict[SamplingParams, list[int]] = {}
        for place, row in enumerate(self._drawing):
            alike.setdefault(self._rows[row].wanted.sampling, []).append(place)
        return [_Group(sampling, places) for sampling, places in alike.items()]

    def _sample(self, group: "_Group", logits: Tensor, uniform: Tensor) -> list[int]:
        """Draw for the rows of one group."""
        rows = [self._drawing[place] for place in group.places]
        if len(rows) < len(self._drawing):
            logits, uniform = logits[group.places], uniform[group.places]
        if group.sampling.uses_penalties:
            logits = penalize(logits, self._seen[rows], self._counts[rows], group.sampling)
        tokens = sample(logits, group.sampling, uniform)
        if group.sampling.uses_penalties:
            self._counts[rows, tokens] += 1
            self._seen[rows, tokens] = True
        ids: list[int] = tokens.tolist()
        return ids

    def _tell(self, logits: Tensor, ids: list[int]) -> dict[int, tuple[float, tuple[tuple[int, float], ...]]]:
        """Return, by place, log-probability and likeliest tokens for the rows that ask for them."""
        wanted = [self._rows[row].wanted.logprobs for row in self._drawing]
        places = [place for place, count in enumerate(wanted) if count is not None]
        if not places:
            return {}
        logprobs = logits[places].log_softmax(dim=-1)  # [B, V]
        drawn = logprobs.gather(-1, torch.tensor([[ids[place]] for place in places], device=self._device))
        most = max(wanted[place] or 0 for place in places)
        values, likeliest = (part.tolist() for part in logprobs.topk(min(most, logprobs.shape[-1]), dim=-1))
        tops = [tuple(zip(*pair, strict=True)) for pair in zip(likeliest, values, strict=True)]
        return {
            place: (logprob, top[: wanted[place]])
            for place, logprob, top in zip(places, drawn.squeeze(-1).tolist(), tops, strict=True)
        }


@dataclass(frozen=True)
class _Group:
    """Rows that are sampled alike, by their places among those that draw."""

    sampling: SamplingParams
    places: list[int]


def _generator(seed: int | None) -> torch.Generator:
    """Return a source of random numbers, which lie on the CPU so that every device draws the same."""
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator
