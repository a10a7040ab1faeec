"""The words of text: which ones it holds, how varied they are, and which of them no training text has."""

import re
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from tiny_lm.data.bin.stream import TokenStream, read_in_order
from tiny_lm.tokenizer import Tokenizer

_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
"""Letters of any script, with apostrophes inside; no digits."""

_PIECE = 2**18  # tokens that are decoded at a time


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case, with one kind of apostrophe."""
    return [word.replace("’", "'") for word in _WORD.findall(text.lower())]


def distinct(texts: Sequence[Sequence[str]], n: int) -> float:
    """Return the share of different n-grams among all n-grams of the texts (distinct-n, Li et al. 2016).

    It falls with the amount of text (arXiv:1510.03055 counts over all replies), so compare like with like.
    """
    all_ngrams = [ngram for text in texts for ngram in _ngrams(text, n)]
    return len(set(all_ngrams)) / max(len(all_ngrams), 1)


def repeated(texts: Sequence[Sequence[str]], n: int) -> float:
    """Return the share of n-grams that occurred in the same text before, over all texts."""
    total = again = 0
    for text in texts:
        ngrams = _ngrams(text, n)
        total += len(ngrams)
        again += len(ngrams) - len(set(ngrams))
    return again / max(total, 1)


def _ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]


def absent_words(
    words: Iterable[str], stream: TokenStream, tokenizer: Tokenizer, progress: Callable[[int], None] | None = None
) -> set[str]:
    """Return the words that occur nowhere in the text of a token stream.

    The text is decoded piece by piece and ends where the last word was found: what is kept in memory are the words
    that are still looked for, and one piece and the longest document.

    Args:
        words: as :func:`words_of` returns them.
        stream: the training stream.
        tokenizer: the one that wrote it.
        progress: told of the tokens of each piece read.
    """
    missing = set(words)
    begun: list[int] = []  # a document whose end is in a later piece
    for piece in read_in_order(stream, _PIECE):
        if not missing:
            break
        *whole, rest = np.split(piece, np.flatnonzero(piece == tokenizer.eos_id) + 1)
        documents = [part.tolist() for part in whole]
        if documents:
            documents[0], begun = begun + documents[0], []
        begun += rest.tolist()
        missing.difference_update(words_of("\n".join(map(tokenizer.decode, documents))))
        if progress:
            progress(len(piece))
    return missing.difference(words_of(tokenizer.decode(begun)))
