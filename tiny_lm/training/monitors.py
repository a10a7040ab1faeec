"""What watches a run: tokens and their rate, memory, the progress bar."""

import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from tiny_lm.errors import UserError
from tiny_lm.training.config import TrainingConfig
from tiny_lm.training.optim import learning_rate_at

Event: TypeAlias = dict[str, float]
"""Metrics of one optimizer step, by name."""


class StepCallback(Callback):
    """A callback that acts at the end of optimizer steps, however many micro-batches are in one."""

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Call :meth:`on_step_end` if this micro-batch completed an optimizer step."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.on_step_end(trainer, module, trainer.global_step)

    def on_step_end(self, trainer: pl.Trainer, module: Any, step: int) -> None:
        """Act after optimizer step ``step``, counted from 1."""


class TokensMonitor(StepCallback):
    """Notes loss, learning rate, gradient norm, tokens seen and tokens per second.

    The loss of every micro-batch enters the mean that is noted, and is fetched from the device only then. The clock
    stands still in validation and while a checkpoint is written (:meth:`pause`).
    """

    def __init__(self, config: TrainingConfig, event: Event) -> None:
        """Note them every ``log_every_n_steps`` optimizer steps, at each validation and at the last step."""
        self._config = config
        self._event = event
        self.tokens = 0
        self.latest: Event = {}
        self._loss_sum: Tensor | float = 0.0
        self._batches = 0
        self._window_tokens = 0
        self._seconds = 0.0  # of the window, up to the last stop
        self._started = 0.0

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Start the clock."""
        self._started = time.perf_counter() - self._seconds

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Add a micro-batch to the window."""
        self._loss_sum = self._loss_sum + outputs["loss"].detach()
        self._batches += 1
        self._window_tokens += batch[0].numel()
        self.tokens += batch[0].numel()
        super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)

    def on_step_end(self, trainer: pl.Trainer, module: Any, step: int) -> None:
        """Close the window that ends with this step.

        Raises:
            UserError: the loss is no longer a number.
        """
        config = self._config
        if step % config.log_every_n_steps and step % config.val_every_n_steps and step != trainer.max_steps:
            return
        # Lightning divides the loss by the number of micro-batches before it hands it to callbacks.
        loss = float(self._loss_sum) * trainer.accumulate_grad_batches / self._batches
        if not math.isfinite(loss):
            raise UserError(
                f"the loss is {loss} at step {step} or up to {config.log_every_n_steps} steps before: "
                "lower learning_rate or raise warmup_ratio, and go on from an earlier checkpoint with --resume"
            )
        now = time.perf_counter()
        self.latest = {
            "train_loss": loss,
            "train_ppl": math.exp(min(loss, 700.0)),
            # The schedule has moved on to the next step; this is the rate that this step used.
            "lr": learning_rate_at(step - 1, config),
            "grad_norm": float(module.gradient_norm),
            "tokens": self.tokens,
            "tokens_per_sec": self._window_tokens / (now - self._started),
        }
        self._event.update(self.latest)
        self._loss_sum, self._batches, self._window_tokens, self._started = 0.0, 0, 0, now

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
            "loss_sum": float(self._loss_sum),
            "batches": self._batches,
            "window_tokens": self._window_tokens,
            "seconds": time.perf_counter() - self._started,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the window where the checkpoint left it."""
        self.tokens = state_dict["tokens"]
        self._loss_sum = state_dict["loss_sum"]
        self._batches = state_dict["batches"]
        self._window_tokens = state_dict["window_tokens"]
        self._seconds = state_dict["seconds"]


class GpuStatsMonitor(StepCallback):
    """Notes the peak memory of the process and, where there is one, the memory of the GPU."""

    def __init__(self, every_n_steps: int, event: Event) -> None:
        """Note them every ``every_n_steps`` optimizer steps."""
        self._every_n_steps = every_n_steps
        self._event = event

    def on_step_end(self, trainer: pl.Trainer, module: Any, step: int) -> None:
        """Note the figures of this moment."""
        if step % self._every_n_steps:
            return
        self._event["process_peak_memory_mb"] = _peak_memory_mb()
        if torch.cuda.is_available():
            self._event["gpu_memory_mb"] = torch.cuda.memory_allocated() / 2**20
            self._event["gpu_peak_memory_mb"] = torch.cuda.max_memory_allocated() / 2**20


def _peak_memory_mb() -> float:
    """Largest resident set of this process so far, in MiB."""
    if sys.platform == "win32":
        return math.nan  # the standard library does not tell there
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # bytes on macOS, KiB elsewhere


class OptimizerStepProgressBar(ProgressBar):
    """A progress bar that counts optimizer steps, with loss, tokens per second and time left."""

    def __init__(self, monitor: TokensMonitor, console: Console) -> None:
        """Show the figures of ``monitor``."""
        super().__init__()
        self._monitor = monitor
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Show the bar, at the step where the run stands."""
        self._progress.start()
        self._task = self._progress.add_task("", total=trainer.max_steps, completed=trainer.global_step, figures="")

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Move the bar."""
        latest = self._monitor.latest
        figures = f"loss {latest['train_loss']:.3f}  {latest['tokens_per_sec']:,.0f} tokens/s" if latest else ""
        self._progress.update(self._task, completed=trainer.global_step, figures=figures)

    def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
        """Take the bar away."""
        self._progress.stop()

    def on_exception(self, trainer: pl.Trainer, module: Any, exception: BaseException) -> None:
        """Take the bar away."""
        self._progress.stop()
