"""The largest micro-batch that fits into memory, and the fastest: found by trying, with everything that a run holds.

A trial trains two optimizer steps and validates (``step_benchmark.py``). On a GPU the allocator
is given a limit and says cleanly when it is reached. A CPU has no such clean end, since the system would kill some
process; there the trials run in a child process with a limit of its own, sizes go up one by one, and one that would
reach the limit by what the smaller ones took is not tried.
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
"""Where no global batch is given that would bound a micro-batch."""

_PASSES = 5
"""A rehearsal of two steps trains on at most four micro-batches, and validates on one."""

_AS_FAST = 0.95
"""A smaller micro-batch with this share of the best speed is as good, and leaves memory free."""


@dataclass(frozen=True)
class BatchSizeTrial:
    """What became of one micro-batch size."""

    sequences: int
    fits: bool
    memory: int
    """Bytes at the peak; on a CPU of the whole process. Estimated where it was not tried."""
    tokens_per_second: float | None
    """None: it was not tried, or did not fit."""


@dataclass(frozen=True)
class BatchSizes:
    """What the search came to."""

    trials: tuple[BatchSizeTrial, ...]

    @property
    def largest(self) -> BatchSizeTrial:
        """The largest micro-batch that fits; it may be one that was not tried."""
        return max((trial for trial in self.trials if trial.fits), key=lambda trial: trial.sequences)

    @property
    def fastest(self) -> BatchSizeTrial:
        """The smallest micro-batch of those that are as fast as any."""
        speeds = {trial: trial.tokens_per_second for trial in self.trials if trial.tokens_per_second is not None}
        best = max(speeds.values())
        return min((t for t, speed in speeds.items() if speed >= _AS_FAST * best), key=lambda trial: trial.sequences)


def sizes_to_try(sequences_per_step: int | None, limit: int | None) -> list[int]:
    """Return the micro-batch sizes that make up a step without rest; powers of two where no step is given."""
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
    report: Callable[[BatchSizeTrial], None],
) -> BatchSizes:
    """Find which micro-batches fit, and how fast they are.

    Args:
        setup: what is trained; its ``windows`` do not matter.
        windows_per_step: windows in an optimizer step of one process, which a micro-batch has to divide; None: any.
        limit: most windows in a micro-batch.
        memory: bytes that may be used.
        seconds: on a CPU, about how long to go on trying.
        report: is called with each trial as it ends.

    Raises:
        UserError: not even one window fits.
    """
    sizes = sizes_to_try(sequences_per_step, limit)
    trials: list[BatchSizeTrial] = []
    search = _try_in_child(config, sequences_per_step, sizes, memory, seconds)
    if config.device != "cpu":
        search = _try_here(config, sequences_per_step, sizes, memory)
    for trial in search:
        trials.append(trial)
        report(trial)
    if not any(trial.fits for trial in trials):
        raise UserError(
            f"a micro-batch of one window of {config.block_size} tokens does not fit into {memory / 1e9:.1f} GB: "
            "lower data.block_size, or set training.gradient_checkpointing=true"
        )
    return BatchSizes(tuple(trials))


def _speed(times: StepTimes, config: MemoryConfig, sequences_per_step: int | None) -> float:
    """Return tokens per second, the optimizer's step shared by the micro-batches of a step."""
    micro_batches = (sequences_per_step or times.sequences) / times.sequences
    return times.sequences * config.block_size / (times.micro_batch + times.update / micro_batches)


# --- on a GPU --------------------------------------------------------------------------------------------------------


def search(sizes: Sequence[int], attempt: Callable[[int], BatchSizeTrial]) -> Iterator[BatchSizeTrial]:
    """Try ever larger sizes, then halve the distance between the last that fits and the first that does not."""
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


def _try_here(
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
            config.model, _accumulating(config.training, sequences_per_step, sequences), sequences, config.block_size
        )
    except RuntimeError as error:  # of which torch.OutOfMemoryError is one
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
    """Let torch take no more than ``memory`` bytes of the GPU while the block runs."""
    gpu: Any = torch.cuda if device == "cuda" else torch.mps
    whole = torch.cuda.mem_get_info()[1] if device == "cuda" else torch.mps.recommended_max_memory()
    gpu.set_per_process_memory_fraction(min(memory / whole, 1.0))
    try:
        yield
    finally:
        gpu.set_per_process_memory_fraction(1.0)


