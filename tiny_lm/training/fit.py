"""One training run: the plan, the run folder, Lightning's trainer, and the final metrics."""

import logging
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers.logger import Logger
from rich.console import Console

from tiny_lm.console import make_console
from tiny_lm.data import BinDataConfig
from tiny_lm.data.bin.data_module import BinTokenDataModule
from tiny_lm.data.bin.stream import hold_streams
from tiny_lm.environment import environment
from tiny_lm.errors import UserError
from tiny_lm.hardware.device import Device, Precision, describe_device, fastest_device
from tiny_lm.hardware.flops import peak_flops
from tiny_lm.hardware.memory import is_out_of_memory, peak_memory
from tiny_lm.model import ModelConfig, flops_per_token, num_parameters
from tiny_lm.runs import Run, number_in
from tiny_lm.tokenizer import Tokenizer, check_same_tokenizer, load_tokenizer
from tiny_lm.tokenizer.chat_template import read_chat_template
from tiny_lm.tracking.loggers import build_loggers, check_loggers
from tiny_lm.training.acceleration import choose_compile, keep_freed_memory, prefers_blocked_attention
from tiny_lm.training.callbacks.base import StepMetrics
from tiny_lm.training.callbacks.checkpoints import CheckpointWriter, GracefulStop
from tiny_lm.training.callbacks.ema import WeightAverage
from tiny_lm.training.callbacks.gpu import GpuStatsMonitor
from tiny_lm.training.callbacks.loss_spikes import LossSpikeDetector
from tiny_lm.training.callbacks.metrics import MetricsWriter
from tiny_lm.training.callbacks.progress import OptimizerStepProgressBar
from tiny_lm.training.callbacks.samples import SampleWriter
from tiny_lm.training.callbacks.tokens import TokensMonitor
from tiny_lm.training.callbacks.validation import Validation
from tiny_lm.training.checkpoint_io import AtomicCheckpointIO
from tiny_lm.training.config import TrainingConfig
from tiny_lm.training.distributed import (
    ConfigConsistencyCheck,
    DistributedContext,
    PerRankBatch,
    describe_sharding,
    get_distributed_context,
    lightning_options,
    split_global_batch,
    terminate_on_failure,
)
from tiny_lm.training.initial_weights import load_initial_weights
from tiny_lm.training.lm_module import CausalLMModule
from tiny_lm.training.loss import compiled_loss, next_token_loss
from tiny_lm.training.precision import choose_precision, describe_choice
from tiny_lm.training.resume import check_resume, truncate_run


