"""What a tokenizer makes of text."""

from collections import Counter
from dataclasses import dataclass

from tiny_lm.evaluation.report.material import Material
from tiny_lm.tokenizer import Tokenizer

_EXAMPLE = "Once upon a time, there was a little girl who couldn't sleep."
_LONGEST_EXAMPLE = 28  # tokens
_MOST_LONG = 14
_WIDEST = 12  # bytes; longer tokens are counted together


@dataclass(frozen=True)
class TokenizerView:
    """Facts about a tokenizer."""

    kind: str
    size: int
    specials: list[str]
    bytes_per_token: float | None
    """On the validation text."""
    longest: list[str]
    lengths: list[tuple[str, int, float]]
    """By number of bytes: how many tokens, and their share of the most frequent number."""
    example: list[str]


def view_tokenizer(material: Material) -> TokenizerView | None:
    """Return what there is to know about the run's tokenizer."""
    tokenizer = material.tokenizer
    if tokenizer is None:
        return None
    order = sorted(range(len(tokenizer.base)), key=lambda i: (-len(tokenizer.base[i]), i))
    streams = material.streams
    return TokenizerView(
        kind=tokenizer.kind,
        size=tokenizer.vocab_size,
        specials=[token.text for token in sorted(tokenizer.specials, key=lambda token: token.id)],
        bytes_per_token=streams.validation.bytes_per_token if streams else None,
        longest=[tokenizer.token_text(i) for i in order[:_MOST_LONG]],
        lengths=_lengths(tokenizer),
        example=_example(tokenizer, streams.text if streams else ""),
    )


def _lengths(tokenizer: Tokenizer) -> list[tuple[str, int, float]]:
    counts = Counter(min(len(token), _WIDEST) for token in tokenizer.base if token)
    most = max(counts.values(), default=1)
    widest = max(counts, default=0)
    names = {length: f"{length}+" if length == _WIDEST else str(length) for length in range(1, widest + 1)}
    return [(name, counts[length], counts[length] / most) for length, name in names.items()]


def _example(tokenizer: Tokenizer, text: str) -> list[str]:
    """Return the tokens of the first words of the text, or of a sentence of ours where there is none."""
    ids = tokenizer.encode(text[:400].strip() or _EXAMPLE)[:_LONGEST_EXAMPLE]
    return [tokenizer.token_text(i) for i in ids]
