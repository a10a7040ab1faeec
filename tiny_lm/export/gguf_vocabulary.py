"""Convert a tokenizer to GGUF so that llama.cpp yields the same ids, or reject it if llama.cpp does not support it."""

from dataclasses import dataclass, field
from enum import IntEnum

from tiny_lm.errors import UserError
from tiny_lm.tokenizer import Tokenizer
from tiny_lm.tokenizer.bpe import SPLIT_PATTERNS, BPETokenizer, byte_level
from tiny_lm.tokenizer.sentencepiece import SentencePieceTokenizer


class TokenType(IntEnum):
    """The type of a token (``llama_token_type`` of llama.cpp)."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


PRE_TOKENIZERS = {
    SPLIT_PATTERNS["llama3"]: "llama-bpe",
    SPLIT_PATTERNS["gpt2"]: "gpt-2",
    SPLIT_PATTERNS["qwen2"]: "qwen2",
    SPLIT_PATTERNS["smollm"]: "smollm",
}
"""llama.cpp's name of each supported split."""


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a GGUF file.

    Attributes:
        model: ``gpt2`` (byte-level BPE) or ``llama`` (SentencePiece).
        pre: name of the split.
        tokens: text by id, without duplicates.
        types: by id.
        scores: by id; SentencePiece only.
        merges: two tokens with a space between; byte-level BPE only.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[TokenType]
    scores: list[float] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)


def to_gguf_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> Vocabulary:
    """Return the vocabulary of a GGUF file.

    Args:
        tokenizer: of the model.
        vocab_size: rows of the model's embedding; rows without a token get an unused one.

    Raises:
        UserError: llama.cpp does not support the tokenizer.
    """
    if isinstance(tokenizer, BPETokenizer):
        base = _byte_level(tokenizer)
    elif isinstance(tokenizer, SentencePieceTokenizer):
        base = _sentencepiece(tokenizer)
    else:
        raise UserError(
            f"a {tokenizer.kind} tokenizer cannot be written as GGUF: llama.cpp knows none that turns each unknown "
            "character into one unknown token; export to Hugging Face, or train with `type: BPE`"
        )
    texts = {token.id: token for token in tokenizer.specials}
    specials = [texts[i] for i in range(len(base.tokens), tokenizer.vocab_size)]
    unused = [f"[PAD{i}]" for i in range(tokenizer.vocab_size, vocab_size)]
    tokens = [*base.tokens, *(token.text for token in specials), *unused]
    types = [*base.types, *(TokenType.CONTROL if token.control else TokenType.USER_DEFINED for token in specials)]
    types += [TokenType.UNUSED] * len(unused)
    scores = [*base.scores, *[0.0] * (len(tokens) - len(base.tokens))] if base.scores else []
    return Vocabulary(base.model, base.pre, tokens, types, scores, base.merges)


def describe_missing_split(tokenizer: Tokenizer) -> str | None:
    """Name the split of a byte-level BPE if llama.cpp lacks it, else None."""
    if not isinstance(tokenizer, BPETokenizer) or tokenizer.pattern in PRE_TOKENIZERS:
        return None
    return (
        "the tokenizer splits numbers in groups of two digits, which llama.cpp has no split for, so it would read "
        "other tokens"
    )


def _byte_level(tokenizer: BPETokenizer) -> Vocabulary:
    pre = PRE_TOKENIZERS.get(tokenizer.pattern)
    if pre is None:
        raise UserError(
            f"{describe_missing_split(tokenizer)}; export to Hugging Face, or train a tokenizer of `type: BPE` "
            f"(split_pattern: {', '.join(SPLIT_PATTERNS)})"
        )
    tokens = [byte_level(token) for token in tokenizer.base]
    merges = [f"{byte_level(left)} {byte_level(right)}" for left, right in tokenizer.merges]
    return Vocabulary("gpt2", pre, tokens, [TokenType.NORMAL] * len(tokens), merges=merges)


def _sentencepiece(tokenizer: SentencePieceTokenizer) -> Vocabulary:
    types = [TokenType.NORMAL] * len(tokenizer.pieces)
    for i in tokenizer.byte_ids:
        types[i] = TokenType.BYTE
    types[0] = TokenType.UNKNOWN
    return Vocabulary("llama", "default", list(tokenizer.pieces), types, scores=tokenizer.scores)
