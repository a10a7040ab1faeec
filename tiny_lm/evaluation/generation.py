"""Samples for an evaluation, generated from a fixed set of prompts."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from tiny_lm.inference import SamplingParams, TextGenerator
from tiny_lm.inference.request import Completion, GenerationConfig

_BATCH_SIZE = 32
"""Samples generated together; progress is reported after each batch."""


def evaluation_prompts() -> list[str]:
    """Return the prompts that every evaluation uses; they ship with the package."""
    return Path(__file__).with_name("prompts.txt").read_text(encoding="utf-8").splitlines()


def generate_samples(
    generator: TextGenerator,
    prompts: Sequence[str],
    sampling: SamplingParams,
    *,
    max_new_tokens: int,
    seed: int,
    on_progress: Callable[[int], None] | None = None,
) -> list[Completion]:
    """Complete each prompt; sample i uses the seed ``seed + i``.

    Args:
        generator: model and tokenizer.
        prompts: may contain duplicates.
        sampling: sampling parameters.
        max_new_tokens: maximum length of a completion.
        seed: seed of the first sample.
        on_progress: called with the number of samples just finished.

    Raises:
        UserError: the tokenizer cannot encode a prompt, or a parameter is out of range.
    """
    request = GenerationConfig(max_new_tokens=max_new_tokens, **asdict(sampling))
    samples: list[Completion] = []
    for start in range(0, len(prompts), _BATCH_SIZE):
        batch = prompts[start : start + _BATCH_SIZE]
        samples += generator.generate_batch(batch, request, seed=[seed + start + row for row in range(len(batch))])
        if on_progress:
            on_progress(len(batch))
    return samples
