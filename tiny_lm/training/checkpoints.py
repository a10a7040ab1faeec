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

from tiny_lm.errors import UserError
from tiny_lm.files import atomic_path
from tiny_lm.model.checkpoint import check_whole, read_checkpoint
from tiny_lm.runs import Run
from tiny_lm.signals import TERMINATING_SIGNALS
from tiny_lm.training.callbacks import Validation
from tiny_lm.training.guard import LossGuard
from tiny_lm.training.monitors import StepCallback, TokensMonitor


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints whole or not at all and reads them without executing anything."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write ``checkpoint`` through a temporary file, which gets its name when it has been read back whole.

        Raises:
            UserError: it could not be written, or what stands there is not what was written.
        """
        with atomic_path(Path(path)) as temporary:
            _save(checkpoint, temporary)
            try:
                check_whole(temporary)
            except UserError as error:
                raise UserError(
                    f"{path}: was not read back as it was written: is the disk failing? ({error})"
                ) from None

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint into memory."""
        return read_checkpoint(Path(path), mmap=False)  # it is about to be replaced by the next one


def _save(checkpoint: dict[str, Any], path: Path) -> None:
    """Write ``checkpoint``; where the disk refuses, its own error is raised.

    torch closes its archive then too, fails at that, and raises what it found wrong there.
    """
    try:
        with path.open("wb") as file:
            torch.save(checkpoint, file)
    except RuntimeError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        raise cause or error from None


class CheckpointWriter(StepCallback):
    """Writes ``step-*.ckpt`` every N steps, ``last.ckpt`` for the newest and ``best.ckpt`` for the lowest loss.

    The files of one step are one file under several names (hard links where the disk has them).
    """

    def __init__(
        self,
        run: Run,
        every_n_steps: int,
        keep: int,
        validation: Validation,
        monitor: TokensMonitor,
        guard: LossGuard,
    ) -> None:
        """Write every ``every_n_steps`` optimizer steps and after the last one; keep the newest ``keep`` of them."""
        self._run = run
        self._every_n_steps = every_n_steps
        self._keep = keep
        self._validation = validation
        self._monitor = monitor
        self._guard = guard
        self.stop_requested = False

    def on_fit_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Do what a killed process may have been about to do, also where no step is left."""
        if trainer.is_global_zero:
            self._prune()

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Forget a best model that is nowhere any more, so that the next validation finds one."""
        if not trainer.strategy.broadcast(self._run.best_checkpoint.is_file()):
            self._validation.forget_best()

    def on_step_end(self, trainer: pl.Trainer, module: Any, step: int) -> None:
        """Write the files that are due; all processes take part, the first one writes.

        Raises:
            UserError: the model is not worth saving, or the disk is full.
        """
        stop = trainer.strategy.reduce_boolean_decision(self.stop_requested, all=False)  # asked of any process
        due = step % self._every_n_steps == 0 or step == trainer.max_steps or stop
        best = self._validation.best_step == step
        if due or best:
            with self._monitor.pause():
                self._guard.check_losses(trainer, step)
                self._guard.check_weights(trainer, module, step)
                self._write(trainer, step, due=due, best=best)
        if stop:
            trainer.should_stop = True

    def _write(self, trainer: pl.Trainer, step: int, *, due: bool, best: bool) -> None:
        path = self._run.step_checkpoint(step) if due else self._run.best_checkpoint
        try:
            trainer.save_checkpoint(path)
        except UserError as error:
            raise UserError(f"{error}; {self._guard.last_checkpoint()}") from error
        if due and trainer.is_global_zero:
            link(path, self._run.last_checkpoint)
            if best:
                link(path, self._run.best_checkpoint)
            self._prune()

    def _prune(self) -> None:
        for _, old in self._run.saved_steps()[: -self._keep]:
            old.unlink()


def link(source: Path, target: Path) -> None:
    """Give ``source`` the second name ``target``, atomically."""
    if target.is_file() and target.samefile(source):
        return
    with atomic_path(target) as temporary:
        # A killed process of this number may have left one: to copy into it would be to overwrite another checkpoint.
        temporary.unlink(missing_ok=True)
        try:
            os.link(source, temporary)
        except OSError:  # a file system without hard links
            shutil.copyfile(source, temporary)


class GracefulStop(Callback):
    """Turns Ctrl-C, SIGTERM and SIGHUP into "finish this step, write a checkpoint, stop".

    A second Ctrl-C stops at once. A closed terminal often sends SIGHUP twice (the shell does, and the kernel), so a
    second one of the others changes nothing. Signals that whoever started this process ignores (nohup, or ``&`` in a
    script, which ignores Ctrl-C) stay ignored.
    """

    def __init__(self, writer: CheckpointWriter, console: Console) -> None:
        """Ask ``writer`` to stop the run."""
        self._writer = writer
        self._console = console
        self._previous: dict[int, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Take over the signals."""
        for number in (signal.SIGINT, *TERMINATING_SIGNALS):
            if signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._request)

    def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
        """Give the signals back."""
        self._restore()

    def on_exception(self, trainer: pl.Trainer, module: Any, exception: BaseException) -> None:
        """Give the signals back."""
        self._restore()

    def _request(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT:
            signal.signal(number, self._previous.pop(number))
        if not self._writer.stop_requested:
            self._writer.stop_requested = True
            self._console.print("stopping after this step; press Ctrl-C again to stop at once")

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
