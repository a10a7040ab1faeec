"""Find the largest micro-batch that fits into memory, and the fastest, by allocating all that a run does.

A trial trains two optimizer steps and validates (``step_benchmark.py``). On a GPU the allocator gets a limit and raises
an error when it is reached. On a CPU the system would kill some process instead; so the trials run in a child process
with its own limit, sizes go up one by one, and a size that would exceed the limit by extrapolation is not tried.
"""

import gc
import multiprocessing
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

import torch

from tiny_lm.errors import UserError
from tiny_lm.hardware.device import Device
from tiny_lm.hardware.memory import is_out_of_memory, peak_memory
from tiny_lm.training.config import TrainingConfig
from tiny_lm.training.planning.memory import MemoryConfig, estimate_memory
from tiny_lm.training.planning.step_benchmark import StepTimes, benchmark_step

_MAX_SEQUENCES = 1024
"""Upper bound unless a global batch bounds the micro-batch."""

_PASSES = 5
"""A benchmark of two steps trains on at most four micro-batches and validates on one."""

_SPEED_TOLERANCE = 0.95
"""A smaller micro-batch with this fraction of the best speed is as good, and leaves memory free."""


@dataclass(frozen=True)
class BatchSizeTrial:
    """Result of one micro-batch size."""

    sequences: int
    fits: bool
    memory: int
    """Peak bytes; on a CPU of the whole process. Estimated if not tried."""
    tokens_per_second: float | None
    """None if not tried or too large."""


@dataclass(frozen=True)
class BatchSizes:
    """Result of the search."""

    trials: tuple[BatchSizeTrial, ...]

    @property
    def largest(self) -> BatchSizeTrial:
        """The largest micro-batch that fits, possibly by estimate."""
        return max((trial for trial in self.trials if trial.fits), key=lambda trial: trial.sequences)

    @property
    def fastest(self) -> BatchSizeTrial:
        """The smallest micro-batch among the fastest."""
        speeds = {trial: trial.tokens_per_second for trial in self.trials if trial.tokens_per_second is not None}
        best = max(speeds.values())
        return min(
            (t for t, speed in speeds.items() if speed >= _SPEED_TOLERANCE * best), key=lambda trial: trial.sequences
        )


def sizes_to_try(sequences_per_step: int | None, limit: int | None) -> list[int]:
    """Return the micro-batch sizes that divide a step; powers of two if no step is given."""
    most = limit or sequences_per_step or _MAX_SEQUENCES
    if sequences_per_step is None:
        return [2**power for power in range(most.bit_length())]
    return [size for size in range(1, min(most, sequences_per_step) + 1) if sequences_per_step % size == 0]


def find_batch_sizes(
    config: MemoryConfig,
    sequences_per_step: int | None,
    *,
    limit: int | None = None,
    memory: int,
    seconds: float,
    on_trial: Callable[[BatchSizeTrial], None],
) -> BatchSizes:
    """Find which micro-batches fit and how fast they are.

    Args:
        config: what is trained; its ``sequences`` are ignored.
        sequences_per_step: sequences in an optimizer step of one process, which a micro-batch must divide; None: any.
        limit: maximum sequences in a micro-batch.
        memory: bytes that may be used.
        seconds: on a CPU, about how long to try.
        on_trial: called with each finished trial.

    Raises:
        UserError: not even one sequence fits.
    """
    sizes = sizes_to_try(sequences_per_step, limit)
    trials: list[BatchSizeTrial] = []
    search = _try_in_child(config, sequences_per_step, sizes, memory, seconds)
    if config.device != "cpu":
        search = _try_on_gpu_sizes(config, sequences_per_step, sizes, memory)
    for trial in search:
        trials.append(trial)
        on_trial(trial)
    if not any(trial.fits for trial in trials):
        raise UserError(
            f"a micro-batch of one sequence of {config.block_size} tokens does not fit into {memory / 1e9:.1f} GB: "
            "lower data.block_size, or set training.gradient_checkpointing=true"
        )
    return BatchSizes(tuple(trials))


def _speed(times: StepTimes, config: MemoryConfig, sequences_per_step: int | None) -> float:
    """Return tokens per second, with the optimizer update spread over the micro-batches of a step."""
    micro_batches = (sequences_per_step or times.sequences) / times.sequences
    return times.sequences * config.block_size / (times.micro_batch + times.update / micro_batches)


# --- on a GPU --------------------------------------------------------------------------------------------------------


def search(sizes: Sequence[int], attempt: Callable[[int], BatchSizeTrial]) -> Iterator[BatchSizeTrial]:
    """Try ever larger sizes, then bisect between the largest that fits and the smallest that does not."""
    fitting, failing, index = -1, len(sizes), 0
    while failing - fitting > 1:
        trial = attempt(sizes[index])
        yield trial
        if trial.fits:
            fitting = index
        else:
            failing = index
        growing = failing == len(sizes)
        index = min(2 * index + 1, len(sizes) - 1) if growing else (fitting + failing) // 2


def _try_on_gpu_sizes(
    config: MemoryConfig, sequences_per_step: int | None, sizes: Sequence[int], memory: int
) -> Iterator[BatchSizeTrial]:
    with _gpu_limit(config.device, memory):
        yield from search(sizes, lambda sequences: _try_on_gpu(config, sequences_per_step, sequences))