@dataclass(frozen=True)
class TrainingResult:
    """How a training run ended."""

    run: Run
    finished: bool
    """False if the run was stopped before its last step; it can be resumed."""
    steps: int
    metrics: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """What is trained, where and how: resolved and validated before anything is written."""

    model: ModelConfig
    training: TrainingConfig
    data: BinTokenDataModule
    tokenizer: Tokenizer
    run: Run
    resume_from: Path | None
    device: Device
    precision: Precision
    """Precision used on ``device``; may differ from the training config's."""
    compiled: bool
    distributed: DistributedContext
    batch: PerRankBatch

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step, over all ranks."""
        return self.data.config.batch_size * self.data.config.block_size * self.training.accumulate_grad_batches

    @property
    def identity(self) -> dict[str, Any]:
        """What determines the order of batches and the optimizer state: a resumed run must match it."""
        return {
            "model": self.model.to_dict(),
            "tokenizer_hash": self.tokenizer.hash,
            "optimizer": self.training.optimizer,
            "seed": self.training.seed,
            "batch_size": self.data.config.batch_size,
            "block_size": self.data.config.block_size,
            "stride": self.data.config.training_stride,
        }

    @property
    def checkpoint_meta(self) -> dict[str, Any]:
        """Metadata of every checkpoint; resuming reports what has changed since."""
        return {
            **self.identity,
            "training": self.training.to_dict(),
            "data": self.data.config.to_dict(),
            "precision": self.precision,
            "device": self.device,
            "compiled": self.compiled,
            **self.data.sizes,
        }

    def run_metadata(self) -> dict[str, Any]:
        """Return the metadata of model, data and machine for ``run.json``."""
        return {
            "seed": self.training.seed,
            "device": describe_device(self.device),
            "processes": self.distributed.world_size,
            "precision": self.precision,
            "compiled": self.compiled,
            "parameters": num_parameters(self.model),
            "flops_per_token": flops_per_token(self.model, self.data.config.block_size),
            "peak_flops": asdict(peak_flops(self.device, self.precision)),
            "name": self.run.name,
            "tokenizer_hash": self.tokenizer.hash,
            "tokens_per_step": self.tokens_per_step,
            **self.data.sizes,
        }

    def consistency_values(self, resumed_step: int) -> dict[str, Any]:
        """Return the values from configs and files that must be equal on all ranks."""
        settings = {f"training.{key}": value for key, value in self.training.to_dict().items()}
        train_tokens = self.data.train_stream.tokens
        return {"resumed step": resumed_step, "training tokens": train_tokens, **self.identity, **settings}


def train(
    model_config: ModelConfig,
    training_config: TrainingConfig,
    data_config: BinDataConfig,
    run: Run,
    *,
    resume_from: Path | None = None,
    names: Sequence[str] = (),
    config_files: Sequence[str] = (),
    console: Console | None = None,
) -> TrainingResult:
    """Train a model and fill its run folder.

    Args:
        model_config: the network.
        training_config: optimizer, schedule, precision and intervals.
        data_config: token streams, sequences and batches.
        run: the run folder to write; new, or the resumed run's own.
        resume_from: a checkpoint to resume from.
        names: of the three configs, for display.
        config_files: paths of the three configs, by which ``--resume auto`` finds the run again.
        console: shows progress; standard error by default.

    Raises:
        UserError: configs, streams, tokenizer and checkpoint do not match, the loss is NaN or infinite, or disk or
            memory is full.
    """
    is_new = not run.metadata_file.exists()
    device = fastest_device()
    distributed = get_distributed_context(training_config, device)
    is_main = distributed.is_main
    console = (console or make_console()) if is_main else make_console(quiet=True, force_terminal=False)
    plan = _plan(model_config, training_config, data_config, run, resume_from, device, distributed, console)
    samples = SampleWriter(run, training_config, plan.tokenizer)
    if device == "cpu":
        keep_freed_memory()
    resumed_step = 0
    if resume_from is not None:
        finished = run.read_metadata().get("status") == "finished"
        resumed_step = check_resume(resume_from, plan.checkpoint_meta, console, finished=finished)
    module = _build_module(plan)
    metadata = plan.run_metadata()
    if config_files:
        metadata["config_files"] = list(config_files)
    if training_config.init_from and resume_from is None:
        metadata["init_from"] = load_initial_weights(Path(training_config.init_from), module.model, plan.tokenizer)
        console.print(f"initial weights: {training_config.init_from}", markup=False)
    with hold_streams(plan.data.train_stream, plan.data.val_stream), run.claim() if is_main else nullcontext():
        if is_main:
            if is_new and run.metadata_file.exists():
                raise UserError(f"{run.folder}: another process has just trained a run there; choose another run_name")
            _write_inputs(plan, configs=list(names), **metadata)
            truncate_run(run, resume_from, resumed_step)
        return _fit(plan, module, samples, resumed_step, console)


def _plan(
    model_config: ModelConfig,
    training_config: TrainingConfig,
    data_config: BinDataConfig,
    run: Run,
    resume_from: Path | None,
    device: Device,
    distributed: DistributedContext,
    console: Console,
) -> TrainingPlan:
    """Resolve and validate the configs; print how the run trains."""
    batch = split_global_batch(data_config.batch_size, training_config.accumulate_grad_batches, distributed.world_size)
    data = BinTokenDataModule(
        data_config,
        seed=training_config.seed,
        ignore_index=training_config.ignore_index,
        micro_batch=batch.micro_batch,
    )
    tokenizer = _load_matching_tokenizer(model_config, data)
    check_loggers(training_config.trackers)
    precision, precision_reason = choose_precision(training_config, device)
    plan = TrainingPlan(
        model=model_config,
        training=training_config,
        data=data,
        tokenizer=tokenizer,
        run=run,
        resume_from=resume_from,
        device=device,
        precision=precision,
        compiled=False,
        distributed=distributed,
        batch=batch,
    )
    compiled, compile_reason = choose_compile(
        training_config, model_config, plan.tokens_per_step, data_config.block_size, device
    )
    described = describe_choice(device, precision, precision_reason), describe_sharding(distributed, batch)
    for line in filter(None, (distributed.notice, *described, compile_reason)):
        console.print(line, markup=False)
    return replace(plan, compiled=compiled and distributed.strategy != "fsdp")


def _build_module(plan: TrainingPlan) -> CausalLMModule:
    """Seed torch, enable TF32 and build the module."""
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(plan.training.seed)
    loss = compiled_loss(plan.precision) if plan.compiled else next_token_loss
    module = CausalLMModule(plan.model, replace(plan.training, precision=plan.precision), plan.checkpoint_meta, loss)
    if prefers_blocked_attention(plan.device, plan.data.config.block_size):
        module.model.use_blocked_attention()
    return module


def _write_inputs(plan: TrainingPlan, **metadata: Any) -> None:
    """Write the resolved configs, the tokenizer and ``run.json`` into the run folder."""
    run, tokenizer = plan.run, plan.tokenizer
    for section, config in (("model", plan.model), ("training", plan.training), ("data", plan.data.config)):
        config.save(run.configs / f"{section}.yaml")
    tokenizer.chat_template = read_chat_template(run.tokenizer) or tokenizer.chat_template  # may be hand-written
    tokenizer.save(run.tokenizer)
    run.update_metadata(status="running", environment=environment(), **metadata)


def _fit(
    plan: TrainingPlan, module: CausalLMModule, samples: SampleWriter, resumed_step: int, console: Console
) -> TrainingResult:
    """Run Lightning's trainer and record how it ended."""
    config, run, data, is_main = module.config, plan.run, plan.data, plan.distributed.is_main
    metrics: StepMetrics = {}
    earlier_seconds = number_in(run.read_metadata(), "seconds") or 0.0
    started = time.perf_counter()
    ideal = flops_per_token(plan.model, data.config.block_size) / peak_flops(plan.device, plan.precision).value
    monitor = TokensMonitor(config, metrics, ideal)
    average = WeightAverage(config.ema_decay) if config.ema_decay else None
    validation = Validation(config, data.val_stream, monitor, average, samples, metrics)
    spikes = LossSpikeDetector(config, run, data, console)
    writer = CheckpointWriter(run, config.save_every_n_steps, config.keep_checkpoints, validation, monitor, spikes)
    # Order matters: metrics are collected before they are written, and the checkpoint is written last.
    callbacks = [
        ConfigConsistencyCheck(plan.consistency_values(resumed_step), config.seed),
        spikes,
        monitor,
        *([average] if average else []),
        GpuStatsMonitor(config.system_metrics_every_n_steps, metrics),
        validation,
        MetricsWriter(metrics, console),
        writer,
        GracefulStop(writer, console),
        OptimizerStepProgressBar([monitor, validation], console),
    ]
    try:
        with quiet_lightning():
            trainer = _build_trainer(plan, callbacks, build_loggers(config.trackers, run, resumed_step, console))
            with terminate_on_failure(trainer, plan.distributed):
                trainer.fit(module, datamodule=data, ckpt_path=plan.resume_from, weights_only=True)
    except BaseException as error:
        if is_main:
            stopped = isinstance(error, (KeyboardInterrupt, SystemExit))
            with suppress(UserError):  # the disk may be full
                run.update_metadata(status="stopped" if stopped else "failed")
        if is_out_of_memory(error):
            raise UserError(
                "out of memory: lower batch_size and raise accumulate_grad_batches by the same factor, or set "
                "gradient_checkpointing: true"
            ) from None
        raise
    finished = trainer.global_step >= config.max_steps
    final = {**monitor.latest, **validation.latest, "best_val_loss": validation.best_loss}
    if is_main:
        run.update_metadata(
            status="finished" if finished else "stopped",
            steps=trainer.global_step,
            tokens=monitor.tokens,
            seconds=round(earlier_seconds + time.perf_counter() - started, 1),
            memory=peak_memory(),
            metrics={key: value for key, value in final.items() if math.isfinite(value)},
        )
    return TrainingResult(run, finished, trainer.global_step, final)


