"""One training run: checks, run folder, Lightning's trainer, and what is written down at the end."""

import logging
import os
import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO
from rich.console import Console

from tiny_lm.data import BinDataConfig
from tiny_lm.data.module import BinTokenDataModule
from tiny_lm.errors import UserError
from tiny_lm.files import atomic_path
from tiny_lm.model import ModelConfig, num_parameters
from tiny_lm.model.checkpoint import CHECKPOINT_KEY, read_checkpoint
from tiny_lm.runs import Run, environment
from tiny_lm.training.callbacks import (
    CheckpointWriter,
    GpuStatsMonitor,
    GracefulStop,
    OptimizerStepProgressBar,
    TokensMonitor,
    Validation,
)
from tiny_lm.training.config import TrainingConfig
from tiny_lm.training.module import CausalLMModule
from tiny_lm.training.trackers import JsonlLogger


@dataclass(frozen=True)
class TrainingResult:
    """What came out of a training run."""

    run: Run
    finished: bool
    """False where the run was stopped before its last step; it can be resumed."""
    steps: int
    metrics: dict[str, float]


class _AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints whole or not at all and reads them without executing anything."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        with atomic_path(Path(path)) as temporary, temporary.open("wb") as file:
            torch.save(checkpoint, file)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return read_checkpoint(Path(path))


def train(
    model_config: ModelConfig,
    training_config: TrainingConfig,
    data_config: BinDataConfig,
    run: Run,
    *,
    resume_from: Path | None = None,
    names: tuple[str, str] = ("model", "data"),
    console: Console | None = None,
) -> TrainingResult:
    """Train a model and fill its run folder.

    Args:
        model_config: the network.
        training_config: optimizer, schedule, precision and rhythm.
        data_config: token streams, windows and batches.
        run: the run folder to write; it may be new or, when resuming, the run's own.
        resume_from: a checkpoint to go on from.
        names: of model and data config, by which ``--resume auto`` finds the run again.
        console: where progress is shown; standard error by default.

    Raises:
        UserError: configs, streams, tokenizer and checkpoint do not fit each other, or the disk is full.
    """
    console = console or Console(stderr=True)
    data = BinTokenDataModule(data_config, seed=training_config.seed, ignore_index=training_config.ignore_index)
    _check_fit(model_config, data)
    tokenizer_hash = data.train_stream.metadata.tokenizer_hash
    resumed_step = 0
    if resume_from is not None:
        resumed_step = _check_resume(resume_from, model_config, tokenizer_hash, training_config)
    if training_config.compile and not _has_compiler():
        console.print("compile: true needs a C++ compiler (g++ or clang++), which is not here; training uncompiled")
        training_config = replace(training_config, compile=False)
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs that have it
    torch.manual_seed(training_config.seed)
    module = CausalLMModule(model_config, training_config, tokenizer_hash=tokenizer_hash)
    _prepare_run(run, model_config, training_config, data_config, data, names)

    jsonl = JsonlLogger(run.metrics)
    jsonl.drop_after(resumed_step)
    monitor = TokensMonitor(training_config.log_every_n_steps)
    validation = Validation(training_config.val_every_n_steps, data.val_stream, monitor, console)
    writer = CheckpointWriter(
        run, training_config.save_every_n_steps, training_config.keep_checkpoints, validation, monitor
    )
    started = time.perf_counter()
    with _quiet_lightning():
        trainer = pl.Trainer(
            accelerator="auto",
            devices=1,
            precision=_precision(training_config, console),
            max_steps=training_config.max_steps,
            max_epochs=-1,  # the loader is endless; steps decide
            accumulate_grad_batches=training_config.accumulate_grad_batches,
            limit_val_batches=0,  # Validation does it: a run then resumes exactly, whatever fell on its last step
            num_sanity_val_steps=0,
            enable_checkpointing=False,
            enable_model_summary=False,
            logger=jsonl,
            plugins=[_AtomicCheckpointIO()],
            callbacks=[
                monitor,
                GpuStatsMonitor(training_config.system_metrics_every_n_steps),
                validation,
                writer,
                GracefulStop(writer, console),
                OptimizerStepProgressBar(monitor, console),
            ],
        )
        trainer.fit(module, datamodule=data, ckpt_path=resume_from, weights_only=True)

    finished = trainer.global_step >= training_config.max_steps
    metrics = {**monitor.latest, **validation.latest, "best_val_loss": validation.best_loss}
    seconds = run.read_record().get("seconds", 0.0) + time.perf_counter() - started
    run.update_record(
        status="finished" if finished else "stopped",
        steps=trainer.global_step,
        tokens=monitor.tokens,
        seconds=round(seconds, 1),
        metrics=metrics,
    )
    return TrainingResult(run, finished, trainer.global_step, metrics)


def _check_fit(model_config: ModelConfig, data: BinTokenDataModule) -> None:
    if data.config.block_size > model_config.context_length:
        raise UserError(
            f"block_size {data.config.block_size} of the data config is above context_length "
            f"{model_config.context_length} of the model config"
        )
    vocab_size = data.train_stream.metadata.vocab_size
    if vocab_size > model_config.vocab_size:
        raise UserError(
            f"vocab_size {model_config.vocab_size} of the model config is below the {vocab_size} tokens of the "
            f"tokenizer behind {data.config.train_path}"
        )


def _check_resume(path: Path, model_config: ModelConfig, tokenizer_hash: str, config: TrainingConfig) -> int:
    """Return the step of a checkpoint that this run can go on from."""
    checkpoint = read_checkpoint(path)
    ours = checkpoint[CHECKPOINT_KEY]
    if ours["tokenizer_hash"] != tokenizer_hash:
        raise UserError(f"{path}: was trained on text of another tokenizer than the data config's streams")
    if ours["model"] != model_config.to_dict():
        raise UserError(f"{path}: holds another model than the model config; resume with the run's own configs")
    step = int(checkpoint["global_step"])
    if step >= config.max_steps:
        raise UserError(f"{path}: stands at step {step} of max_steps {config.max_steps}: nothing is left to train")
    return step


def _prepare_run(
    run: Run,
    model_config: ModelConfig,
    training_config: TrainingConfig,
    data_config: BinDataConfig,
    data: BinTokenDataModule,
    names: tuple[str, str],
) -> None:
    """Write down what is about to be trained."""
    model_config.save(run.configs / "model.yaml")
    training_config.save(run.configs / "training.yaml")
    data_config.save(run.configs / "data.yaml")
    if not run.tokenizer.exists():
        shutil.copytree(data.train_stream.tokenizer_folder, run.tokenizer)
    run.update_record(
        status="running",
        configs=list(names),
        seed=training_config.seed,
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads",
        parameters=num_parameters(model_config),
        tokens_per_step=data_config.batch_size * data_config.block_size * training_config.accumulate_grad_batches,
        train_tokens=data.train_stream.tokens,
        val_tokens=data.val_stream.tokens,
        environment=environment(),
    )


def _precision(config: TrainingConfig, console: Console) -> Any:
    if config.precision == "16-mixed" and not torch.cuda.is_available():
        console.print("precision 16-mixed needs a GPU; training in bf16-mixed here")
        return "bf16-mixed"
    return config.precision


def _has_compiler() -> bool:
    """Whether torch.compile finds what it needs: on a CPU a C++ compiler, on a GPU torch brings its own."""
    return torch.cuda.is_available() or any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++"))


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Silence what Lightning prints about itself: its advice concerns settings that are chosen on purpose here."""
    logger = logging.getLogger("pytorch_lightning")
    level = logger.level
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"pytorch_lightning|lightning_fabric")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)
