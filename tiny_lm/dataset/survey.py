"""A survey of a local corpus before training: how it is read, and whether validation documents can be held out."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tiny_lm.dataset.config import DatasetConfig, Errors, Split
from tiny_lm.dataset.filters import apply_filters, in_validation
from tiny_lm.dataset.local import read_local
from tiny_lm.dataset.names import name_from_path
from tiny_lm.dataset.notes import ReadingNotes
from tiny_lm.errors import UserError

_MAX_TEXT = 2**28  # characters; larger corpora are not read completely twice


@dataclass(frozen=True)
class Survey:
    """The result of a survey.

    Attributes:
        description: one line for the user.
        split_within: whether each document is split into train and validation, since there are too few to hold out
            whole ones.
    """

    description: str
    split_within: bool = False


def survey_corpus(
    config: DatasetConfig, *, val_split: float, seed: int = 0, errors: Errors = "strict"
) -> Survey | None:
    """Read a local corpus, or the first 256 million characters of it; None for other sources.

    Raises:
        UserError: it cannot be read or has no documents; names the files.
    """
    if config.source != "local":
        return None
    name = name_from_path(config.name)
    names_validation = config.split_name("validation") is not None
    notes, counts = ReadingNotes(), _Counts()
    _count(config, "train", errors, notes, counts, val_split=0 if names_validation else val_split, seed=seed)
    if not counts.passing:
        raise UserError(f"{name}: {_why_empty(config, notes, counts)}")
    documents = f"{'more than ' if counts.is_cut else ''}{_documents(counts.passing)}"
    if counts.passing < counts.all:
        documents = f"{documents} of {counts.all:,} (the others do not pass the filters)"
    split_within = False
    if names_validation:
        held = _Counts()
        _count(config, "validation", errors, notes, held, val_split=0, seed=seed)
        if not held.passing:
            raise UserError(f"{name}: splits.validation: {_why_empty(config, notes, held)}")
        documents += f" to train on and {'more than ' if held.is_cut else ''}{held.passing:,} to validate"
    elif val_split:
        split_within = not (counts.in_train and counts.in_validation)
    line = f"{name}: {documents}, {notes.describe()}"
    if split_within:
        line += (
            f"; too few different documents to hold some out, so the last {val_split:.0%} of each is the validation "
            f"text (put a line {config.separator} between documents if there are more)"
        )
    return Survey(line, split_within)


@dataclass
class _Counts:
    all: int = 0
    passing: int = 0
    in_train: bool = False
    in_validation: bool = False
    is_cut: bool = False


def _count(
    config: DatasetConfig,
    split: Split,
    errors: Errors,
    notes: ReadingNotes,
    counts: _Counts,
    *,
    val_split: float,
    seed: int,
) -> None:
    def all_documents() -> Iterator[str]:
        for text in read_local(config, split, errors, notes):
            counts.all += 1
            yield text

    size = 0
    for text in apply_filters(all_documents(), config.filters):
        counts.passing += 1
        size += len(text)
        if not (counts.in_train and counts.in_validation):
            is_held = in_validation(text, val_split, seed)
            counts.in_validation |= is_held
            counts.in_train |= not is_held
        if size > _MAX_TEXT:
            counts.is_cut = True
            return


def _documents(count: int) -> str:
    return f"{count:,} document{'' if count == 1 else 's'}"


def _why_empty(config: DatasetConfig, notes: ReadingNotes, counts: _Counts) -> str:
    if counts.all:
        return f"none of its {_documents(counts.all)} passes the filters; set others"
    files = "the file holds" if notes.files == 1 and Path(config.name).suffix else f"its {notes.files:,} files hold"
    return f"{files} no text; give a file with text in it"


def divide_document(text: str, share: float) -> tuple[str, str]:
    """Split a document into its beginning, for training, and the last ``share``, for validation.

    The cut is moved back to a nearby line end or space, if there is one.
    """
    cut = len(text) - max(1, round(len(text) * share)) if share else len(text)
    for end in ("\n", " "):
        found = text.rfind(end, cut - cut // 10, cut)
        if found > 0:
            cut = found + 1
            break
    return text[:cut], text[cut:]
