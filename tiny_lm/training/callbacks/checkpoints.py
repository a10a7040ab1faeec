"""Checkpoints: when they are written, how, and how a run is asked to stop with one."""

import signal
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from rich.console import Console

from tiny_lm.errors import UserError
from tiny_lm.runs import Run
from tiny_lm.signals import TERMINATING_SIGNALS, is_handled_elsewhere
from tiny_lm.training.callbacks.base import StepCallback
from tiny_lm.training.callbacks.loss_spikes import LossSpikeDetector
from tiny_lm.training.callbacks.tokens import TokensMonitor
from tiny_lm.training.callbacks.validation import Validation
from tiny_lm.training.checkpoint_io import link


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
        guard: LossSpikeDetector,
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


class GracefulStop(Callback):
    """Turns Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 into "finish this step, write a checkpoint, stop".

    A second Ctrl-C stops at once. A closed terminal often sends SIGHUP twice (the shell does, and the kernel), so a
    second one of the others changes nothing. Signals that whoever started this process ignores (nohup, or ``&`` in a
    script, which ignores Ctrl-C) stay ignored, and a handler that somebody else set for SIGUSR1 stays.
    """

    def __init__(self, writer: CheckpointWriter, console: Console) -> None:
        """Ask ``writer`` to stop the run."""
        self._writer = writer
        self._console = console
        self._previous: dict[int, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Take over the signals."""
        for number in (signal.SIGINT, *TERMINATING_SIGNALS):
            foreign = number == getattr(signal, "SIGUSR1", None) and is_handled_elsewhere(number)
            if signal.getsignal(number) != signal.SIG_IGN and not foreign:
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
