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
from tiny_lm.training.planning.memory import Setup, estimate_memory
from tiny_lm.training.planning.step_benchmark import StepTimes, rehearse

_MOST_WINDOWS = 1024
"""Where no global batch is given that would bound a micro-batch."""

_PASSES = 5
"""A rehearsal of two steps trains on at most four micro-batches, and validates on one."""

_AS_FAST = 0.95
"""A smaller micro-batch with this share of the best speed is as good, and leaves memory free."""


@dataclass(frozen=True)
class Trial:
    """What became of one micro-batch size."""

    windows: int
    fits: bool
    memory: int
    """Bytes at the peak; on a CPU of the whole process. Estimated where it was not tried."""
    tokens_per_second: float | None
    """None: it was not tried, or did not fit."""


@dataclass(frozen=True)
class BatchSizes:
    """What the search came to."""

    trials: tuple[Trial, ...]

    @property
    def largest(self) -> Trial:
        """The largest micro-batch that fits; it may be one that was not tried."""
        return max((trial for trial in self.trials if trial.fits), key=lambda trial: trial.windows)

    @property
    def fastest(self) -> Trial:
        """The smallest micro-batch of those that are as fast as any."""
        speeds = {trial: trial.tokens_per_second for trial in self.trials if trial.tokens_per_second is not None}
        best = max(speeds.values())
        return min((t for t, speed in speeds.items() if speed >= _AS_FAST * best), key=lambda trial: trial.windows)


def sizes_to_try(windows_per_step: int | None, limit: int | None) -> list[int]:
    """Return the micro-batch sizes that make up a step without rest; powers of two where no step is given."""
    most = limit or windows_per_step or _MOST_WINDOWS
    if windows_per_step is None:
        return [2**power for power in range(most.bit_length())]
    return [size for size in range(1, min(most, windows_per_step) + 1) if windows_per_step % size == 0]


