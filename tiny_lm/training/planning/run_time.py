"""How fast this machine trains a model, measured by training briefly; and how long whole runs would take."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from rich.console import Console

from tiny_lm.data import BinDataConfig
from tiny_lm.data.bin.stream import open_stream
from tiny_lm.errors import UserError
from tiny_lm.files import scratch_folder
from tiny_lm.model import ModelConfig, flops_per_token
from tiny_lm.runs import Run
from tiny_lm.training.config import TrainingConfig
from tiny_lm.training.fit import train
from tiny_lm.training.planning.step_benchmark import StepTimes, benchmark_step


@dataclass(frozen=True)
class Speed:
    """Result of a short run."""

    tokens_per_second: float
    validation_seconds: float
    """One pass over the whole validation stream."""


_MAX_MEASURED_STEPS = 30
_MIN_MEASURED_STEPS = 4


def measure_speed(
    model_config: ModelConfig, training_config: TrainingConfig, data_config: BinDataConfig, *, seconds: float = 12.0
) -> Speed:
    """Train for about ``seconds``, at most 30 optimizer steps, into a temporary folder, like a real run.

    The first half of the steps is warm-up and not timed.

    Raises:
        UserError: a signal stopped it.
    """
    times = benchmark_step(model_config, training_config, data_config.batch_size, data_config.block_size)
    affordable = int(seconds / (times.micro_batch * training_config.accumulate_grad_batches + times.update))
    steps = min(max(affordable, _MIN_MEASURED_STEPS), _MAX_MEASURED_STEPS)
    short = replace(training_config, max_steps=steps, log_every_n_steps=steps // 2, save_every_n_steps=steps)
    with scratch_folder(name="tiny-lm-speed") as folder, Path(os.devnull).open("w") as nowhere:
        silent = Console(file=nowhere)
        result = train(model_config, short, data_config, Run(folder / "run"), console=silent)
    if not result.finished:
        raise UserError("stopped while measuring this machine; nothing was trained")
    return Speed(result.metrics["tokens_per_sec"], result.metrics["val_seconds"])


# --- how long whole runs would take ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlannedRun:
    """The configs of a possible run."""

    model: ModelConfig
    training: TrainingConfig
    data: BinDataConfig

    @property
    def shape(self) -> tuple[Any, ...]:
        """What determines the duration of a step; runs that share it are measured once."""
        training = self.training
        how = (training.optimizer, training.precision, training.gradient_checkpointing)
        return (self.model, *how, self.data.block_size, self.data.batch_size)

    @property
    def tokens(self) -> int:
        """Training tokens of the whole run."""
        training, data = self.training, self.data
        return training.max_steps * training.accumulate_grad_batches * data.batch_size * data.block_size

    @property
    def sequence_flops(self) -> int:
        """Floating-point operations of training on one sequence."""
        return self.data.block_size * flops_per_token(self.model, self.data.block_size)


@dataclass(frozen=True)
class RunTime:
    """Estimated duration of a run on this machine."""

    seconds: float
    tokens_per_second: float
    """In training, without validation."""
    measured: bool
    """False if there was no time to measure this shape, and it was scaled from another one by its operations."""
    validates: bool
    """Whether validation is included; not if its token stream does not exist and no limit is set."""


def estimate_run_times(runs: Sequence[PlannedRun], *, seconds: float) -> list[RunTime]:
    """Benchmark for about ``seconds`` in total and estimate the duration of each run.

    Each shape is benchmarked with its own sequence length and optimizer, and the largest micro-batch that its share of
    the time allows; the smallest ones come first. Nothing is compiled.
    """
    by_shape = {run.shape: run for run in sorted(runs, key=lambda run: run.sequence_flops)}
    for first in list(by_shape.values())[:1]:  # warm-up: torch's first use is not timed
        benchmark_step(first.model, first.training, 1, first.data.block_size)
    end = perf_counter() + seconds
    measured: dict[tuple[Any, ...], StepTimes] = {}
    seconds_per_flop = 0.0
    for number, (shape, run) in enumerate(by_shape.items()):
        left = end - perf_counter()
        if measured and _MIN_PASSES * run.sequence_flops * seconds_per_flop > left:
            continue
        try:
            measured[shape] = times = benchmark_step(
                run.model,
                run.training,
                run.data.batch_size,
                run.data.block_size,
                seconds=left / (len(by_shape) - number),
                grow=True,
            )
        except torch.OutOfMemoryError:
            continue
        seconds_per_flop = times.micro_batch / times.sequences / run.sequence_flops
    return [_run_time(run, measured.get(run.shape), seconds_per_flop) for run in runs]


_MIN_PASSES = 3
"""A benchmark makes two forward and backward passes over a sequence, and a shorter one to validate."""


def _run_time(run: PlannedRun, times: StepTimes | None, seconds_per_flop: float) -> RunTime:
    """Compute the duration of a run from the times of its parts."""
    training, data = run.training, run.data
    measured = times is not None
    if times is None:
        seconds = run.sequence_flops * seconds_per_flop
        times = StepTimes(1, seconds, 0.0, seconds / 3)  # a forward pass has a third of the operations
    sequences_per_step = data.batch_size * training.accumulate_grad_batches
    step = sequences_per_step * times.micro_batch / times.sequences + times.update
    in_training, at_the_end = _validation_tokens(run)
    passes = (training.max_steps - 1) // training.val_every_n_steps  # the last validation comes after the last step
    validated = passes * in_training + at_the_end
    validation = validated / data.block_size * times.validation / times.sequences
    return RunTime(
        training.max_steps * step + validation,
        sequences_per_step * data.block_size / step,
        measured,
        validates=validated > 0,
    )


def _validation_tokens(run: PlannedRun) -> tuple[int, int]:
    """Return the tokens of a validation during the run and at its end; 0 if unknown."""
    most = run.training.val_max_tokens
    try:
        whole = open_stream(run.data.val_path, run.data).tokens
    except UserError:  # it does not exist yet
        return most or 0, most or 0
    return min(most or whole, whole), whole
