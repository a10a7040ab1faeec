"""The stories that a model tells for its evaluation, from beginnings that are always the same."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tiny_lm.inference import Sampling, TextGenerator


@dataclass(frozen=True)
class Told:
    """A story as it was generated."""

    prompt: str
    text: str
    """What follows the prompt."""
    ids: list[int]
    """The tokens of ``text``, without eos."""
    finish_reason: Literal["stop", "length"]
    """``stop`` where the model ended the story itself."""


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
) -> list[Told]:
    """Continue each prompt; the story number i draws with the seed ``seed + i``.

    Args:
        generator: model and tokenizer.
        prompts: beginnings, which may repeat.
        sampling: how tokens are drawn.
        max_new_tokens: most tokens of a story.
        seed: of the first story.
        progress: told of each story that is done.

    Raises:
        UserError: the tokenizer cannot encode a prompt, or a number is out of its range.
    """
    told = []
    for number, prompt in enumerate(prompts):
        # TODO(integrator): one call of generate_batch instead of this loop.
        ids = generator.tokenizer.encode(prompt, bos=True)
        count = len(ids)
        text = "".join(generator._continue(ids, max_new_tokens, 0, sampling, seed + number))
        new = ids[count:]
        told.append(Told(prompt, text, new, "stop" if len(new) < max_new_tokens else "length"))
        if progress:
            progress(1)
    return told