def _accumulating(training: TrainingConfig, sequences_per_step: int | None, sequences: int) -> TrainingConfig:
    """Return the training config with the accumulation that ``windows`` in a micro-batch need."""
    return replace(training, accumulate_grad_batches=(sequences_per_step or sequences) // sequences)


# --- on a CPU --------------------------------------------------------------------------------------------------------


def _try_in_child(
    config: MemoryConfig, sequences_per_step: int | None, sizes: Sequence[int], memory: int, seconds: float
) -> Iterator[BatchSizeTrial]:
    """Try sizes from the smallest on, as long as memory and time allow; end with the largest that would fit."""
    done: list[BatchSizeTrial] = []
    with _child(config, sequences_per_step, memory) as connection:
        started, lasted = time.perf_counter(), 0.0  # not counting what Python and torch took to load
        for sequences in sizes:
            passed = time.perf_counter() - started
            if done and passed + lasted + _growth(config, sequences, done[-1]) > seconds:
                break
            if _predict(config, sequences, done) > memory:
                break
            before = time.perf_counter()
            trial = _ask(connection, sequences) or BatchSizeTrial(
                sequences, False, _predict(config, sequences, done), None
            )
            lasted = time.perf_counter() - before
            yield trial
            if not trial.fits:
                return
            done.append(trial)
    untried = [BatchSizeTrial(size, True, _predict(config, size, done), None) for size in sizes[len(done) :]]
    yield from [trial for trial in untried if trial.memory <= memory][-1:]


def _growth(config: MemoryConfig, sequences: int, last: BatchSizeTrial) -> float:
    """Return how many seconds more a size takes than a smaller one took, at the speed of that one."""
    assert last.tokens_per_second is not None
    return _PASSES * (sequences - last.sequences) * config.block_size / last.tokens_per_second


def _predict(config: MemoryConfig, sequences: int, done: Sequence[BatchSizeTrial]) -> int:
    """Return the memory of a size after what smaller ones took.

    It grows at least as the closed form says; what the C library does not give back comes on top.
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
    """Start the process that rehearses sizes; yield our end of the line when it is ready."""
    context = multiprocessing.get_context("spawn")  # a fork would share what torch has set up
    ours, theirs = context.Pipe()
    process = context.Process(target=_answer, args=(theirs, config, sequences_per_step, memory), daemon=True)
    process.start()
    theirs.close()
    try:
        with suppress(EOFError):  # it died; the first question will find out
            ours.recv()
        yield ours
    finally:
        process.kill()
        process.join()
        ours.close()


def _ask(connection: Connection, sequences: int) -> BatchSizeTrial | None:
    """Let the child rehearse a size; None: memory did not suffice, or the system killed it."""
    try:
        connection.send(sequences)
        answer: BatchSizeTrial | Exception | None = connection.recv()
    except (EOFError, OSError):
        return None
    if isinstance(answer, Exception):
        raise answer
    return answer


def _answer(connection: Connection, config: MemoryConfig, sequences_per_step: int | None, memory: int) -> None:
    """Rehearse each size that is asked for, in the child."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends this process
    _limit_memory(memory)
    connection.send("ready")
    while True:
        sequences: int = connection.recv()
        try:
            training = _accumulating(config.training, sequences_per_step, sequences)
            times = benchmark_step(config.model, training, sequences, config.block_size)
        except Exception as error:
            connection.send(None if is_out_of_memory(error) else error)
            return
        peak = peak_memory().get("process_peak_memory_mb")  # not known on Windows
        used = _predict(config, sequences, []) if peak is None else int(peak * 2**20)
        connection.send(BatchSizeTrial(sequences, used <= memory, used, _speed(times, config, sequences_per_step)))


def _limit_memory(memory: int) -> None:
    """Let this process take no more than ``memory`` bytes, where the system can hold it to that."""
    if sys.platform.startswith("linux"):
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(
            resource.RLIMIT_DATA, (memory if most == resource.RLIM_INFINITY else min(memory, most), most)
        )
