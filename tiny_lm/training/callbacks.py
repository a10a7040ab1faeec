"""What happens beside the training step: logging, validation, checkpoints, stopping, the progress bar.

The callbacks act at the end of optimizer steps and in the order in which ``fit.py`` lists them: metrics are logged
before a validation, and the checkpoint is written last, when everything that belongs to the step has happened.
"""

import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from tiny_lm.data.bin import TokenStream
from tiny_lm.inference.scoring import Surprise, measure_surprise
from tiny_lm.runs import Run
from tiny_lm.training.optim import learning_rate_at


class StepCallback(Callback):
    """A callback that acts at the end of optimizer steps, however many micro-batches are in one."""

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Call :meth:`on_step_end` if this micro-batch completed an optimizer step."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.on_step_end(trainer, module, trainer.global_step)

    def on_step_end(self, trainer: pl.Trainer, module: Any, step: int) -> None:
        """Act after optimizer step ``step``, counted from 1."""


def log_metrics(trainer: pl.Trainer, metrics: dict[str, float], step: int) -> None:
    """Hand metrics to every tracker; Lightning's own `log` would gather them again at every batch."""
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step)


class TokensMonitor(StepCallback):
    """Logs loss, learning rate, gradient norm, tokens seen and tokens per second.

    The loss of every micro-batch enters the mean that is logged, and is fetched from the device only then. The clock
    stands still in validation and while a checkpoint is written (:meth:`pause`).
    """

    def __init__(self, every_n_steps: int) -> None:
        """Log every ``every_n_steps`` optimizer steps, and the last one."""
        self._every_n_steps = every_n_steps
        self.tokens = 0
        self.latest: dict[str, float] = {}
        self._loss_sum: Tensor | None = None
        self._batches = 0
        self._window_tokens = 0
        self._started = 0.0

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Add a micro-batch to the window."""
        loss = outputs["loss"].detach()
        self._loss_sum = loss.clone() if self._loss_sum is None else self._loss_sum.add_(loss)
        self._batches += 1
        self._window_tokens += batch[0].numel()
        super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)

    def on_step_end(self, trainer: pl.Trainer, module: Any, step: int) -> None:
        """Log the window that ends with this step."""
        if step % self._every_n_steps and step != trainer.max_steps:
            return
        assert self._loss_sum is not None
        # Lightning divides the loss by the number of micro-batches before it hands it to callbacks.
        loss = float(self._loss_sum) * trainer.accumulate_grad_batches / self._batches
        elapsed = time.perf_counter() - self._started
        self.tokens += self._window_tokens
        self.latest = {
            "train_loss": loss,
            "train_ppl": math.exp(min(loss, 700.0)),
            # The schedule has moved on to the next step; this is the rate that this step used.
            "lr": learning_rate_at(step - 1, module.config),
            "grad_norm": float(module.gradient_norm),
            "tokens": self.tokens,
            "tokens_per_sec": self._window_tokens / elapsed,
        }
        log_metrics(trainer, self.latest, step)
        self._loss_sum, self._batches, self._window_tokens = None, 0, 0
        self._started = time.perf_counter()

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
            "loss_sum": None if self._loss_sum is None else float(self._loss_sum),
            "batches": self._batches,
            "window_tokens": self._window_tokens,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the window where the checkpoint left it."""
        self.tokens = state_dict["tokens"]
        self._loss_sum = None if state_dict["loss_sum"] is None else torch.tensor(state_dict["loss_sum"])
        self._batches = state_dict["batches"]
        self._window_tokens = state_dict["window_tokens"]


class GpuStatsMonitor(StepCallback):
    """Logs the memory of the process and, where there is one, memory and load of the GPU."""

    def __init__(self, every_n_steps: int) -> None:
        """Log every ``every_n_steps`` optimizer steps."""
        self._every_n_steps = every_n_steps

    def on_step_end(self, trainer: pl.Trainer, module: Any, step: int) -> None:
        """Log the figures of this moment."""
        if step % self._every_n_steps:
            return
        metrics = {"process_peak_memory_mb": _peak_memory_mb()}
        if torch.cuda.is_available():
            metrics["gpu_memory_mb"] = torch.cuda.memory_allocated() / 2**20
            metrics["gpu_peak_memory_mb"] = torch.cuda.max_memory_allocated() / 2**20
        log_metrics(trainer, metrics, step)


def _peak_memory_mb() -> float:
    """Largest resident set of this process so far, in MiB."""
    if sys.platform == "win32":
        return math.nan  # the standard library does not tell there
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # bytes on macOS, KiB elsewhere


