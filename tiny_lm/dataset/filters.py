"""Filters, and the deterministic train-validation split."""

import hashlib
from collections.abc import Iterable, Iterator
from itertools import islice

from tiny_lm.dataset.config import Filters


def apply_filters(documents: Iterable[str], filters: Filters) -> Iterator[str]:
    """Yield the documents that pass ``filters``, in order, and stop reading at ``max_documents`` of them."""
    passing = (text for text in documents if _passes(text, filters))
    return islice(passing, filters.max_documents)


def _passes(text: str, filters: Filters) -> bool:
    if not _within(len(text), filters.min_chars, filters.max_chars):
        return False
    if filters.min_words is None and filters.max_words is None:
        return True  # counting words is the expensive part
    return _within(len(text.split()), filters.min_words, filters.max_words)


def _within(value: int, low: int | None, high: int | None) -> bool:
    return (low is None or value >= low) and (high is None or value <= high)


def in_validation(text: str, share: float, seed: int) -> bool:
    """Return whether a document is held out for validation, which depends only on its content.

    The 64-bit BLAKE2b digest of the text (without the space around it), keyed with ``seed``, is uniform; the documents
    below ``share`` of its range are held out. Equal texts are therefore never in both splits, and neither order nor
    number of the documents matters.
    """
    key = (seed % 2**64).to_bytes(8, "little")
    digest = hashlib.blake2b(text.strip().encode("utf-8"), digest_size=8, key=key).digest()
    return int.from_bytes(digest, "little") < share * 2**64
