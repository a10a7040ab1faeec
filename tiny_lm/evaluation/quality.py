"""Sample quality that can be counted: diversity, repetition, length, verbatim overlap and invented words."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from statistics import fmean, median

import numpy as np

from tiny_lm.data.bin.stream import TokenStream, read_in_order
from tiny_lm.evaluation.overlap import Match, chunks_of, count_matched_tokens, longest_matches
from tiny_lm.evaluation.results import LONG_OVERLAP, InventedWords, LengthStats, OverlapStats, SampleOverlap
from tiny_lm.evaluation.words import distinct_share, repeated_share, split_words, words_not_in_stream
from tiny_lm.inference.request import Completion
from tiny_lm.tokenizer import Tokenizer

_MAX_EXAMPLES = 20

OnProgress = Callable[[str, int, int], None]
"""Called with the name of a stage, the number of steps just finished, and their total (0: unknown)."""


def ngram_diversity(samples: Sequence[Completion]) -> tuple[dict[str, float], dict[str, float]]:
    """Return distinct-1 to 4, and the share of repeated 2- to 4-grams, of the words of all samples."""
    texts = [split_words(sample.text) for sample in samples]
    distinct = {str(n): distinct_share(texts, n) for n in range(1, 5)}
    return distinct, {str(n): repeated_share(texts, n) for n in range(2, 5)}


def length_stats(samples: Sequence[Completion]) -> LengthStats:
    """Return the lengths of the completions in tokens."""
    lengths = [len(sample.ids) for sample in samples]
    return LengthStats(mean=fmean(lengths), median=median(lengths), min=min(lengths), max=max(lengths))


def measure_overlap(
    samples: Sequence[Completion], train: TokenStream, val: TokenStream, tokenizer: Tokenizer, on_progress: OnProgress
) -> tuple[SampleOverlap, list[Match]]:
    """Measure the verbatim overlap with the training stream of the samples and of as many validation documents.

    Returns:
        the statistics, and the longest match of each sample.
    """
    generated = [sample.ids for sample in samples]
    spans = [(len(tokenizer.encode(sample.prompt)), len(sample.ids)) for sample in samples]
    unseen = _validation_spans(val, tokenizer, spans)
    chunks = chunks_of(train, lambda tokens: on_progress("searching for verbatim overlap", tokens, 0))
    matches = longest_matches([*generated, *unseen], chunks)
    matched = count_matched_tokens([*generated, *unseen], LONG_OVERLAP, chunks)
    count = len(generated)
    index, longest = max(enumerate(matches[:count]), key=lambda item: item[1].length)
    overlap = SampleOverlap(
        **asdict(_overlap_stats(generated, matches[:count], matched[:count])),
        text=tokenizer.decode(generated[index][longest.start : longest.start + longest.length]),
        validation=_overlap_stats(unseen, matches[count:], matched[count:]) if unseen else None,
    )
    return overlap, matches[:count]


def _overlap_stats(texts: Sequence[list[int]], matches: Sequence[Match], matched: Sequence[int]) -> OverlapStats:
    lengths = [match.length for match in matches]
    share = sum(matched) / max(sum(map(len, texts)), 1)
    return OverlapStats(stories=len(texts), longest=max(lengths), mean_longest=fmean(lengths), share=share)


def _validation_spans(val: TokenStream, tokenizer: Tokenizer, spans: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Cut the first validation documents to the spans of the samples: skip the prompt's length, keep the completion's.

    Args:
        val: the validation stream.
        tokenizer: the one that wrote it.
        spans: tokens to skip at the beginning of each document, and how many of the rest to keep at most.
    """
    documents: list[list[int]] = []
    for chunk in read_in_order(val, 2**20):
        for document in np.split(chunk, np.flatnonzero(chunk == tokenizer.eos_id) + 1):
            if len(documents) == len(spans):
                return documents
            skipped, kept = spans[len(documents)]
            ids = [int(token) for token in document if token < len(tokenizer.base)][skipped : skipped + kept]
            if ids:
                documents.append(ids)
    return documents


def find_invented_words(
    samples: Sequence[Completion], train: TokenStream, tokenizer: Tokenizer, on_progress: OnProgress
) -> InventedWords:
    """Return the words of the samples that occur neither in the training text nor in the sample's prompt.

    If a sample ended at ``max_new_tokens``, its last word is not counted: it may be cut off.
    """
    words: list[str] = []
    for sample in samples:
        # A word may begin in the prompt; only whole words of the completion count.
        text = sample.text if sample.text[:1].isspace() else sample.text.partition(" ")[2]
        own = split_words(text)
        if sample.finish_reason == "length":
            own = own[:-1]
        in_prompt = set(split_words(sample.prompt))
        words += [word for word in own if word not in in_prompt]
    absent = words_not_in_stream(
        words, train, tokenizer, lambda tokens: on_progress("searching for invented words", tokens, train.tokens)
    )
    invented = [word for word in words if word in absent]
    examples = sorted(absent, key=lambda word: (-invented.count(word), word))[:_MAX_EXAMPLES]
    return InventedWords(share=len(invented) / max(len(words), 1), examples=tuple(examples))
