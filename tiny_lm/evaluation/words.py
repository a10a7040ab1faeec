"""Words of generated text: their diversity, and which of them do not occur in the training text."""

import re
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from tiny_lm.data.bin.stream import TokenStream, read_in_order
from tiny_lm.tokenizer import Tokenizer

_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
"""Letters of any script, with inner apostrophes; no digits."""

_CHUNK = 2**18  # tokens decoded at a time


def split_words(text: str) -> list[str]:
    """Return the words of a text in lower case, with straight apostrophes."""
    return [word.replace("’", "'") for word in _WORD.findall(text.lower())]


def distinct_share(texts: Sequence[Sequence[str]], n: int) -> float:
    """Return the share of distinct n-grams among all n-grams of the texts (distinct-n, Li et al. 2016).

    It falls with the amount of text (arXiv:1510.03055 counts over all replies), so compare equal amounts.
    """
    all_ngrams = [ngram for text in texts for ngram in _ngrams(text, n)]
    return len(set(all_ngrams)) / max(len(all_ngrams), 1)


def repeated_share(texts: Sequence[Sequence[str]], n: int) -> float:
    """Return the share of n-grams that occurred earlier in the same text, over all texts."""
    total = repeats = 0
    for text in texts:
        ngrams = _ngrams(text, n)
        total += len(ngrams)
        repeats += len(ngrams) - len(set(ngrams))
    return repeats / max(total, 1)


def _ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]


def words_not_in_stream(
    words: Iterable[str], stream: TokenStream, tokenizer: Tokenizer, on_progress: Callable[[int], None] | None = None
) -> set[str]:
    """Return the words that do not occur in the text of a token stream.

    The text is decoded in chunks until the last word is found, so memory holds the words still missing, one chunk and
    the longest document.

    Args:
        words: as :func:`split_words` returns them.
        stream: the training stream.
        tokenizer: the one that wrote it.
        on_progress: called with the number of tokens of each chunk read.
    """
    missing = set(words)
    unfinished: list[int] = []  # a document that ends in a later chunk
    for chunk in read_in_order(stream, _CHUNK):
        if not missing:
            break
        *whole, rest = np.split(chunk, np.flatnonzero(chunk == tokenizer.eos_id) + 1)
        documents = [part.tolist() for part in whole]
        if documents:
            documents[0], unfinished = unfinished + documents[0], []
        unfinished += rest.tolist()
        missing.difference_update(split_words("\n".join(map(tokenizer.decode, documents))))
        if on_progress:
            on_progress(len(chunk))
    return missing.difference(split_words(tokenizer.decode(unfinished)))
