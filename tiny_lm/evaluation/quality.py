"""How good generated stories are, by what can be counted: variety, repetition, length, copies and invented words."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, median

import numpy as np

from tiny_lm.data.bin.stream import TokenStream, read_in_order
from tiny_lm.evaluation.copies import Copy, copied_tokens, longest_copies, pieces_of
from tiny_lm.evaluation.words import absent_words, distinct, repeated, words_of
from tiny_lm.inference.request import Generated
from tiny_lm.tokenizer import Tokenizer

LONG_COPY = 32
"""Tokens of a verbatim copy that counts as memorised: longer than the set phrases that children's stories share."""

_SHOWN_WORDS = 20

Progress = Callable[[str, int, int], None]
"""Told what is being done, how many steps of it were just done, and how many there are (0: unknown)."""


@dataclass(frozen=True)
class Length:
    """Tokens of the continuations."""

    mean: float
    median: float
    min: int
    max: int


@dataclass(frozen=True)
class CopyFigures:
    """Overlap of texts with the training stream, in tokens."""

    stories: int
    longest: int
    """The longest verbatim copy."""
    mean_longest: float
    """Mean over the stories of the longest copy in each."""
    share: float
    """Part of all tokens that lies in a verbatim copy of at least ``long`` tokens."""
    long: int = LONG_COPY


@dataclass(frozen=True)
class Copied(CopyFigures):
    """Overlap of generated stories with the training stream, beside that of unseen stories."""

    text: str = ""
    """The longest copy."""
    validation: CopyFigures | None = None
    """The same figures of validation stories, cut to the same lengths: what a model that copies nothing would have."""


@dataclass(frozen=True)
class InventedWords:
    """Words of generated text that no training text has."""

    share: float
    """Of all words."""
    examples: tuple[str, ...]
    """The most frequent ones."""


@dataclass(frozen=True)
class Quality:
    """Figures over all generated continuations; those of n-grams count words, so that tokenizers compare."""

    prompts: int
    samples: int
    temperature: float
    top_p: float
    max_new_tokens: int
    seed: int
    distinct: dict[str, float]
    """Distinct n-grams of all stories, as a share (Li et al. 2016)."""
    repeated: dict[str, float]
    """Share of the n-grams of a story that occurred in it before."""
    ended: float
    """Share of stories that ended by themselves."""
    length: Length
    copied: Copied
    invented_words: InventedWords


def variety(stories: Sequence[Generated]) -> tuple[dict[str, float], dict[str, float]]:
    """Return distinct-1 to 4, and the share of repeated 2- to 4-grams, of the words of all stories."""
    texts = [words_of(story.text) for story in stories]
    return {str(n): distinct(texts, n) for n in range(1, 5)}, {str(n): repeated(texts, n) for n in range(2, 5)}


def length_of(stories: Sequence[Generated]) -> Length:
    """Return the lengths of stories in tokens."""
    lengths = [len(story.ids) for story in stories]
    return Length(fmean(lengths), median(lengths), min(lengths), max(lengths))


def overlap(
    stories: Sequence[Generated], train: TokenStream, val: TokenStream, tokenizer: Tokenizer, progress: Progress
) -> tuple[Copied, list[Copy]]:
    """Look for verbatim copies of the training stream in the stories, and in as many validation stories.

    Returns:
        the figures, and the longest copy of each story.
    """
    told = [story.ids for story in stories]
    spans = [(len(tokenizer.encode(story.prompt)), len(story.ids)) for story in stories]
    unseen = _validation_stories(val, tokenizer, spans)

    def tell(tokens: int) -> None:
        progress("looking for copies", tokens, 0)

    pieces = pieces_of(train, tell)
    copies = longest_copies([*told, *unseen], pieces)
    copied = copied_tokens([*told, *unseen], LONG_COPY, pieces)
    count = len(told)
    story, longest = max(enumerate(copies[:count]), key=lambda item: item[1].length)
    text = tokenizer.decode(told[story][longest.start : longest.start + longest.length])
    ours = _copy_figures(told, copies[:count], copied[:count])
    theirs = _copy_figures(unseen, copies[count:], copied[count:]) if unseen else None
    figures = Copied(ours.stories, ours.longest, ours.mean_longest, ours.share, text=text, validation=theirs)
    return figures, copies[:count]


def _copy_figures(stories: Sequence[list[int]], copies: Sequence[Copy], copied: Sequence[int]) -> CopyFigures:
    lengths = [copy.length for copy in copies]
    return CopyFigures(len(stories), max(lengths), fmean(lengths), sum(copied) / max(sum(map(len, stories)), 1))


def _validation_stories(val: TokenStream, tokenizer: Tokenizer, spans: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Return parts of the first validation stories: of each as much as was generated, behind as much as was given.

    Args:
        val: the validation stream.
        tokenizer: the one that wrote it.
        spans: tokens to leave out at the beginning of a story, and the most to keep of the rest.
    """
    stories: list[list[int]] = []
    for piece in read_in_order(val, 2**20):
        for document in np.split(piece, np.flatnonzero(piece == tokenizer.eos_id) + 1):
            if len(stories) == len(spans):
                return stories
            skipped, kept = spans[len(stories)]
            ids = [int(token) for token in document if token < len(tokenizer.base)][skipped : skipped + kept]
            if ids:
                stories.append(ids)
    return stories


def invented_words(
    stories: Sequence[Generated], train: TokenStream, tokenizer: Tokenizer, progress: Progress
) -> InventedWords:
    """Return the words of the stories that neither a training text nor the story's own beginning has.

    Where the limit of tokens ended a story, its last word is left out: it may be half a word.
    """

    def tell(tokens: int) -> None:
        progress("looking for invented words", tokens, train.tokens)

    words: list[str] = []
    for story in stories:
        # A word may begin in the prompt: only whole words of the continuation are the model's own.
        text = story.text if story.text[:1].isspace() else story.text.partition(" ")[2]
        told = words_of(text)
        if story.finish_reason == "length":
            told = told[:-1]
        given = set(words_of(story.prompt))
        words += [word for word in told if word not in given]
    absent = absent_words(words, train, tokenizer, tell)
    invented = [word for word in words if word in absent]
    examples = sorted(absent, key=lambda word: (-invented.count(word), word))[:_SHOWN_WORDS]
    return InventedWords(len(invented) / max(len(words), 1), tuple(examples))
