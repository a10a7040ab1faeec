"""Raw text: sources of documents, filters, and splits."""

from tiny_lm.dataset.config import DatasetConfig, Errors, Filters, Split, Splits
from tiny_lm.dataset.notes import ReadingNotes
from tiny_lm.dataset.sources import describe, download, estimate_bytes, iter_documents, iter_splits, write_documents
from tiny_lm.dataset.survey import Survey, survey_corpus

__all__ = [
    "DatasetConfig",
    "Errors",
    "Filters",
    "ReadingNotes",
    "Split",
    "Splits",
    "Survey",
    "describe",
    "download",
    "estimate_bytes",
    "iter_documents",
    "iter_splits",
    "survey_corpus",
    "write_documents",
]
