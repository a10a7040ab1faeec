"""One training run: checks, run folder, Lightning's trainer, and what is written down at the end."""

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
from rich.console import Console

from tiny_lm.config import Config
from tiny_lm.console import make_console
from tiny_lm.data import BinDataConfig
from tiny_lm.data.bin.data_module import BinTokenDataModule
from tiny_lm.data.bin.stream import hold_streams
from tiny_lm.errors import UserError
from tiny_lm.hardware.device import Device, describe_device, fastest_device
from tiny_lm.hardware.flops import peak_flops
from tiny_lm.hardware.memory import is_out_of_memory, peak_memory
from tiny_lm.model import ModelConfig, flops_per_token, num_parameters
from tiny_lm.runs import Run, environment, number_in
from tiny_lm.tokenizer import Tokenizer, load_tokenizer
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
    describe_sharding,
    get_distributed_context,
    lightning_options,
    split_global_batch,
    terminate_on_failure,
)
from tiny_lm.training.initial_weights import load_initial_weights
from tiny_lm.training.lm_module import CausalLMModule
from tiny_lm.training.loss import LossFunction, compiled_loss, next_token_loss
from tiny_lm.training.precision import choose_precision, describe_choice
from tiny_lm.training.resume import check_resume, truncate_run


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
    config_files: Sequence[str] = (),
    console: Console | None = None,
) -> TrainingResult:
    """Train a model and fill its run folder.

    Args:
        model_config: the network.
        training_config: optimizer, schedule, precision and rhythm.
        data_config: token streams, windows and batches.
        run: the run folder to write; it may be new or, when resuming, the run's own.
        resume_from: a checkpoint to go on from.
        names: of the three configs, for people.
        config_files: where the three configs lie, by which ``--resume auto`` finds the run again.
        console: where progress is shown; standard error by default.

    Raises:
        UserError: configs, streams, tokenizer and checkpoint do not fit each other, the loss is no longer a number, or
            disk or memory is full.
    """
    is_new = not run.metadata_file.exists()
    device = fastest_device()
    processes = get_distributed_context(training_config, device)
    share = split_global_batch(data_config.batch_size, training_config.accumulate_grad_batches, processes.world_size)
    console = (console or make_console()) if processes.is_main else make_console(quiet=True, force_terminal=False)
    data = BinTokenDataModule(
        data_config,
        seed=training_config.seed,
        ignore_index=training_config.ignore_index,
        micro_batch=share.micro_batch,
    )
    tokenizer = _check_fit(model_config, data)
    check_loggers(training_config.trackers)
    stories = SampleWriter(run, training_config, tokenizer)
    precision, precision_reason = choose_precision(training_config, device)
    tokens_per_step = data_config.batch_size * data_config.block_size * training_config.accumulate_grad_batches
    compiles, compile_reason = choose_compile(
        training_config, model_config, tokens_per_step, data_config.block_size, device
    )
    described = describe_choice(device, precision, precision_reason)
    for line in filter(None, (processes.notice, described, describe_sharding(processes, share), compile_reason)):
        console.print(line, markup=False)
    compiles = compiles and processes.strategy != "fsdp"
    if device == "cpu":
        keep_freed_memory()
    identity = _identity(model_config, training_config, data_config, tokenizer)
    kept = {  # in every checkpoint; a run that goes on from it tells what differs
        **identity,
        "training": training_config.to_dict(),
        "data": data_config.to_dict(),
        "precision": precision,
        "device": device,
        "compiled": compiles,
        **data.sizes,
    }
    finished = run.read_metadata().get("status") == "finished"
    resumed_step = 0 if resume_from is None else check_resume(resume_from, kept, console, finished=finished)
    loss = compiled_loss(precision) if compiles else next_token_loss
    module = _build_module(model_config, replace(training_config, precision=precision), kept, loss)
    if prefers_blocked_attention(device, data_config.block_size):
        module.model.use_blocked_attention()
    plan = _plan(identity, training_config, resumed_step, data.train_stream.tokens)
    agreement = ConfigConsistencyCheck(plan, training_config.seed)
    loggers = build_loggers(training_config.trackers, run, resumed_step, console)
    options = {"accelerator": device, "precision": precision, "logger": loggers, **lightning_options(processes, share)}
    facts = _facts(model_config, data_config, device, processes, kept)
    facts |= {"name": run.name, "tokenizer_hash": tokenizer.hash}
    if config_files:
        facts["config_files"] = list(config_files)
    facts |= {"tokens_per_step": tokens_per_step, **data.sizes}
    if training_config.init_from and resume_from is None:
        facts["init_from"] = load_initial_weights(Path(training_config.init_from), module.model, tokenizer)
        console.print(f"begins with the weights of {training_config.init_from}", markup=False)
    with hold_streams(data.train_stream, data.val_stream), run.claim() if processes.is_main else nullcontext():
        if processes.is_main:
            if is_new and run.metadata_file.exists():
                raise UserError(f"{run.folder}: another process has just trained a run there; choose another run_name")
            _begin(run, (model_config, training_config, data_config), tokenizer, names, **facts)
            truncate_run(run, resume_from, resumed_step)
        return _fit(module, data, run, resume_from, processes, agreement, stories, options, console)


def _build_module(
    model_config: ModelConfig, config: TrainingConfig, kept: dict[str, Any], loss: LossFunction
) -> CausalLMModule:
    """Draw fresh weights from the seed."""
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs that have it
    torch.manual_seed(config.seed)
    return CausalLMModule(model_config, config, kept, loss)


