"""One document of a validation stream, chosen so that a model and a reader can take it in at once."""

from dataclasses import dataclass, replace

from tiny_lm.data import BinDataConfig
from tiny_lm.data.bin.dataset import BinTokenDataset
from tiny_lm.data.bin.stream import TokenStream
from tiny_lm.tokenizer import Tokenizer

_READ = 2**17
"""Tokens of the stream that are looked at."""

_SHORTEST, _LONGEST = 60, 320
"""A story of this many tokens is shown whole; where there is none, the beginning of a longer one."""


@dataclass(frozen=True)
class Story:
    """A document of a token stream."""

    ids: list[int]
    """As in the stream, from the token that begins a document on."""
    number: int
    """Its place among the documents, from 1."""
    is_whole: bool


def read_ids(stream: TokenStream, config: BinDataConfig, most: int = _READ) -> list[int]:
    """Return the first ``most`` token ids of the first file of a stream.

    Raises:
        UserError: an id is outside the vocabulary, so the file is damaged.
    """
    wanted = min(most, stream.tokens_per_file[0] - 1)
    if wanted < 1:
        return []
    block = min(wanted, 1024)
    shape = replace(config, block_size=block, stride=None, mask_after_eos=False)
    windows, _ = BinTokenDataset(stream, shape, every_token=True)[list(range(-(-wanted // block)))]  # [B, T]
    ids: list[int] = windows.flatten()[:wanted].tolist()
    return ids


def decode_text(stream: TokenStream, config: BinDataConfig, tokenizer: Tokenizer) -> str:
    """Return the text at the beginning of a stream."""
    return tokenizer.decode(read_ids(stream, config))


def pick_story(stream: TokenStream, config: BinDataConfig, tokenizer: Tokenizer, context: int) -> Story | None:
    """Return the first document that fits, or the beginning of the longest one.

    Args:
        stream: the validation stream.
        config: of the data.
        tokenizer: that wrote the stream.
        context: most tokens that the model reads.
    """
    documents: list[list[int]] = [[]]
    for token in read_ids(stream, config):
        documents[-1].append(token)
        if token == tokenizer.eos_id:
            documents.append([])
    longest = min(context, _LONGEST)
    for number, ids in enumerate(documents[:-1], start=1):
        if min(_SHORTEST, longest // 2) <= len(ids) <= longest:
            return Story(ids, number, is_whole=True)
    number, ids = max(enumerate(documents, start=1), key=lambda document: len(document[1]))
    if len(ids) < 2:
        return None
    return Story(ids[:longest], number, is_whole=len(ids) <= longest and number < len(documents))
