"""One training run: checks, run folder, Lightning's trainer, and what is written down at the end."""

import logging
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pytorch_lightning as pl
import torch
from rich.console import Console

from tiny_lm.data import BinDataConfig
from tiny_lm.data.module import BinTokenDataModule
from tiny_lm.errors import UserError
from tiny_lm.model import ModelConfig, num_parameters
from tiny_lm.runs import Run, environment
from tiny_lm.tokenizer import Tokenizer, load_tokenizer
from tiny_lm.training.callbacks import MetricsWriter, Validation
from tiny_lm.training.checkpoints import AtomicCheckpointIO, CheckpointWriter, GracefulStop
from tiny_lm.training.config import TrainingConfig
from tiny_lm.training.device import Precision, choose_device, choose_precision, describe_device, has_compiler
from tiny_lm.training.module import CausalLMModule
from tiny_lm.training.monitors import Event, GpuStatsMonitor, OptimizerStepProgressBar, TokensMonitor
from tiny_lm.training.resume import check_resume, forget_after
from tiny_lm.training.trackers import JsonlLogger


@dataclass(frozen=True)
class TrainingResult:
    """What came out of a training run."""

    run: Run
    finished: bool
    """False where the run was stopped before its last step; it can be resumed."""
    steps: int
    metrics: dict[str, float]


def train(
    model_config: ModelConfig,
    training_config: TrainingConfig,
    data_config: BinDataConfig,
    run: Run,
    *,
    resume_from: Path | None = None,
    names: Sequence[str] = (),
    console: Console | None = None,
) -> TrainingResult:
    """Train a model and fill its run folder.

    Args:
        model_config: the network.
        training_config: optimizer, schedule, precision and rhythm.
        data_config: token streams, windows and batches.
        run: the run folder to write; it may be new or, when resuming, the run's own.
        resume_from: a checkpoint to go on from.
        names: of the three configs, by which ``--resume auto`` finds the run again.
        console: where progress is shown; standard error by default.

    Raises:
        UserError: configs, streams, tokenizer and checkpoint do not fit each other, the loss is no longer a number, or
            disk or memory is full.
    """
    console = console or Console(stderr=True)
    data = BinTokenDataModule(data_config, seed=training_config.seed, ignore_index=training_config.ignore_index)
    tokenizer = _check_fit(model_config, data)
    device = choose_device()
    precision, why = choose_precision(training_config, device)
    if why:
        console.print(why)
    if training_config.compile is True and not has_compiler(device):
        console.print("compile: true needs a C++ compiler (on a GPU: Triton), which is not here: training uncompiled")
        training_config = replace(training_config, compile=False)
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs that have it
    torch.manual_seed(training_config.seed)
    # What decides the order of batches and the state of the optimizer: a resumed run must agree.
    identity = {
        "model": model_config.to_dict(),
        "tokenizer_hash": tokenizer.hash,
        "optimizer": training_config.optimizer,
        "seed": training_config.seed,
        "batch_size": data_config.batch_size,
        "block_size": data_config.block_size,
        "stride": data_config.window_stride,
    }
    resumed_step = 0 if resume_from is None else check_resume(resume_from, identity, training_config.max_steps)
    module = CausalLMModule(model_config, training_config, identity)
    for section, config in (("model", model_config), ("training", training_config), ("data", data_config)):
        config.save(run.configs / f"{section}.yaml")
    tokenizer.save(run.tokenizer)
    run.update_record(
        status="running",
        configs=list(names),
        seed=training_config.seed,
        device=describe_device(device),
        precision=precision,
        parameters=num_parameters(model_config),
        tokens_per_step=data_config.batch_size * data_config.block_size * training_config.accumulate_grad_batches,
        train_tokens=data.train_stream.tokens,
        val_tokens=data.val_stream.tokens,
        environment=environment(),
    )
    forget_after(run, resumed_step)
    return _fit(module, data, run, resume_from, accelerator=device, precision=precision, console=console)


def _fit(
    module: CausalLMModule,
    data: BinTokenDataModule,
    run: Run,
    resume_from: Path | None,
    *,
    accelerator: str,
    precision: Precision,
    console: Console,
) -> TrainingResult:
    """Run Lightning's trainer and write down how it ended."""
    config = module.config
    event: Event = {}
    monitor = TokensMonitor(config, event)
    validation = Validation(config, data.val_stream, monitor, event)
    writer = CheckpointWriter(run, config.save_every_n_steps, config.keep_checkpoints, validation, monitor)
    before, started = run.read_record().get("seconds", 0.0), time.perf_counter()
    try:
        with _quiet_lightning():
            trainer = pl.Trainer(
                accelerator=accelerator,
                devices=1,
                precision=precision,
                max_steps=config.max_steps,
                max_epochs=-1,  # the loader is endless; steps decide
                accumulate_grad_batches=config.accumulate_grad_batches,
                limit_val_batches=0,  # Validation does it: a run then resumes exactly, whatever fell on its last step
                num_sanity_val_steps=0,
                enable_checkpointing=False,
                enable_model_summary=False,
                logger=JsonlLogger(run.metrics),
                plugins=[AtomicCheckpointIO()],
                callbacks=[
                    monitor,
                    GpuStatsMonitor(config.system_metrics_every_n_steps, event),
                    validation,
                    MetricsWriter(event, console),
                    writer,
                    GracefulStop(writer, console),
                    OptimizerStepProgressBar(monitor, console),
                ],
            )
            trainer.fit(module, datamodule=data, ckpt_path=resume_from, weights_only=True)
    except BaseException as error:
        with suppress(UserError):  # a full disk takes the record no more than the checkpoint
            run.update_record(status="failed")
        if isinstance(error, torch.OutOfMemoryError):
            raise UserError(
                "out of memory: lower batch_size and raise accumulate_grad_batches as much, or set "
                "gradient_checkpointing: true"
            ) from None
        raise
    finished = trainer.global_step >= config.max_steps
    metrics = {**monitor.latest, **validation.latest, "best_val_loss": validation.best_loss}
    run.update_record(
        status="finished" if finished else "stopped",
        steps=trainer.global_step,
        tokens=monitor.tokens,
        seconds=round(before + time.perf_counter() - started, 1),
        metrics={key: value for key, value in metrics.items() if math.isfinite(value)},
    )
    return TrainingResult(run, finished, trainer.global_step, metrics)


def _check_fit(model_config: ModelConfig, data: BinTokenDataModule) -> Tokenizer:
    """Check that model and streams fit each other; return the tokenizer that wrote the streams."""
    if data.config.block_size > model_config.context_length:
        raise UserError(
            f"block_size {data.config.block_size} of the data config is above context_length "
            f"{model_config.context_length} of the model config"
        )
    metadata = data.train_stream.metadata
    if metadata.vocab_size > model_config.vocab_size:
        raise UserError(
            f"vocab_size {model_config.vocab_size} of the model config is below the {metadata.vocab_size} tokens of "
            f"the tokenizer behind {data.config.train_path}"
        )
    folder = data.train_stream.tokenizer_folder
    tokenizer = load_tokenizer(folder)
    if tokenizer.hash != metadata.tokenizer_hash:
        raise UserError(
            f"{folder}: is not the tokenizer that wrote {data.config.train_path}; run `tiny-lm tokenize` again"
        )
    return tokenizer


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
