"""Batched decoding: one token for each running sequence and step.

Shapes: B running sequences, V vocabulary.
"""

from collections import deque

import torch
from torch import Tensor

from tiny_lm.inference.decoding import LENGTH_MULTIPLE, DecodeStep, decode_step, prefill
from tiny_lm.inference.request import TokenLogprobs
from tiny_lm.inference.sampling import SamplingParams, penalize, sample
from tiny_lm.inference.sequence import SequenceState
from tiny_lm.model import KVCache, Transformer

_MAX_PREFILL_DELAY = 8
"""Maximum number of steps that a new prompt waits for others: prefilling several costs little more than one alone.
It does not wait if there is at least one waiting prompt for every 8 running sequences."""


class BatchDecoder:
    """Decodes several sequences together; they are added and removed between steps (continuous batching).

    Each gets the tokens that it would get alone: it has its own random numbers, and rows of the cache do not see each
    other. A sequence that outgrows the context continues in a sliding window: its later half is prefilled again, from
    position 0. So learned and rotary positions are treated alike, and the oldest text is dropped half a context at a
    time.

    Running sequences occupy the first rows of the cache, so a step costs no more than these rows: when one is removed,
    the last one moves into its row. Prompts are prefilled into the rows after them.
    """

    def __init__(
        self,
        model: Transformer,
        slots: int,
        *,
        max_length: int | None = None,
        max_prefill_tokens: int | None = None,
        step: DecodeStep = decode_step,
    ) -> None:
        """Allocate the cache.

        Args:
            model: on any device, in evaluation mode.
            slots: maximum number of sequences.
            max_length: maximum tokens of a sequence, prompt included, for a smaller cache; None for the whole context.
            max_prefill_tokens: maximum number of prompt tokens per step, so that long prompts do not stall running
                sequences; None for no limit.
            step: replacement of :func:`decode_step`.
        """
        self._model, self._decode_step = model, step
        self._context_length = model.config.context_length
        self._max_prefill_tokens = slots * self._context_length if max_prefill_tokens is None else max_prefill_tokens
        rounded = self._context_length if max_length is None else -(-max_length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
        self._cache = model.new_cache(slots, min(rounded, self._context_length))
        self._device = self._cache.keys[0].device
        self._free_slots = list(range(slots))[::-1]
        self._running: list[SequenceState] = []  # by cache row
        self._waiting: deque[SequenceState] = deque()  # to be prefilled; only the first one may be partly prefilled
        self._prefill_delay = 0  # steps that the first of them has waited for others
        # Added to logits [slots, V]: minus infinity for tokens that must not be sampled.
        self._biases = torch.zeros(slots, model.config.vocab_size, device=self._device)
        self._seen = self._counts = torch.zeros(0, device=self._device)  # allocated for the first penalty
        # Derived from the running sequences, and rebuilt when these change:
        self._cache_view: KVCache | None = None
        self._groups: dict[SamplingParams, list[int]] = {}  # rows that are sampled together
        self._bias = self._biases[:0]  # [B, V]

    def __len__(self) -> int:
        return len(self._running) + len(self._waiting)

    @property
    def num_free_slots(self) -> int:
        """Number of sequences that can be added."""
        return len(self._free_slots)

    @torch.inference_mode()
    def add(self, sequence: SequenceState) -> None:
        """Add a sequence that has not ended; its first token is sampled as soon as its prompt is prefilled.

        Raises:
            IndexError: no slot is free.
        """
        slot = sequence.slot = self._free_slots.pop()
        sequence.context = sequence.token_ids[-self._context_length :]
        self._waiting.append(sequence)
        self._biases[slot] = torch.where(sequence.suppress_mask, -torch.inf, 0.0)
        self._biases[slot, sequence.stop_token_ids] = -torch.inf if sequence.config.min_new_tokens > 0 else 0.0
        if sequence.config.uses_penalties:
            if not len(self._seen):
                self._seen = torch.zeros_like(self._biases, dtype=torch.bool)
                self._counts = torch.zeros_like(self._biases)
            self._seen[slot] = self._counts[slot] = 0
            self._seen[slot, sequence.prompt_ids] = True

    @torch.inference_mode()
    def remove(self, sequence: SequenceState) -> None:
        """Remove a sequence and free its slot.

        Raises:
            ValueError: it is not in the batch.
        """
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        else:
            self._stop_running(sequence)
        self._free_slots.append(sequence.slot)

    @torch.inference_mode()
    def step(self) -> list[SequenceState]:
        """Sample a token for each sequence whose prompt is prefilled and remove those that it ends; return them all."""
        self._slide_windows()
        logits = [self._decode_step(self._model, *self._last_tokens())] if self._running else []
        for sequence in self._running:
            sequence.num_cached += 1
        logits += self._prefill()
        if not logits:
            return []
        updated = list(self._running)
        self._sample(torch.cat(logits).float() if len(logits) > 1 else logits[0].float())
        for sequence in updated:
            if sequence.finish_reason is not None:
                self.remove(sequence)
        return updated

    def _last_tokens(self) -> tuple[Tensor, KVCache]:
        """Return the last token of each running sequence, ``[B]``, and their rows of the cache."""
        if self._cache_view is None:
            num_cached = [sequence.num_cached for sequence in self._running]
            self._cache_view = self._cache.rows(0, len(self._running), num_cached)
        return torch.tensor(
            [sequence.token_ids[-1] for sequence in self._running], device=self._device
        ), self._cache_view

    def _slide_windows(self) -> None:
        """Queue sequences whose context is full to prefill the later half of their context again."""
        for sequence in [each for each in self._running[::-1] if each.num_cached == self._context_length]:
            self._stop_running(sequence)
            sequence.context, sequence.num_cached = sequence.token_ids[-((self._context_length + 1) // 2) :], 0
            self._waiting.append(sequence)

    def _stop_running(self, sequence: SequenceState) -> None:
        """Remove a running sequence and close its gap in the cache."""
        row, last = self._running.index(sequence), len(self._running) - 1
        if row != last:
            self._running[row] = self._running[last]
            self._cache.copy_row(last, row, self._running[row].num_cached)
        self._running.pop()
        if self._waiting and (num_cached := self._waiting[0].num_cached):
            self._cache.copy_row(last + 1, last, num_cached)
        self._invalidate()

    def _invalidate(self) -> None:
        self._cache_view, self._groups = None, {}

    def _prefill(self) -> list[Tensor]:
        """Prefill waiting prompts and start the complete ones; return the logits ``[B, V]`` of each pass, in order."""
        if self._delay_prefill():
            return []
        budget, logits = self._max_prefill_tokens, []
        while self._waiting and budget > 0:
            sequences = self._next_prefill(budget)
            parts = [each.context[each.num_cached : each.num_cached + budget] for each in sequences]
            row = len(self._running)
            cache = self._cache.rows(row, row + len(sequences), [each.num_cached for each in sequences])
            last_logits = prefill(self._model, parts, cache)  # [B, V]
            budget -= len(parts) * max(map(len, parts))
            for sequence, part in zip(sequences, parts, strict=True):
                sequence.num_cached += len(part)
            if sequences[0].num_cached < len(sequences[0].context):
                break
            self._running += [self._waiting.popleft() for _ in sequences]
            self._invalidate()
            logits.append(last_logits)
        return logits

    def _delay_prefill(self) -> bool:
        """Return whether this step only decodes, so that more prompts are prefilled together later."""
        few = 0 < len(self._waiting) * _MAX_PREFILL_DELAY < len(self._running)
        started = few and self._waiting[0].num_cached > 0
        delay = few and not started and self._prefill_delay < _MAX_PREFILL_DELAY
        self._prefill_delay = self._prefill_delay + 1 if delay else 0
        return delay

    def _next_prefill(self, budget: int) -> list[SequenceState]:
        """Return the sequences to prefill next: the first one, and those after it that fit into ``budget`` tokens."""
        first, *others = self._waiting
        chosen, longest = [first], len(first.context)
        if first.num_cached:
            return chosen
        for sequence in others:
            longest = max(longest, len(sequence.context))
            if longest * (len(chosen) + 1) > budget:
                break
            chosen.append(sequence)
        return chosen

    def _sample(self, raw_logits: Tensor) -> None:
        """Sample a token for each running sequence from its logits, ``[B, V]``, and append it."""
        if not self._groups:
            for row, sequence in enumerate(self._running):
                self._groups.setdefault(sequence.config.sampling, []).append(row)
            self._bias = self._biases[[sequence.slot for sequence in self._running]]  # [B, V]
        logits = raw_logits + self._bias
        uniform = torch.tensor([sequence.next_uniform() for sequence in self._running], device=self._device)
        ids = [0] * len(self._running)
        for params, rows in self._groups.items():
            for row, token_id in zip(rows, self._sample_group(params, rows, logits, uniform), strict=True):
                ids[row] = token_id
        logprobs = self._collect_logprobs(raw_logits, ids)
        for row, sequence in enumerate(self._running):
            sequence.append(ids[row], logprobs.get(row))
            if sequence.num_generated == sequence.config.min_new_tokens:
                self._biases[sequence.slot, sequence.stop_token_ids] = 0.0
                self._groups = {}

    def _sample_group(self, params: SamplingParams, rows: list[int], logits: Tensor, uniform: Tensor) -> list[int]:
        """Sample for the rows that share ``params``."""
        if len(rows) < len(self._running):
            logits, uniform = logits[rows], uniform[rows]
        slots = [self._running[row].slot for row in rows]
        if params.uses_penalties:
            logits = penalize(logits, self._seen[slots], self._counts[slots], params)
        tokens = sample(logits, params, uniform)
        if params.uses_penalties:
            self._counts[slots, tokens] += 1
            self._seen[slots, tokens] = True
        ids: list[int] = tokens.tolist()
        return ids

    def _collect_logprobs(self, logits: Tensor, ids: list[int]) -> dict[int, TokenLogprobs]:
        """Return, by row, the log-probabilities of the sampled tokens for the sequences that request them."""
        running = enumerate(self._running)
        counts = {row: count for row, each in running if (count := each.config.logprobs) is not None}
        if not counts:
            return {}
        rows = list(counts)
        logprobs = logits[rows].log_softmax(dim=-1)  # [B, V]
        sampled = logprobs.gather(-1, torch.tensor([[ids[row]] for row in rows], device=self._device))
        values, top_ids = logprobs.topk(min(max(counts.values()), logprobs.shape[-1]), dim=-1)
        tops = [tuple(zip(*pair, strict=True)) for pair in zip(top_ids.tolist(), values.tolist(), strict=True)]
        return {
            row: TokenLogprobs(ids[row], logprob, top[: counts[row]])
            for row, logprob, top in zip(rows, sampled.squeeze(-1).tolist(), tops, strict=True)
        }
