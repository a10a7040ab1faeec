"""What watches a run: tokens and their rate, memory, the progress bar."""

import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeAlias

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from tiny_lm.training.config import TrainingConfig
from tiny_lm.training.optim import learning_rate_at

Event: TypeAlias = dict[str, float]
"""Metrics of one optimizer step, by name."""


class StepCallback(Callback):
    """A callback that acts at the end of optimizer steps, however many micro-batches are in one.

    Attributes:
        latest: the figures that it noted last, if it notes any.
    """

    latest: Event

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Call :meth:`on_step_end` if this micro-batch completed an optimizer step."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.on_step_end(trainer, module, trainer.global_step)

    def on_step_end(self, trainer: pl.Trainer, module: Any, step: int) -> None:
        """Act after optimizer step ``step``, counted from 1."""


class TokensMonitor(StepCallback):
    """Notes loss, learning rate, gradient norm, tokens seen, tokens per second and model FLOPs utilisation (MFU).

    The loss of every micro-batch enters the mean that is noted, and is fetched from the device only then. The clock
    stands still in validation and while a checkpoint is written (:meth:`pause`).
    """

    def __init__(self, config: TrainingConfig, event: Event, ideal_seconds: float | None = None) -> None:
        """Note them every ``log_every_n_steps`` optimizer steps, at each validation and at the last step.

        Args:
            config: the training run.
            event: where they are noted.
            ideal_seconds: time that a token would take at the peak of one device; None: MFU is not noted.
        """
        self._config = config
        self._event = event
        self._ideal_seconds = ideal_seconds
        self.tokens = 0
        self.latest: Event = {}
        self._loss_sum: Tensor | float = 0.0
        self._steps = 0
        self._window_tokens = 0
        self._seconds = 0.0  # of the window, up to the last stop
        self._started = 0.0
        self._reduce: Callable[[Any], Any] = float

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Start the clock."""
        self._reduce = trainer.strategy.reduce  # to the mean of all processes; all must call it
        self._started = time.perf_counter() - self._seconds

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Add a micro-batch to the window."""
        self._loss_sum = self._loss_sum + outputs["loss"].detach()
        tokens = batch[0].numel() * trainer.world_size  # the other processes have as many
        self._window_tokens += tokens
        self.tokens += tokens
        super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)

    def on_step_end(self, trainer: pl.Trainer, module: Any, step: int) -> None:
        """Close the window that ends with this step."""
        config = self._config
        self._steps += 1
        if step % config.log_every_n_steps and step % config.val_every_n_steps and step != trainer.max_steps:
            return
        # Lightning divides the loss by the number of micro-batches before it hands it to callbacks.
        loss = float(self._reduce(self._loss_sum)) / self._steps
        now = time.perf_counter()
        rate = self._window_tokens / (now - self._started)
        self.latest = {
            "train_loss": loss,
            "train_ppl": math.exp(min(loss, 700.0)),
            # The schedule has moved on to the next step; this is the rate that this step used.
            "lr": learning_rate_at(step - 1, config),
            "grad_norm": float(module.gradient_norm),
            "tokens": self.tokens,
            "tokens_per_sec": rate,
        }
        if self._ideal_seconds is not None:
            self.latest["mfu"] = rate / trainer.world_size * self._ideal_seconds
        self._event.update(self.latest)
        self._loss_sum, self._steps, self._window_tokens, self._started = 0.0, 0, 0, now

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Stop the clock of tokens per second while the block runs."""
        before = time.perf_counter()
        yield
        self._started += time.perf_counter() - before

    def state_dict(self) -> dict[str, Any]:
        """Return the open window too: a checkpoint may fall inside it."""
        return {
            "tokens": self.tokens,
            "latest": self.latest,
            "loss_sum": float(self._reduce(self._loss_sum)),
            "steps": self._steps,
            "window_tokens": self._window_tokens,
            "seconds": time.perf_counter() - self._started,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the window where the checkpoint left it."""
        self.tokens = state_dict["tokens"]
        self.latest = state_dict.get("latest", {})
        self._loss_sum = state_dict["loss_sum"]
        # Older checkpoints count micro-batches.
        micro_batches = state_dict.get("batches", 0)
        self._steps = state_dict.get("steps", micro_batches // self._config.accumulate_grad_batches)
        self._window_tokens = state_dict["window_tokens"]
        self._seconds = state_dict["seconds"]


class GpuStatsMonitor(StepCallback):
    """Notes memory and load of the process and, where there is one, of the GPU; what cannot be read is left out."""

    def __init__(self, every_n_steps: int, event: Event) -> None:
        """Note them every ``every_n_steps`` optimizer steps."""
        self._every_n_steps = every_n_steps
        self._event = event
        self._clocks = (0.0, 0.0)

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Begin to count the time of the processor."""
        self._clocks = _clocks()

    def on_step_end(self, trainer: pl.Trainer, module: Any, step: int) -> None:
        """Note the figures of this moment, and the load since the last one."""
        if step % self._every_n_steps:
            return
        before, self._clocks = self._clocks, _clocks()
        busy, passed = (now - then for now, then in zip(self._clocks, before, strict=True))
        self._event["process_cpu_percent"] = 100 * busy / max(passed, 1e-9)  # of one core, as `top` counts
        self._event.update(peak_memory())
        with suppress(OSError, ValueError):  # /proc is Linux's
            pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
            self._event["process_memory_mb"] = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
        if torch.cuda.is_available():
            self._event["gpu_memory_mb"] = torch.cuda.memory_allocated() / 2**20
            with suppress(Exception):  # needs nvidia-ml-py (the extra gpu), and a driver that tells
                self._event["gpu_utilization_percent"] = torch.cuda.utilization()
                self._event["gpu_temperature_c"] = torch.cuda.temperature()


def _clocks() -> tuple[float, float]:
    """Seconds that the cores have worked for this process, and seconds that have passed."""
    return time.process_time(), time.perf_counter()


def peak_memory() -> Event:
    """Return the most memory that this process, and its tensors on a GPU, have taken so far, in MiB."""
    peaks: Event = {}
    if sys.platform != "win32":  # the standard library does not tell there
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes on macOS, KiB elsewhere
        peaks["process_peak_memory_mb"] = peak / unit
    if torch.cuda.is_available():
        peaks["gpu_peak_memory_mb"] = torch.cuda.max_memory_allocated() / 2**20
    return peaks


class OptimizerStepProgressBar(ProgressBar, StepCallback):
    """A progress bar that counts optimizer steps, with losses, tokens per second and the time left, in 80 columns."""

    def __init__(self, sources: Sequence[StepCallback], console: Console) -> None:
        """Show the latest figures of ``sources``."""
        super().__init__()
        self._sources = sources
        self._progress = Progress(
            BarColumn(bar_width=12),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )

    def disable(self) -> None:
        """Show nothing: Lightning asks it of all processes but the first."""
        self._progress.disable = True

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Show the bar, at the step where the run stands."""
        self._progress.start()
        self._task = self._progress.add_task("", total=trainer.max_steps, completed=trainer.global_step, figures="")

    def on_step_end(self, trainer: pl.Trainer, module: Any, step: int) -> None:
        """Move the bar."""
        latest = {key: value for source in self._sources for key, value in source.latest.items()}
        figures = [text.format(latest[key]) for key, text in _BAR.items() if key in latest]
        self._progress.update(self._task, completed=step, figures="  ".join(figures))

    def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
        """Take the bar away."""
        self._progress.stop()

    def on_exception(self, trainer: pl.Trainer, module: Any, exception: BaseException) -> None:
        """Take the bar away."""
        self._progress.stop()


_BAR = {"train_loss": "loss {:.3f}", "val_loss": "val {:.3f}", "tokens_per_sec": "{:,.0f} tok/s"}