class Validation(StepCallback):
    """Measures the loss over the whole validation stream and remembers the best one."""

    def __init__(self, every_n_steps: int, stream: TokenStream, monitor: TokensMonitor, console: Console) -> None:
        """Validate every ``every_n_steps`` optimizer steps, and after the last one."""
        self._every_n_steps = every_n_steps
        self._stream = stream
        self._monitor = monitor
        self._console = console
        self.latest: dict[str, float] = {}
        self.best_loss = math.inf
        self.best_step = 0

    def on_step_end(self, trainer: pl.Trainer, module: Any, step: int) -> None:
        """Validate if it is time."""
        if step % self._every_n_steps and step != trainer.max_steps:
            return
        with self._monitor.pause():
            surprise = self._measure(trainer, module)
        self.latest = {
            "val_loss": surprise.loss,
            "val_ppl": surprise.perplexity,
            "val_bpb": surprise.bits_per_byte(self._stream.bytes_per_token),
        }
        if surprise.loss < self.best_loss:
            self.best_loss, self.best_step = surprise.loss, step
        log_metrics(trainer, self.latest, step)
        train_loss = self._monitor.latest.get("train_loss", math.nan)
        self._console.print(
            f"step {step:>6,}  train loss {train_loss:.3f}  val loss {surprise.loss:.3f}  "
            f"perplexity {surprise.perplexity:.2f}  bits per byte {self.latest['val_bpb']:.3f}",
            highlight=False,
            soft_wrap=True,
        )

    def _measure(self, trainer: pl.Trainer, module: Any) -> Surprise:
        module.eval()
        with trainer.precision_plugin.forward_context():
            surprise = measure_surprise(
                module,
                trainer.datamodule.val_dataloader(),  # type: ignore[attr-defined]
                device=module.device,
                ignore_index=module.config.ignore_index,
            )
        module.train()
        return surprise

    def state_dict(self) -> dict[str, Any]:
        """Return the best result so far."""
        return {"best_loss": self.best_loss, "best_step": self.best_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the best result so far."""
        self.best_loss, self.best_step = state_dict["best_loss"], state_dict["best_step"]


class CheckpointWriter(StepCallback):
    """Writes ``step-*.ckpt`` every N steps, ``last.ckpt`` for the newest and ``best.ckpt`` for the lowest loss.

    The files of one step are one file under several names (hard links where the disk has them).
    """

    def __init__(self, run: Run, every_n_steps: int, keep: int, validation: Validation, monitor: TokensMonitor) -> None:
        """Write every ``every_n_steps`` optimizer steps and after the last one; keep the newest ``keep`` of them."""
        self._run = run
        self._every_n_steps = every_n_steps
        self._keep = keep
        self._validation = validation
        self._monitor = monitor
        self.stop_requested = False

    def on_step_end(self, trainer: pl.Trainer, module: Any, step: int) -> None:
        """Write the files that are due."""
        due = step % self._every_n_steps == 0 or step == trainer.max_steps or self.stop_requested
        best = self._validation.best_step == step
        with self._monitor.pause():
            if due:
                path = self._run.checkpoints / f"step-{step:08d}.ckpt"
                trainer.save_checkpoint(path)
                _link(path, self._run.last_checkpoint)
                if best:
                    _link(path, self._run.best_checkpoint)
                self._prune()
            elif best:
                trainer.save_checkpoint(self._run.best_checkpoint)
        if self.stop_requested:
            trainer.should_stop = True

    def _prune(self) -> None:
        for old in sorted(self._run.checkpoints.glob("step-*.ckpt"))[: -self._keep]:
            old.unlink()


def _link(source: Path, target: Path) -> None:
    """Give ``source`` the second name ``target``, atomically."""
    temporary = target.with_suffix(".tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, temporary)
    temporary.replace(target)


class GracefulStop(Callback):
    """Turns Ctrl-C and SIGTERM into "finish this step, write a checkpoint, stop"; a second Ctrl-C stops at once."""

    def __init__(self, writer: CheckpointWriter, console: Console) -> None:
        """Ask ``writer`` to stop the run."""
        self._writer = writer
        self._console = console
        self._previous: dict[int, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Take over the signals."""
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._request)

    def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
        """Give the signals back."""
        self._restore()

    def on_exception(self, trainer: pl.Trainer, module: Any, exception: BaseException) -> None:
        """Give the signals back."""
        self._restore()

    def _request(self, number: int, frame: Any) -> None:
        self._console.print("stopping after this step; press Ctrl-C again to stop at once")
        self._writer.stop_requested = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}


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
