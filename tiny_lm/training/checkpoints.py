"""Checkpoints: when they are written, how, and how a run is asked to stop with one."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.plugins.io import TorchCheckpointIO
from rich.console import Console

from tiny_lm.files import atomic_path
from tiny_lm.model.checkpoint import read_checkpoint
from tiny_lm.runs import Run
from tiny_lm.training.callbacks import Validation
from tiny_lm.training.monitors import StepCallback, TokensMonitor


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints whole or not at all and reads them without executing anything."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write ``checkpoint`` to ``path`` through a temporary file."""
        with atomic_path(Path(path)) as temporary, temporary.open("wb") as file:
            torch.save(checkpoint, file)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint into memory."""
        return read_checkpoint(Path(path), mmap=False)  # it is about to be replaced by the next one


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
    with atomic_path(target) as temporary:
        try:
            os.link(source, temporary)
        except OSError:  # a file system without hard links
            shutil.copyfile(source, temporary)


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
