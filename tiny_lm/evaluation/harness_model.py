"""A run or an export as a model of the Language Model Evaluation Harness; registered as ``tiny-lm`` on import.

The harness cannot discover models of other packages, so import this module first::

    import lm_eval
    import tiny_lm.evaluation.harness_model

    lm_eval.simple_evaluate(model="tiny-lm", model_args={"run": "runs/speed"}, tasks=["lambada_openai"])
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import lm_eval.models  # noqa: F401 (the harness registers its own models only if no other is registered yet)
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from tiny_lm.inference import TextGenerator
from tiny_lm.inference.scoring import token_losses

_Pair = tuple[list[int], list[int]]
"""Ids of the context, and of the continuation to score."""


@register_model("tiny-lm")
class HarnessModel(TemplateLM):  # type: ignore[misc]  # the harness ships no type information
    """Scores and generates text for the harness. Each context begins with bos, as training documents do."""

    def __init__(
        self, run: str, batch_size: int | str = 16, max_batch_size: int | None = None, device: str | None = None
    ) -> None:
        """Load a run's best checkpoint, or an export.

        Args:
            run: a run folder, a checkpoint inside one, or a folder in Hugging Face layout.
            batch_size: texts scored together; the harness's ``auto`` means 16.
            max_batch_size: accepted because the harness passes it, but ignored.
            device: a GPU by default, if there is one.

        Raises:
            UserError: the run does not exist or has no checkpoint.
        """
        super().__init__()
        self.generator = TextGenerator.from_path(run, device=device)
        self.max_length = self.generator.model.config.context_length
        self._batch_size = 16 if str(batch_size).startswith("auto") else int(batch_size)
        self._device = self.generator.model.token_emb.weight.device

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document."""
        return self.generator.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context: bos, or eos if the tokenizer has no bos."""
        tokenizer = self.generator.tokenizer
        return tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Encode text with a leading bos token unless that is turned off."""
        return self.generator.tokenizer.encode(string, bos=add_special_tokens is not False)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Return each continuation's log-likelihood and whether greedy decoding would produce it."""
        scores = self._score([(context, continuation) for _, context, continuation in requests])
        for (arguments, _, _), score in zip(requests, scores, strict=True):
            self.cache_hook.add_partial("loglikelihood", arguments, score)
        return scores

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each whole text, scored in sequences of the context length."""
        totals = []
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            total = sum(score for score, _ in self._score(list(map(make_disjoint_window, windows))))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
            totals.append(total)
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Complete each context up to one of its stop strings, the eos token, or ``max_gen_toks`` tokens."""
        texts = []
        for request in requests:
            context, options = request.args
            until = [options["until"]] if isinstance(options.get("until"), str) else options.get("until") or []
            temperature = float(options.get("temperature", 0.0)) if options.get("do_sample", False) else 0.0
            limit = int(options.get("max_gen_toks", self.max_length // 2))
            stop = tuple(filter(None, until))
            (completion,) = self.generator.generate_batch(
                [context],
                max_new_tokens=limit,
                temperature=temperature,
                top_k=options.get("top_k"),
                top_p=options.get("top_p", 1.0),
                stop=stop,
                seed=0,
            )
            self.cache_hook.add_partial("generate_until", request.args, completion.text)
            texts.append(completion.text)
        return texts

    @torch.no_grad()
    def _score(self, pairs: Sequence[_Pair]) -> list[tuple[float, bool]]:
        """Score the continuation of each pair; a pair longer than the context is truncated on the left."""
        results: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
        # Longest first, batched with similar lengths: little padding, and too large a batch fails at once.
        order = sorted(range(len(pairs)), key=lambda number: -sum(map(len, pairs[number])))
        for batch in _batches(order, self._batch_size):
            kept = [(pairs[number][0] + pairs[number][1])[-self.max_length - 1 :] for number in batch]
            width = max(map(len, kept)) - 1
            x = torch.zeros(len(batch), width, dtype=torch.int64)  # [B, T]
            y = torch.full((len(batch), width), -100)  # [B, T]
            for row, (number, ids) in enumerate(zip(batch, kept, strict=True)):
                scored = min(len(pairs[number][1]), len(ids) - 1)
                x[row, : len(ids) - 1] = torch.tensor(ids[:-1])
                y[row, len(ids) - 1 - scored : len(ids) - 1] = torch.tensor(ids[len(ids) - scored :])
            logits = self.generator.model(x.to(self._device))  # [B, T, V]
            targets = y.to(self._device)
            nats = token_losses(logits, targets).cpu().double().sum(dim=1)  # [B]
            greedy = ((logits.argmax(dim=-1) == targets) | (targets == -100)).all(dim=1)  # [B]
            for number, loss, is_greedy in zip(batch, nats.tolist(), greedy.tolist(), strict=True):
                results[number] = (-loss, bool(is_greedy))
        return results


def _batches(items: Iterable[int], size: int) -> Iterator[list[int]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