def _build_trainer(plan: TrainingPlan, callbacks: list[Callback], loggers: list[Logger]) -> pl.Trainer:
    return pl.Trainer(
        accelerator=plan.device,
        precision=plan.precision,
        logger=loggers,
        **lightning_options(plan.distributed, plan.batch),
        max_steps=plan.training.max_steps,
        max_epochs=-1,  # the data loader is endless
        limit_val_batches=0,  # the Validation callback validates, so that a run resumes exactly
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_model_summary=False,
        plugins=[AtomicCheckpointIO(), plan.distributed.environment],
        callbacks=callbacks,
    )


def _load_matching_tokenizer(model_config: ModelConfig, data: BinTokenDataModule) -> Tokenizer:
    """Check that model and streams match; return the tokenizer that wrote the streams."""
    check_block_size(model_config, data.config)
    metadata = data.train_stream.metadata
    if metadata.vocab_size > model_config.vocab_size:
        raise UserError(
            f"vocab_size {model_config.vocab_size} of the model config is below the {metadata.vocab_size} tokens of "
            f"the tokenizer of {data.config.train_path}"
        )
    folder = data.train_stream.tokenizer_folder
    tokenizer = load_tokenizer(folder)
    check_same_tokenizer(
        tokenizer.hash, metadata.tokenizer_hash, folder, data.config.train_path, "run `tiny-lm tokenize` again"
    )
    return tokenizer


def check_block_size(model_config: ModelConfig, data_config: BinDataConfig) -> None:
    """Raise UserError if a sequence does not fit into the model's context."""
    if data_config.block_size > model_config.context_length:
        raise UserError(
            f"block_size {data_config.block_size} of the data config is above context_length "
            f"{model_config.context_length} of the model config"
        )


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Silence Lightning's log messages and warnings: their advice concerns settings that are deliberate here."""
    levels = {logger: logger.level for logger in map(logging.getLogger, ("pytorch_lightning", "lightning_fabric"))}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"pytorch_lightning|lightning_fabric")
        for logger in levels:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in levels.items():
                logger.setLevel(level)
