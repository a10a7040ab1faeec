"""One validation document, short enough for the model's context and for a reader."""

from dataclasses import dataclass, replace

from tiny_lm.data import BinDataConfig
from tiny_lm.data.bin.dataset import BinTokenDataset
from tiny_lm.data.bin.stream import TokenStream
from tiny_lm.tokenizer import Tokenizer

_MAX_TOKENS = 2**17
"""Tokens at the beginning of the stream to search."""

_MIN_LENGTH, _MAX_LENGTH = 60, 320
"""A document of this many tokens is shown whole; if there is none, the beginning of a longer one."""


@dataclass(frozen=True)
class Document:
    """A document of a token stream."""

    ids: list[int]
    """As in the stream, including special tokens."""
    number: int
    """Its index among the documents, from 1."""
    is_whole: bool


def read_ids(stream: TokenStream, config: BinDataConfig, max_tokens: int = _MAX_TOKENS) -> list[int]:
    """Return the first ``max_tokens`` token ids of a stream's first file.

    Raises:
        UserError: an id is outside the vocabulary: the file is damaged.
    """
    count = min(max_tokens, stream.tokens_per_file[0] - 1)
    if count < 1:
        return []
    block = min(count, 1024)
    shape = replace(config, block_size=block, stride=None, mask_after_eos=False)
    sequences, _ = BinTokenDataset(stream, shape, every_token=True)[list(range(-(-count // block)))]  # [B, T]
    ids: list[int] = sequences.flatten()[:count].tolist()
    return ids


def decode_beginning(stream: TokenStream, config: BinDataConfig, tokenizer: Tokenizer) -> str:
    """Decode the beginning of a stream."""
    return tokenizer.decode(read_ids(stream, config))


def pick_document(stream: TokenStream, config: BinDataConfig, tokenizer: Tokenizer, context: int) -> Document | None:
    """Return the first document that fits, or the beginning of the longest one.

    Args:
        stream: the validation stream.
        config: the data config.
        tokenizer: the one that wrote the stream.
        context: the model's context length.
    """
    documents: list[list[int]] = [[]]
    for token in read_ids(stream, config):
        documents[-1].append(token)
        if token == tokenizer.eos_id:
            documents.append([])
    max_length = min(context, _MAX_LENGTH)
    for number, ids in enumerate(documents[:-1], start=1):
        if min(_MIN_LENGTH, max_length // 2) <= len(ids) <= max_length:
            return Document(ids, number, is_whole=True)
    number, ids = max(enumerate(documents, start=1), key=lambda document: len(document[1]))
    if len(ids) < 2:
        return None
    return Document(ids[:max_length], number, is_whole=len(ids) <= max_length and number < len(documents))
