"""Scoring text: negative log-likelihoods, and the measures derived from them."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tiny_lm.errors import UserError
from tiny_lm.inference.decoding import prefill_hidden
from tiny_lm.inference.request import TokenLogprobs
from tiny_lm.model import KVCache, Transformer


@dataclass(frozen=True)
class LossStats:
    """Negative log-likelihood over a number of target tokens."""

    nats: float
    """Sum over all targets."""
    tokens: int

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood of a token, in nats."""
        return self.nats / max(self.tokens, 1)

    @property
    def perplexity(self) -> float:
        """``exp`` of the mean loss."""
        return math.exp(min(self.loss, 700.0))

    def bits_per_byte(self, bytes_per_token: float) -> float:
        """Bits per UTF-8 byte of text, ``loss / ln 2 / bytes_per_token``: comparable between tokenizers."""
        return self.loss / math.log(2) / bytes_per_token


@dataclass(frozen=True)
class Score:
    """How likely a model finds a text, token by token.

    Attributes:
        ids: the tokens.
        logprobs: the log-probability of each given those before it, in nats.
        bits_per_byte: ``-sum(logprobs) / ln 2`` over the UTF-8 bytes of the text.
    """

    ids: list[int]
    logprobs: list[float]
    bits_per_byte: float

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood of a token, in nats."""
        return -sum(self.logprobs) / max(len(self.logprobs), 1)

    @property
    def perplexity(self) -> float:
        """``exp`` of the mean loss."""
        return math.exp(min(self.loss, 700.0))


@torch.inference_mode()
def token_logprobs(model: Transformer, ids: Sequence[int]) -> list[float]:
    """Return the log-probability of each of ``ids`` but the first, given those before it.

    A text longer than the context is scored in windows that overlap by half, so that each token after the first window
    sees at least half a context.

    Args:
        model: in evaluation mode, on any device.
        ids: at least two tokens.
    """
    context = model.config.context_length
    step = max(context // 2, 1)
    device = next(model.parameters()).device
    logprobs: list[float] = []
    start = 0
    while len(logprobs) < len(ids) - 1:
        window = torch.tensor(ids[start : start + context + 1], device=device)  # [T+1]
        new = start + len(window) - 1 - len(logprobs)  # targets not scored by an earlier window
        logits = model(window[None, :-1])[0, -new:].float()  # [new, V]
        logprobs += logits.log_softmax(dim=-1).gather(-1, window[-new:, None]).squeeze(-1).tolist()
        start += step
    return logprobs


class PromptScorer:
    """Computes the log-probabilities of a prompt's tokens in parts, so that other sequences can decode in between.

    Attributes:
        tokens: the tokens scored so far.
    """

    def __init__(self, model: Transformer, ids: Sequence[int], *, top_logprobs: int = 0) -> None:
        """Store the arguments; nothing is computed yet.

        Args:
            model: in evaluation mode, on any device.
            ids: the prompt, at least one token.
            top_logprobs: number of likeliest alternatives to return at each position.

        Raises:
            UserError: the prompt is longer than the context.
        """
        if len(ids) > model.config.context_length:
            raise UserError(f"the prompt has {len(ids):,} tokens and the context {model.config.context_length:,}")
        self._model, self._ids, self._num_top = model, ids, min(top_logprobs, model.config.vocab_size)
        self._cache: KVCache | None = None  # allocated while scoring
        self.tokens = [TokenLogprobs(ids[0], None)]

    @property
    def done(self) -> bool:
        """Whether all tokens were scored."""
        return len(self.tokens) == len(self._ids)

    @torch.inference_mode()
    def advance(self, max_tokens: int) -> None:
        """Score the next ``max_tokens`` tokens, or the remaining ones if they are fewer."""
        if self.done:
            return
        if self._cache is None:
            self._cache = self._model.new_cache(1)
        num_cached = len(self.tokens) - 1
        targets = self._ids[num_cached + 1 : num_cached + 1 + max_tokens]
        inputs = self._ids[num_cached : num_cached + len(targets)]
        hidden = prefill_hidden(self._model, [inputs], self._cache)  # [1, T, D]
        logprobs = self._model.lm_head(hidden)[0, : len(targets)].float().log_softmax(dim=-1)  # [T, V]
        own = logprobs.gather(-1, torch.tensor(targets, device=logprobs.device)[:, None]).squeeze(-1).tolist()
        values, top_ids = (part.tolist() for part in logprobs.topk(self._num_top, dim=-1))
        for token, logprob, *top in zip(targets, own, top_ids, values, strict=True):
            self.tokens.append(TokenLogprobs(token, logprob, tuple(zip(*top, strict=True))))
        if len(self.tokens) == len(self._ids):
            self._cache = None


def evaluate_loss(
    model: Callable[[Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    device: torch.device,
    ignore_index: int = -100,
) -> LossStats:
    """Sum the loss of ``model`` over all targets of ``batches``.

    Each target counts once with the same weight, however targets are batched. The caller puts the model into
    evaluation mode and chooses the precision.

    Args:
        model: maps ids ``[B, T]`` to logits ``[B, T, V]``.
        batches: pairs of ids and targets, int64 ``[B, T]`` each.
        device: of the model.
        ignore_index: target that is not counted.
    """
    by_position = loss_by_position(model, batches, device=device, ignore_index=ignore_index)
    return sum_losses(by_position)


@torch.no_grad()
def loss_by_position(
    model: Callable[[Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    device: torch.device,
    ignore_index: int = -100,
) -> list[LossStats]:
    """Sum the loss of ``model`` for each position of a sequence; the arguments are those of :func:`evaluate_loss`.

    Returns:
        T sums: the first for targets that follow one token of context, the last for those that follow T.
    """
    nats = torch.zeros(0)  # [T], on the device; in float64 where it is supported
    tokens = torch.zeros(0, dtype=torch.int64)  # [T]
    for x, y in batches:
        targets = y.to(device, non_blocking=True)
        logits = model(x.to(device, non_blocking=True))  # [B, T, V]
        losses = token_losses(logits, targets, ignore_index=ignore_index)  # [B, T]
        sums = losses.sum(dim=0, dtype=torch.float32 if device.type == "mps" else torch.float64)  # [T]
        counts = (y != ignore_index).sum(dim=0)  # [T]
        nats, tokens = (sums, counts) if len(tokens) == 0 else (nats + sums, tokens + counts)
    return [LossStats(total, count) for total, count in zip(nats.tolist(), tokens.tolist(), strict=True)]


def token_losses(logits: Tensor, targets: Tensor, *, ignore_index: int = -100) -> Tensor:
    """Return the negative log-likelihood of each target in nats, float32 ``[B, T]``; 0 for an ignored one.

    ``logits`` are ``[B, T, V]``, ``targets`` int64 ``[B, T]``; a target of ``ignore_index`` is ignored.
    """
    losses = F.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=ignore_index, reduction="none"
    )
    return losses.view_as(targets)


def sum_losses(parts: Iterable[LossStats]) -> LossStats:
    """Add up the losses of different targets."""
    parts = list(parts)
    return LossStats(math.fsum(part.nats for part in parts), sum(part.tokens for part in parts))
