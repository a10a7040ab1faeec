"""The source of an export: a trained model with its tokenizer, and text to compare on."""

import dataclasses
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from tiny_lm.data import BinDataConfig
from tiny_lm.data.bin.stream import open_stream, read_in_order
from tiny_lm.dataset.stories import generate_stories
from tiny_lm.errors import UserError
from tiny_lm.model import ModelConfig, Transformer, load_model_config
from tiny_lm.model.checkpoint import load_checkpoint_model
from tiny_lm.runs import Run, is_checkpoint, open_run, read_metrics, run_folder_of
from tiny_lm.tokenizer import Tokenizer, check_same_tokenizer, load_tokenizer

_VALIDATION_TOKENS = 32_768
"""Maximum number of validation tokens that an export is compared on."""


@dataclass(frozen=True)
class ValidationText:
    """Text that the model was not trained on.

    Attributes:
        ids: documents as ``<bos> ... <eos>``, one after the other.
        origin: where the text comes from, for the report.
    """

    ids: list[int]
    origin: str


@dataclass(frozen=True)
class ExportSource:
    """A trained model to export.

    Attributes:
        name: the run's, or the checkpoint's without a run.
        model: float32, on the CPU, in evaluation mode.
        config: the model config.
        tokenizer: the one it was trained with.
        step: optimizer step of the checkpoint.
        record: the run's ``run.json``; empty without a run.
        validation: text to compare on.
        scores: the validation metrics at that step by their keys in ``metrics.jsonl``, if there are any.
    """

    name: str
    model: Transformer
    config: ModelConfig
    tokenizer: Tokenizer
    step: int
    record: dict[str, Any]
    validation: ValidationText
    scores: dict[str, float] = field(default_factory=dict)

    @property
    def chat_template(self) -> str | None:
        """The tokenizer's Jinja template, if it has one."""
        return self.tokenizer.chat_template

    def with_weights_as(self, dtype: torch.dtype) -> "ExportSource":
        """Return a copy whose weights are rounded to ``dtype`` and stored in float32."""
        if dtype == torch.float32:
            return self
        rounded = Transformer(self.config)
        rounded.load_state_dict({key: value.to(dtype) for key, value in self.model.state_dict().items()})
        return dataclasses.replace(self, model=rounded.eval())


def load_source(path: str | Path) -> ExportSource:
    """Load the best checkpoint of a run folder, or the given ``.ckpt`` of one.

    Raises:
        UserError: the run does not exist, is being trained, or has no valid model.
    """
    path = Path(path)
    if is_checkpoint(path):
        run = Run(run_folder_of(path))
        return load_checkpoint_source(path, run.tokenizer, model_config=_config_of(run))
    if path.is_file():
        raise UserError(f"{path}: is neither a run folder nor a .ckpt file")
    run = open_run(path)
    with run.claim_to_read():
        return load_checkpoint_source(run.model_checkpoint(), run.tokenizer, model_config=_config_of(run))


def _config_of(run: Run) -> ModelConfig | None:
    file = run.configs / "model.yaml"
    return load_model_config(file) if file.is_file() else None


def load_checkpoint_source(
    checkpoint: Path, tokenizer_path: Path, *, model_config: ModelConfig | None = None
) -> ExportSource:
    """Load a checkpoint and a tokenizer from separate paths.

    Args:
        checkpoint: a ``.ckpt`` file written by training.
        tokenizer_path: the tokenizer's folder, or any file in it.
        model_config: the expected config, if any.

    Raises:
        UserError: a file is missing or damaged, they do not belong together, or a weight is not finite.
    """
    loaded = load_checkpoint_model(checkpoint, config=model_config)
    tokenizer = load_tokenizer(tokenizer_path)
    check_same_tokenizer(tokenizer.hash, loaded.tokenizer_hash, tokenizer_path, checkpoint)
    if tokenizer.vocab_size > loaded.config.vocab_size:
        raise UserError(
            f"{tokenizer_path}: has {tokenizer.vocab_size} tokens, but the model of {checkpoint} only "
            f"{loaded.config.vocab_size}"
        )
    for name, weight in loaded.model.state_dict().items():
        if not bool(torch.isfinite(weight).all()):
            raise UserError(
                f"{checkpoint}: {name} contains NaN or infinity; export an earlier checkpoint (step-*.ckpt)"
            )
    run = Run(run_folder_of(checkpoint.resolve()))
    in_run = run.metadata_file.is_file()
    name = run.name if in_run else checkpoint.stem
    record = run.read_metadata() if in_run else {}
    model = loaded.model.float()
    scores = _scores(run, loaded.step) if in_run else {}
    validation = _validation(run, tokenizer)
    return ExportSource(name, model, loaded.config, tokenizer, loaded.step, record, validation, scores)


def _scores(run: Run, step: int) -> dict[str, float]:
    events = read_metrics(run.metrics) if run.metrics.is_file() else []
    for event in reversed(events):
        if event["step"] == step and "val_loss" in event:
            return {key: value for key, value in event.items() if key.startswith("val_") and value is not None}
    return {}


def _validation(run: Run, tokenizer: Tokenizer) -> ValidationText:
    """Read the beginning of the run's validation stream, or built-in stories if it is gone."""
    file = run.configs / "data.yaml"
    try:
        config = BinDataConfig.from_yaml(file)
        stream = open_stream(config.val_path, config)
        if stream.metadata.tokenizer_hash == tokenizer.hash:
            ids = next(read_in_order(stream, _VALIDATION_TOKENS))
            return ValidationText(ids.tolist(), f"validation text of the run ({stream.files[0].name})")
    except UserError:
        pass  # the stream was moved or deleted, which does not prevent an export
    stories = tokenizer.encode_batch(list(generate_stories(100, seed=1)), bos=True, eos=True)
    return ValidationText(
        list(chain.from_iterable(stories)), "built-in stories (the run's validation text is not available)"
    )
