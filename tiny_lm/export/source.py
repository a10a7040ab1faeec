"""What is exported: a trained model with its tokenizer, and text to compare on."""

import dataclasses
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from tiny_lm.console import shell_command
from tiny_lm.data import BinDataConfig
from tiny_lm.data.bin.stream import open_stream, read_in_order
from tiny_lm.dataset.stories import generate_stories
from tiny_lm.errors import UserError
from tiny_lm.model import ModelConfig, Transformer, load_model_config
from tiny_lm.model.checkpoint import load_checkpoint_model
from tiny_lm.runs import Run, is_checkpoint, is_huggingface_folder, open_run, read_metrics, run_folder_of
from tiny_lm.tokenizer import Tokenizer, check_same_tokenizer, load_tokenizer

_VALIDATION_TOKENS = 32_768
"""Most tokens of the validation stream that an export is compared on."""


@dataclass(frozen=True)
class Validation:
    """Text that the model was not trained on.

    Attributes:
        ids: documents as ``<bos> ... <eos>``, one after the other.
        origin: where the text comes from, for the report.
    """

    ids: list[int]
    origin: str


@dataclass(frozen=True)
class Source:
    """A trained model as an exporter takes it.

    Attributes:
        name: of the run, or of the checkpoint where there is no run.
        model: float32, on the CPU, in evaluation mode.
        config: of the model.
        tokenizer: that it was trained with.
        step: optimizer step at which the weights were saved.
        record: the run's ``run.json``; empty without a run.
        validation: text to compare on.
        scores: what the run's validation at that step measured, by the keys of ``metrics.jsonl``, if it did.
    """

    name: str
    model: Transformer
    config: ModelConfig
    tokenizer: Tokenizer
    step: int
    record: dict[str, Any]
    validation: Validation
    scores: dict[str, float] = field(default_factory=dict)

    @property
    def chat_template(self) -> str | None:
        """In Jinja, if one lies beside the tokenizer."""
        return self.tokenizer.chat_template

    def with_weights_as(self, dtype: torch.dtype) -> "Source":
        """Return the same with all weights rounded to ``dtype`` and computed in float32."""
        if dtype == torch.float32:
            return self
        rounded = Transformer(self.config)
        rounded.load_state_dict({key: value.to(dtype) for key, value in self.model.state_dict().items()})
        return dataclasses.replace(self, model=rounded.eval())


def load_source(path: str | Path) -> Source:
    """Load the best checkpoint of a run folder, or the given ``.ckpt`` of one.

    Raises:
        UserError: there is no such run, it is being trained at this moment, or it holds no sound model.
    """
    path = Path(path)
    if is_checkpoint(path):
        run = Run(run_folder_of(path))
        return load_checkpoint_source(path, run.tokenizer, model_config=_config_of(run))
    if path.is_file():
        raise UserError(f"{path}: is neither a run folder nor a .ckpt file")
    if is_huggingface_folder(path) and not Run(path).metadata_file.is_file():
        command = shell_command("tiny-lm", "import", path)
        raise UserError(f"{path}: is a model in Hugging Face's layout; make a run of it first: {command}")
    run = open_run(path)
    with run.claim_to_read():
        return load_checkpoint_source(run.model_checkpoint(), run.tokenizer, model_config=_config_of(run))


def _config_of(run: Run) -> ModelConfig | None:
    file = run.configs / "model.yaml"
    return load_model_config(file) if file.is_file() else None


def load_checkpoint_source(
    checkpoint: Path, tokenizer_path: Path, *, model_config: ModelConfig | None = None
) -> Source:
    """Load a checkpoint and a tokenizer given one by one.

    Args:
        checkpoint: a ``.ckpt`` file that training wrote.
        tokenizer_path: the tokenizer's folder, or any file in it.
        model_config: what the caller believes the model to be.

    Raises:
        UserError: a file is missing or damaged, they do not belong together, or a weight is no number.
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
    return Source(name, model, loaded.config, tokenizer, loaded.step, record, validation, scores)


def _scores(run: Run, step: int) -> dict[str, float]:
    events = read_metrics(run.metrics) if run.metrics.is_file() else []
    for event in reversed(events):
        if event["step"] == step and "val_loss" in event:
            return {key: value for key, value in event.items() if key.startswith("val_") and value is not None}
    return {}


def _validation(run: Run, tokenizer: Tokenizer) -> Validation:
    """Read the beginning of the run's validation stream; built-in stories stand in where it is gone."""
    file = run.configs / "data.yaml"
    try:
        config = BinDataConfig.from_yaml(file)
        stream = open_stream(config.val_path, config)
        if stream.metadata.tokenizer_hash == tokenizer.hash:
            ids = next(read_in_order(stream, _VALIDATION_TOKENS))
            return Validation(ids.tolist(), f"validation text of the run ({stream.files[0].name})")
    except UserError:
        pass  # the stream was moved or deleted, which does not hinder an export
    stories = tokenizer.encode_batch(list(generate_stories(100, seed=1)), bos=True, eos=True)
    return Validation(list(chain.from_iterable(stories)), "built-in stories (the run's validation text is not there)")
