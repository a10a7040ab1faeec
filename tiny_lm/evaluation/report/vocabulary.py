"""The report's view of the tokenizer."""

from collections import Counter
from dataclasses import dataclass

from tiny_lm.evaluation.report.artifacts import RunArtifacts
from tiny_lm.tokenizer import Tokenizer

_EXAMPLE = "Once upon a time, there was a little girl who couldn't sleep."
_MAX_EXAMPLE = 28  # tokens
_NUM_LONGEST = 14
_MAX_BYTES = 12  # longer tokens are counted together


@dataclass(frozen=True)
class TokenizerView:
    """Properties of a tokenizer."""

    kind: str
    size: int
    special_tokens: list[str]
    bytes_per_token: float | None
    """On the validation text."""
    longest: list[str]
    lengths: list[tuple[str, int, float]]
    """By length in bytes: number of tokens, and its ratio to the most frequent length."""
    example: list[str]


def view_tokenizer(artifacts: RunArtifacts) -> TokenizerView | None:
    """Describe the run's tokenizer."""
    tokenizer = artifacts.tokenizer
    if tokenizer is None:
        return None
    order = sorted(range(len(tokenizer.base)), key=lambda i: (-len(tokenizer.base[i]), i))
    streams = artifacts.streams
    return TokenizerView(
        kind=tokenizer.kind,
        size=tokenizer.vocab_size,
        special_tokens=[token.text for token in sorted(tokenizer.specials, key=lambda token: token.id)],
        bytes_per_token=streams.validation.bytes_per_token if streams else None,
        longest=[tokenizer.token_text(i) for i in order[:_NUM_LONGEST]],
        lengths=_lengths(tokenizer),
        example=_example(tokenizer, streams.text if streams else ""),
    )


def _lengths(tokenizer: Tokenizer) -> list[tuple[str, int, float]]:
    counts = Counter(min(len(token), _MAX_BYTES) for token in tokenizer.base if token)
    most = max(counts.values(), default=1)
    widest = max(counts, default=0)
    names = {length: f"{length}+" if length == _MAX_BYTES else str(length) for length in range(1, widest + 1)}
    return [(name, counts[length], counts[length] / most) for length, name in names.items()]


def _example(tokenizer: Tokenizer, text: str) -> list[str]:
    """Return the tokens of the first words of the text, or of a fixed sentence if there is none."""
    ids = tokenizer.encode(text[:400].strip() or _EXAMPLE)[:_MAX_EXAMPLE]
    return [tokenizer.token_text(i) for i in ids]