def _identity(
    model_config: ModelConfig, training_config: TrainingConfig, data_config: BinDataConfig, tokenizer: Tokenizer
) -> dict[str, Any]:
    """Return what decides the order of batches and the state of the optimizer: a resumed run must agree."""
    return {
        "model": model_config.to_dict(),
        "tokenizer_hash": tokenizer.hash,
        "optimizer": training_config.optimizer,
        "seed": training_config.seed,
        "batch_size": data_config.batch_size,
        "block_size": data_config.block_size,
        "stride": data_config.training_stride,
    }


def _facts(
    model_config: ModelConfig,
    data_config: BinDataConfig,
    device: Device,
    processes: DistributedContext,
    kept: dict[str, Any],
) -> dict[str, Any]:
    """Return what ``run.json`` says of the model and of where it is trained."""
    return {
        "seed": kept["seed"],
        "device": describe_device(device),
        "processes": processes.world_size,
        "precision": kept["precision"],
        "compiled": kept["compiled"],
        "parameters": num_parameters(model_config),
        "flops_per_token": flops_per_token(model_config, data_config.block_size),
        "peak_flops": asdict(peak_flops(device, kept["precision"])),
    }


def _plan(
    identity: dict[str, Any], training_config: TrainingConfig, resumed_step: int, train_tokens: int
) -> dict[str, Any]:
    """Return what all processes must have read alike from their configs and files."""
    settings = {f"training.{key}": value for key, value in training_config.to_dict().items()}
    return {"resumed step": resumed_step, "training tokens": train_tokens, **identity, **settings}


def _begin(
    run: Run, configs: tuple[Config, Config, Config], tokenizer: Tokenizer, names: Sequence[str], **facts: Any
) -> None:
    """Write down what is about to be trained."""
    for section, config in zip(("model", "training", "data"), configs, strict=True):
        config.save(run.configs / f"{section}.yaml")
    tokenizer.chat_template = read_chat_template(run.tokenizer) or tokenizer.chat_template  # it may have been put there
    tokenizer.save(run.tokenizer)
    run.update_metadata(status="running", configs=list(names), environment=environment(), **facts)


def _fit(
    module: CausalLMModule,
    data: BinTokenDataModule,
    run: Run,
    resume_from: Path | None,
    processes: DistributedContext,
    agreement: ConfigConsistencyCheck,
    stories: SampleWriter,
    options: dict[str, Any],
    console: Console,
) -> TrainingResult:
    """Run Lightning's trainer and write down how it ended."""
    config = module.config
    event: StepMetrics = {}
    record = run.read_metadata()
    ideal = record["flops_per_token"] / record["peak_flops"]["value"] if processes.is_main else None
    monitor = TokensMonitor(config, event, ideal)
    average = WeightAverage(config.ema_decay) if config.ema_decay else None
    validation = Validation(config, data.val_stream, monitor, average, stories, event)
    guard = LossSpikeDetector(config, run, data, console)
    writer = CheckpointWriter(run, config.save_every_n_steps, config.keep_checkpoints, validation, monitor, guard)
    before, started = number_in(record, "seconds") or 0.0, time.perf_counter()
    try:
        with quiet_lightning():
            trainer = pl.Trainer(
                **options,
                max_steps=config.max_steps,
                max_epochs=-1,  # the loader is endless; steps decide
                limit_val_batches=0,  # Validation does it: a run then resumes exactly, whatever fell on its last step
                num_sanity_val_steps=0,
                enable_checkpointing=False,
                enable_model_summary=False,
                plugins=[AtomicCheckpointIO(), processes.environment],
                callbacks=[
                    agreement,
                    guard,
                    monitor,
                    *([average] if average else []),
                    GpuStatsMonitor(config.system_metrics_every_n_steps, event),
                    validation,
                    MetricsWriter(event, console),
                    writer,
                    GracefulStop(writer, console),
                    OptimizerStepProgressBar([monitor, validation], console),
                ],
            )
            with terminate_on_failure(trainer, processes):
                trainer.fit(module, datamodule=data, ckpt_path=resume_from, weights_only=True)
    except BaseException as error:
        if processes.is_main:
            with suppress(UserError):  # a full disk takes the record no more than the checkpoint
                run.update_metadata(
                    status="stopped" if isinstance(error, (KeyboardInterrupt, SystemExit)) else "failed"
                )
        if is_out_of_memory(error):
            raise UserError(
                "out of memory: lower batch_size and raise accumulate_grad_batches as much, or set "
                "gradient_checkpointing: true"
            ) from None
        raise
    finished = trainer.global_step >= config.max_steps
    metrics = {**monitor.latest, **validation.latest, "best_val_loss": validation.best_loss}
    if processes.is_main:
        run.update_metadata(
            status="finished" if finished else "stopped",
            steps=trainer.global_step,
            tokens=monitor.tokens,
            seconds=round(before + time.perf_counter() - started, 1),
            memory=peak_memory(),
            metrics={key: value for key, value in metrics.items() if math.isfinite(value)},
        )
    return TrainingResult(run, finished, trainer.global_step, metrics)


def _check_fit(model_config: ModelConfig, data: BinTokenDataModule) -> Tokenizer:
    """Check that model and streams fit each other; return the tokenizer that wrote the streams."""
    check_block_size(model_config, data.config)
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


def check_block_size(model_config: ModelConfig, data_config: BinDataConfig) -> None:
    """Check that the model can read a whole window.

    Raises:
        UserError: it cannot.
    """
    if data_config.block_size > model_config.context_length:
        raise UserError(
            f"block_size {data_config.block_size} of the data config is above context_length "
            f"{model_config.context_length} of the model config"
        )


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Silence what Lightning prints about itself: its advice concerns settings that are chosen on purpose here."""
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
