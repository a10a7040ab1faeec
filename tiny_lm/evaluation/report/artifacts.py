"""Everything a report is built from: the contents of a run folder, and a message for each missing part."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from tiny_lm.config import parse_overrides, read_yaml
from tiny_lm.data import BinDataConfig
from tiny_lm.data.bin.stream import TokenStream, open_stream
from tiny_lm.data.metadata import FileStatistics, StreamMetadata
from tiny_lm.errors import UserError
from tiny_lm.evaluation.report.document import Document, decode_beginning, pick_document
from tiny_lm.evaluation.results import Evaluation, read_evaluation
from tiny_lm.model.checkpoint import CheckpointModel, load_checkpoint_model
from tiny_lm.reading import read_text
from tiny_lm.runs import Run, number_in, read_metrics
from tiny_lm.tokenizer import Tokenizer, check_same_tokenizer, load_tokenizer

_TEXT_LIMIT = 64 * 2**20

SECTIONS = ("model", "training", "data")

_T = TypeVar("_T")


@dataclass(frozen=True)
class Streams:
    """The token streams that a run was trained on and validated with, as far as they still exist."""

    validation: TokenStream
    train_statistics: FileStatistics | None
    val_statistics: FileStatistics | None
    text: str
    """The beginning of the validation text."""
    document: Document | None
    """A validation document that fits into the model's context."""


@dataclass(frozen=True)
class RunArtifacts:
    """All parts of a run that a report shows; None or empty if missing."""

    run: Run
    record: dict[str, Any]
    events: list[dict[str, Any]]
    configs: dict[str, dict[str, Any]]
    """Resolved values by section."""
    config_texts: dict[str, str]
    samples: str
    tokenizer: Tokenizer | None
    checkpoint: Path | None
    model: CheckpointModel | None
    streams: Streams | None
    evaluation: Evaluation | None
    missing: dict[str, str] = field(default_factory=dict)
    """Why a part is missing, by its name."""

    def number(self, *keys: str) -> float | None:
        """Return the number under nested keys of ``run.json``, or None."""
        return number_in(self.record, *keys)

    def text(self, *keys: str) -> str:
        """Return the string under nested keys of ``run.json``, or an empty one."""
        value: Any = self.record
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value if isinstance(value, str) else ""


def load_artifacts(run: Run, settings: Sequence[str] = ()) -> RunArtifacts:
    """Load what a run folder has; missing parts are recorded, not raised.

    Args:
        run: the run folder.
        settings: overrides of its data config, such as the paths of its streams.

    Raises:
        UserError: ``run.json`` is damaged (then it is not a run folder), or the data config has no such key.
    """
    overrides = parse_overrides(list(settings), ["data"])["data"]
    missing: dict[str, str] = {}

    def attempt(part: str, load: Callable[[], _T]) -> _T | None:
        try:
            return load()
        except (UserError, OSError) as error:
            missing[part] = " ".join(str(error).split())
            return None

    record = run.read_metadata()
    files = {section: run.configs / f"{section}.yaml" for section in SECTIONS}
    if overrides:
        BinDataConfig.from_yaml(files["data"], overrides)  # a mistake in them is an error, not a line on the page
    configs = {section: attempt(f"{section} config", partial(read_yaml, file)) for section, file in files.items()}
    texts = {section: attempt(f"{section} config", partial(_read, file)) for section, file in files.items()}
    tokenizer = attempt("tokenizer", lambda: load_tokenizer(run.tokenizer))
    checkpoint = attempt("model", run.model_checkpoint)
    model = attempt("model", lambda: _load(checkpoint, tokenizer)) if checkpoint and tokenizer else None
    if checkpoint and not tokenizer:
        missing["model"] = "its tokenizer is missing"
    context = model.config.context_length if model else None
    streams = attempt("streams", lambda: _open_streams(files["data"], overrides, tokenizer, context))
    return RunArtifacts(
        run=run,
        record=record,
        events=attempt("metrics", lambda: read_metrics(run.metrics)) or [],
        configs={section: values or {} for section, values in configs.items()},
        config_texts={section: text for section, text in texts.items() if text},
        samples=attempt("samples", partial(_read, run.samples)) or "",
        tokenizer=tokenizer,
        checkpoint=checkpoint,
        model=model,
        streams=streams,
        evaluation=attempt("evaluation", lambda: read_evaluation(run.evaluation)),
        missing=missing,
    )


def _read(file: Path) -> str:
    return read_text(file, limit=_TEXT_LIMIT, errors="replace")


def _load(checkpoint: Path, tokenizer: Tokenizer) -> CheckpointModel:
    model = load_checkpoint_model(checkpoint)
    check_same_tokenizer(model.tokenizer_hash, tokenizer.hash, checkpoint, "the tokenizer in the run folder")
    return model


def _open_streams(
    config_file: Path, overrides: dict[str, Any], tokenizer: Tokenizer | None, context: int | None
) -> Streams:
    config = BinDataConfig.from_yaml(config_file, overrides)
    stream = open_stream(config.val_path, config)
    if tokenizer is None or stream.metadata.tokenizer_hash != tokenizer.hash:
        raise UserError(f"{config.val_path}: was rewritten with another tokenizer")
    return Streams(
        validation=stream,
        train_statistics=_statistics(Path(config.train_path)),
        val_statistics=_statistics(Path(config.val_path)),
        text=decode_beginning(stream, config, tokenizer),
        document=pick_document(stream, config, tokenizer, context) if context else None,
    )


def _statistics(file: Path) -> FileStatistics | None:
    """Return a stream file's entry in its metadata; None for a glob of several files."""
    return StreamMetadata.read(file.parent).files.get(file.name) if file.is_file() else None