def _try_on_gpu(config: MemoryConfig, sequences_per_step: int | None, sequences: int) -> BatchSizeTrial:
    if config.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = None
    try:
        times = benchmark_step(
            config.model,
            _with_accumulation(config.training, sequences_per_step, sequences),
            sequences,
            config.block_size,
        )
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if not is_out_of_memory(error):
            raise
    gc.collect()
    used = estimate_memory(replace(config, sequences=sequences)).total
    if config.device == "cuda":
        used = torch.cuda.max_memory_reserved() if times else used
        torch.cuda.empty_cache()
    return BatchSizeTrial(
        sequences, times is not None, used, _speed(times, config, sequences_per_step) if times else None
    )


@contextmanager
def _gpu_limit(device: Device, memory: int) -> Iterator[None]:
    """Limit torch to ``memory`` bytes of the GPU while the block runs."""
    gpu: Any = torch.cuda if device == "cuda" else torch.mps
    whole = torch.cuda.mem_get_info()[1] if device == "cuda" else torch.mps.recommended_max_memory()
    gpu.set_per_process_memory_fraction(min(memory / whole, 1.0))
    try:
        yield
    finally:
        gpu.set_per_process_memory_fraction(1.0)


def _with_accumulation(training: TrainingConfig, sequences_per_step: int | None, sequences: int) -> TrainingConfig:
    """Return the training config with the accumulation for ``sequences`` in a micro-batch."""
    return replace(training, accumulate_grad_batches=(sequences_per_step or sequences) // sequences)


# --- on a CPU --------------------------------------------------------------------------------------------------------


def _try_in_child(
    config: MemoryConfig, sequences_per_step: int | None, sizes: Sequence[int], memory: int, seconds: float
) -> Iterator[BatchSizeTrial]:
    """Try sizes from the smallest up while memory and time allow; end with the largest that would fit."""
    done: list[BatchSizeTrial] = []
    with _child(config, sequences_per_step, memory) as connection:
        started, lasted = time.perf_counter(), 0.0  # without the time to load Python and torch
        for sequences in sizes:
            passed = time.perf_counter() - started
            if done and passed + lasted + _extra_seconds(config, sequences, done[-1]) > seconds:
                break
            if _predict(config, sequences, done) > memory:
                break
            before = time.perf_counter()
            trial = _request_trial(connection, sequences) or BatchSizeTrial(
                sequences, False, _predict(config, sequences, done), None
            )
            lasted = time.perf_counter() - before
            yield trial
            if not trial.fits:
                return
            done.append(trial)
    untried = [BatchSizeTrial(size, True, _predict(config, size, done), None) for size in sizes[len(done) :]]
    yield from [trial for trial in untried if trial.memory <= memory][-1:]


def _extra_seconds(config: MemoryConfig, sequences: int, last: BatchSizeTrial) -> float:
    """Return the extra seconds of a size over a smaller one, at the smaller one's speed."""
    assert last.tokens_per_second is not None
    return _PASSES * (sequences - last.sequences) * config.block_size / last.tokens_per_second


def _predict(config: MemoryConfig, sequences: int, done: Sequence[BatchSizeTrial]) -> int:
    """Extrapolate the memory of a size from smaller ones.

    It grows at least as in the closed form; memory that the C library does not return comes on top.
    """
    estimate = estimate_memory(replace(config, sequences=sequences)).total
    if not done:
        return estimate
    first, last = done[0], done[-1]
    of_last = estimate_memory(replace(config, sequences=last.sequences)).total
    measured = (last.memory - first.memory) / max(last.sequences - first.sequences, 1)
    growth = max(measured, (estimate - of_last) / (sequences - last.sequences))
    return last.memory + int(growth * (sequences - last.sequences))


@contextmanager
def _child(config: MemoryConfig, sequences_per_step: int | None, memory: int) -> Iterator[Connection]:
    """Start the process that benchmarks sizes; yield our end of the pipe when it is ready."""
    context = multiprocessing.get_context("spawn")  # a fork would share torch's state
    ours, theirs = context.Pipe()
    process = context.Process(target=_run_trials, args=(theirs, config, sequences_per_step, memory), daemon=True)
    process.start()
    theirs.close()
    try:
        with suppress(EOFError):  # it died; the first request will notice
            ours.recv()
        yield ours
    finally:
        process.kill()
        process.join()
        ours.close()


def _request_trial(connection: Connection, sequences: int) -> BatchSizeTrial | None:
    """Benchmark a size in the child; return None if memory did not suffice or the system killed it."""
    try:
        connection.send(sequences)
        answer: BatchSizeTrial | Exception | None = connection.recv()
    except (EOFError, OSError):
        return None
    if isinstance(answer, Exception):
        raise answer
    return answer


def _run_trials(connection: Connection, config: MemoryConfig, sequences_per_step: int | None, memory: int) -> None:
    """Benchmark each requested size, in the child."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and kills this process
    _limit_memory(memory)
    connection.send("ready")
    while True:
        sequences: int = connection.recv()
        try:
            training = _with_accumulation(config.training, sequences_per_step, sequences)
            times = benchmark_step(config.model, training, sequences, config.block_size)
        except Exception as error:
            connection.send(None if is_out_of_memory(error) else error)
            return
        peak = peak_memory().get("process_peak_memory_mb")  # unknown on Windows
        used = _predict(config, sequences, []) if peak is None else int(peak * 2**20)
        connection.send(BatchSizeTrial(sequences, used <= memory, used, _speed(times, config, sequences_per_step)))


def _limit_memory(memory: int) -> None:
    """Limit this process to ``memory`` bytes, where the system supports it."""
    if sys.platform.startswith("linux"):
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(
            resource.RLIMIT_DATA, (memory if most == resource.RLIM_INFINITY else min(memory, most), most)
        )
