"""Token streams: a corpus as token ids on disk, and sequences of it as training batches."""

from tiny_lm.data.bin.config import BinDataConfig
from tiny_lm.data.metadata import FileStatistics, StreamMetadata
from tiny_lm.data.tokenize import tokenize_corpus, tokenize_dataset

__all__ = ["BinDataConfig", "FileStatistics", "StreamMetadata", "tokenize_corpus", "tokenize_dataset"]
