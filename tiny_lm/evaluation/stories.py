"""The stories that a model tells for its evaluation, from beginnings that are always the same."""

from collections.abc import Callable, Sequence
from pathlib import Path

from tiny_lm.inference import Sampling, TextGenerator
from tiny_lm.inference.request import Generated, Request

_AT_A_TIME = 32
"""Stories that are told together, after which progress shows."""


def story_beginnings() -> list[str]:
    """Return the beginnings that every evaluation uses, which come with the package."""
    return Path(__file__).with_name("prompts.txt").read_text(encoding="utf-8").splitlines()


def tell_stories(
    generator: TextGenerator,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    max_new_tokens: int,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> list[Generated]:
    """Continue each prompt; the story number i draws with the seed ``seed + i``.

    Args:
        generator: model and tokenizer.
        prompts: beginnings, which may repeat.
        sampling: how tokens are drawn.
        max_new_tokens: most tokens of a story.
        seed: of the first story.
        progress: told of the stories that are done.

    Raises:
        UserError: the tokenizer cannot encode a prompt, or a number is out of its range.
    """
    request = Request(max_new_tokens, sampling=sampling)
    told: list[Generated] = []
    for start in range(0, len(prompts), _AT_A_TIME):
        some = prompts[start : start + _AT_A_TIME]
        told += generator.generate_batch(some, request, seed=[seed + start + row for row in range(len(some))])
        if progress:
            progress(len(some))
    return told
