"""Raw text: where documents come from, which of them count, and how they are split."""

from tiny_lm.dataset.config import DatasetConfig, Errors, Filters, Split, Splits
from tiny_lm.dataset.sources import describe, download, estimate_bytes, iter_documents, write_documents

__all__ = [
    "DatasetConfig",
    "Errors",
    "Filters",
    "Split",
    "Splits",
    "describe",
    "download",
    "estimate_bytes",
    "iter_documents",
    "write_documents",
]
