"""Train a tokenizer of any kind."""

import logging
from collections.abc import Iterable, Iterator

from tiny_lm.errors import UserError
from tiny_lm.tokenizer.base import Tokenizer, check_text
from tiny_lm.tokenizer.bpe import BPETokenizer
from tiny_lm.tokenizer.char import CharTokenizer
from tiny_lm.tokenizer.config import TokenizerConfig
from tiny_lm.tokenizer.gpt2 import GPT2Tokenizer
from tiny_lm.tokenizer.sentencepiece import SentencePieceTokenizer

logger = logging.getLogger(__name__)

_SAMPLE = 2**20  # bytes of text on which the tokens are counted


def train_tokenizer(config: TokenizerConfig, documents: Iterable[str]) -> Tokenizer:
    """Train the tokenizer that ``config`` describes.

    ``tokenizer.training`` then has the number of documents and bytes, and bytes per token on a sample. A corpus
    too small for the vocabulary yields a smaller one; that is logged as a warning.

    Args:
        config: kind, size and special tokens.
        documents: the training texts, read once; GPT-2's tokenizer only takes its sample from them.

    Raises:
        UserError: the text is empty or contains a lone surrogate, or the vocabulary is too small for it.
    """
    corpus = _Corpus(documents)
    tokenizer: Tokenizer
    if config.type == "gpt2":
        tokenizer = GPT2Tokenizer.train(config)
        corpus.read_sample()
    elif corpus.is_empty():
        raise UserError(
            f"the tokenizer {config.name!r} cannot be trained: its data set {config.dataset_config!r} is empty"
        )
    elif config.type == "BPE":
        tokenizer = BPETokenizer.train(config, corpus)
    elif config.type == "sentencepiece":
        tokenizer = SentencePieceTokenizer.train(config, corpus)
    else:
        tokenizer = CharTokenizer.train(config, corpus)
    if config.type != "char" and config.vocab_size and tokenizer.vocab_size < config.vocab_size:
        logger.warning(
            "the corpus yields only %d tokens, not vocab_size=%d",
            tokenizer.vocab_size,
            config.vocab_size,
        )
    tokenizer.training = corpus.facts(tokenizer, config)
    return tokenizer


def matches_config(tokenizer: Tokenizer, config: TokenizerConfig) -> bool:
    """Return whether a tokenizer is of the kind, special tokens and split pattern of a config."""
    texts = {token.role: token.text for token in tokenizer.specials}
    same_split = config.type != "BPE" or (
        isinstance(tokenizer, BPETokenizer) and tokenizer.split_name == config.split_pattern
    )
    return tokenizer.kind == config.type and texts == config.special_tokens and same_split


class _Corpus:
    """The non-empty documents, read once, counted and checked."""

    def __init__(self, documents: Iterable[str]) -> None:
        self._source = self._read(documents)
        self._first: str | None = None
        self._sample: list[str] = []
        self._documents = 0
        self._bytes = 0

    def _read(self, documents: Iterable[str]) -> Iterator[str]:
        for document in documents:
            if not document:
                continue
            check_text(document)
            if self._bytes < _SAMPLE:
                self._sample.append(document[:_SAMPLE])
            self._documents += 1
            self._bytes += len(document) if document.isascii() else len(document.encode())
            yield document

    def __iter__(self) -> Iterator[str]:
        if self._first is not None:
            yield self._first
            self._first = None
        yield from self._source

    def is_empty(self) -> bool:
        """Return whether there are no documents, by reading the first."""
        if self._first is None:
            self._first = next(self._source, None)
        return self._first is None

    def read_sample(self) -> None:
        """Read as many documents as the sample has."""
        for _ in self:
            if self._bytes >= _SAMPLE:
                break

    def facts(self, tokenizer: Tokenizer, config: TokenizerConfig) -> dict[str, object]:
        """Return what was read, and how densely the tokenizer packs the sample."""
        tokens = sum(map(len, tokenizer.encode_batch(self._sample, num_threads=config.num_threads)))
        sample_bytes = sum(len(text.encode()) for text in self._sample)
        return {
            "name": config.name,
            "dataset_config": config.dataset_config,
            "requested_vocab_size": config.vocab_size,
            "documents": self._documents,
            "bytes": self._bytes,
            "sample_bytes": sample_bytes,
            "bytes_per_token": round(sample_bytes / tokens, 3) if tokens else None,
        }
