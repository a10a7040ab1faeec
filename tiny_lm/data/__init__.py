"""Token streams: a corpus as token ids on disk, and windows of it as training batches."""

from tiny_lm.data.bin.config import BinDataConfig
from tiny_lm.data.metadata import FileStatistics, StreamMetadata

__all__ = ["BinDataConfig", "FileStatistics", "StreamMetadata"]
