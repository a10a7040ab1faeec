"""Text to token ids and back: four kinds of tokenizer behind one interface."""

from tiny_lm.tokenizer.base import SpecialToken, StreamDecoder, Tokenizer
from tiny_lm.tokenizer.bpe import GPT2_PATTERN, LLAMA3_PATTERN, SPLIT_PATTERNS, BPETokenizer
from tiny_lm.tokenizer.char import CharTokenizer
from tiny_lm.tokenizer.config import TokenizerConfig
from tiny_lm.tokenizer.gpt2 import GPT2Tokenizer
from tiny_lm.tokenizer.load import load_tokenizer
from tiny_lm.tokenizer.matching import check_same_tokenizer
from tiny_lm.tokenizer.pickle_import import import_pickled_tokenizer
from tiny_lm.tokenizer.sentencepiece import SentencePieceTokenizer
from tiny_lm.tokenizer.train import train_tokenizer

__all__ = [
    "GPT2_PATTERN",
    "LLAMA3_PATTERN",
    "SPLIT_PATTERNS",
    "BPETokenizer",
    "CharTokenizer",
    "GPT2Tokenizer",
    "SentencePieceTokenizer",
    "SpecialToken",
    "StreamDecoder",
    "Tokenizer",
    "TokenizerConfig",
    "check_same_tokenizer",
    "import_pickled_tokenizer",
    "load_tokenizer",
    "train_tokenizer",
]