def find_batch_sizes(
    setup: Setup,
    windows_per_step: int | None,
    *,
    limit: int | None = None,
    memory: int,
    seconds: float,
    report: Callable[[Trial], None],
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
    sizes = sizes_to_try(windows_per_step, limit)
    trials: list[Trial] = []
    search = _try_in_child(setup, windows_per_step, sizes, memory, seconds)
    if setup.device != "cpu":
        search = _try_here(setup, windows_per_step, sizes, memory)
    for trial in search:
        trials.append(trial)
        report(trial)
    if not any(trial.fits for trial in trials):
        raise UserError(
            f"a micro-batch of one window of {setup.block_size} tokens does not fit into {memory / 1e9:.1f} GB: "
            "lower data.block_size, or set training.gradient_checkpointing=true"
        )
    return BatchSizes(tuple(trials))


def _speed(times: StepTimes, setup: Setup, windows_per_step: int | None) -> float:
    """Return tokens per second, the optimizer's step shared by the micro-batches of a step."""
    micro_batches = (windows_per_step or times.windows) / times.windows
    return times.windows * setup.block_size / (times.micro_batch + times.update / micro_batches)


# --- on a GPU --------------------------------------------------------------------------------------------------------


def search(sizes: Sequence[int], attempt: Callable[[int], Trial]) -> Iterator[Trial]:
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


def _try_here(setup: Setup, windows_per_step: int | None, sizes: Sequence[int], memory: int) -> Iterator[Trial]:
    with _gpu_limit(setup.device, memory):
        yield from search(sizes, lambda windows: _try_on_gpu(setup, windows_per_step, windows))


def _try_on_gpu(setup: Setup, windows_per_step: int | None, windows: int) -> Trial:
    if setup.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = None
    try:
        times = rehearse(
            setup.model, _accumulating(setup.training, windows_per_step, windows), windows, setup.block_size
        )
    except RuntimeError as error:  # of which torch.OutOfMemoryError is one
        if not is_out_of_memory(error):
            raise
    gc.collect()
    used = estimate_memory(replace(setup, windows=windows)).total
    if setup.device == "cuda":
        used = torch.cuda.max_memory_reserved() if times else used
        torch.cuda.empty_cache()
    return Trial(windows, times is not None, used, _speed(times, setup, windows_per_step) if times else None)


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


def _accumulating(training: TrainingConfig, windows_per_step: int | None, windows: int) -> TrainingConfig:
    """Return the training config with the accumulation that ``windows`` in a micro-batch need."""
    return replace(training, accumulate_grad_batches=(windows_per_step or windows) // windows)


# --- on a CPU --------------------------------------------------------------------------------------------------------


def _try_in_child(
    setup: Setup, windows_per_step: int | None, sizes: Sequence[int], memory: int, seconds: float
) -> Iterator[Trial]:
    """Try sizes from the smallest on, as long as memory and time allow; end with the largest that would fit."""
    done: list[Trial] = []
    with _child(setup, windows_per_step, memory) as connection:
        started, lasted = time.perf_counter(), 0.0  # not counting what Python and torch took to load
        for windows in sizes:
            passed = time.perf_counter() - started
            if done and passed + lasted + _growth(setup, windows, done[-1]) > seconds:
                break
            if _predict(setup, windows, done) > memory:
                break
            before = time.perf_counter()
            trial = _ask(connection, windows) or Trial(windows, False, _predict(setup, windows, done), None)
            lasted = time.perf_counter() - before
            yield trial
            if not trial.fits:
                return
            done.append(trial)
    untried = [Trial(size, True, _predict(setup, size, done), None) for size in sizes[len(done) :]]
    yield from [trial for trial in untried if trial.memory <= memory][-1:]


def _growth(setup: Setup, windows: int, last: Trial) -> float:
    """Return how many seconds more a size takes than a smaller one took, at the speed of that one."""
    assert last.tokens_per_second is not None
    return _PASSES * (windows - last.windows) * setup.block_size / last.tokens_per_second


def _predict(setup: Setup, windows: int, done: Sequence[Trial]) -> int:
    """Return the memory of a size after what smaller ones took.

    It grows at least as the closed form says; what the C library does not give back comes on top.
    """
    estimate = estimate_memory(replace(setup, windows=windows)).total
    if not done:
        return estimate
    first, last = done[0], done[-1]
    of_last = estimate_memory(replace(setup, windows=last.windows)).total
    measured = (last.memory - first.memory) / max(last.windows - first.windows, 1)
    growth = max(measured, (estimate - of_last) / (windows - last.windows))
    return last.memory + int(growth * (windows - last.windows))


@contextmanager
def _child(setup: Setup, windows_per_step: int | None, memory: int) -> Iterator[Connection]:
    """Start the process that rehearses sizes; yield our end of the line when it is ready."""
    context = multiprocessing.get_context("spawn")  # a fork would share what torch has set up
    ours, theirs = context.Pipe()
    process = context.Process(target=_answer, args=(theirs, setup, windows_per_step, memory), daemon=True)
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


def _ask(connection: Connection, windows: int) -> Trial | None:
    """Let the child rehearse a size; None: memory did not suffice, or the system killed it."""
    try:
        connection.send(windows)
        answer: Trial | Exception | None = connection.recv()
    except (EOFError, OSError):
        return None
    if isinstance(answer, Exception):
        raise answer
    return answer


def _answer(connection: Connection, setup: Setup, windows_per_step: int | None, memory: int) -> None:
    """Rehearse each size that is asked for, in the child."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends this process
    _limit_memory(memory)
    connection.send("ready")
    while True:
        windows: int = connection.recv()
        try:
            training = _accumulating(setup.training, windows_per_step, windows)
            times = rehearse(setup.model, training, windows, setup.block_size)
        except Exception as error:
            connection.send(None if is_out_of_memory(error) else error)
            return
        peak = peak_memory().get("process_peak_memory_mb")  # not known on Windows
        used = _predict(setup, windows, []) if peak is None else int(peak * 2**20)
        connection.send(Trial(windows, used <= memory, used, _speed(times, setup, windows_per_step)))


def _limit_memory(memory: int) -> None:
    """Let this process take no more than ``memory`` bytes, where the system can hold it to that."""
    if sys.platform.startswith("linux"):
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(
            resource.RLIMIT_DATA, (memory if most == resource.RLIM_INFINITY else min(memory, most), most)
        )
