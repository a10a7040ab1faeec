"""When checkpoints are written, and how signals stop a run with one."""

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

    The checkpoints of one step are one file under several names (hard links where the disk supports them).
    """

    def __init__(
        self,
        run: Run,
        every_n_steps: int,
        keep: int,
        validation: Validation,
        monitor: TokensMonitor,
        spikes: LossSpikeDetector,
    ) -> None:
        """Write every ``every_n_steps`` optimizer steps and after the last one; keep the newest ``keep`` of them."""
        self._run = run
        self._every_n_steps = every_n_steps
        self._keep = keep
        self._validation = validation
        self._monitor = monitor
        self._spikes = spikes
        self.stop_requested = False

    def on_fit_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Delete old checkpoints that a killed process left, even if no step is left to train."""
        if trainer.is_global_zero:
            self._prune()

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Reset the best loss if its checkpoint no longer exists."""
        if not trainer.strategy.broadcast(self._run.best_checkpoint.is_file()):
            self._validation.forget_best()

    def on_step_end(self, trainer: pl.Trainer, module: Any, step: int) -> None:
        """Write the checkpoints that are due; all ranks take part, rank 0 writes.

        Raises:
            UserError: loss or weights are not finite, or the disk is full.
        """
        stop = trainer.strategy.reduce_boolean_decision(self.stop_requested, all=False)  # on any rank
        due = step % self._every_n_steps == 0 or step == trainer.max_steps or stop
        best = self._validation.best_step == step
        if due or best:
            with self._monitor.pause():
                self._spikes.check_losses(trainer, step)
                self._spikes.check_weights(trainer, module, step)
                self._write(trainer, step, due=due, best=best)
        if stop:
            trainer.should_stop = True

    def _write(self, trainer: pl.Trainer, step: int, *, due: bool, best: bool) -> None:
        path = self._run.step_checkpoint(step) if due else self._run.best_checkpoint
        try:
            trainer.save_checkpoint(path)
        except UserError as error:
            raise UserError(f"{error}; {self._spikes.last_checkpoint()}") from error
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

    A second Ctrl-C stops immediately. A closed terminal often sends SIGHUP twice (from the shell and the kernel), so a
    second SIGHUP or SIGTERM has no effect. Signals that the parent process ignores (nohup, or ``&`` in a script, which
    ignores Ctrl-C) stay ignored, and an existing handler of SIGUSR1 is kept.
    """

    def __init__(self, writer: CheckpointWriter, console: Console) -> None:
        """Stop the run through ``writer``."""
        self._writer = writer
        self._console = console
        self._previous: dict[int, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Install the signal handlers."""
        for number in (signal.SIGINT, *TERMINATING_SIGNALS):
            foreign = number == getattr(signal, "SIGUSR1", None) and is_handled_elsewhere(number)
            if signal.getsignal(number) != signal.SIG_IGN and not foreign:
                self._previous[number] = signal.signal(number, self._request)

    def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
        """Restore the signal handlers."""
        self._restore()

    def on_exception(self, trainer: pl.Trainer, module: Any, exception: BaseException) -> None:
        """Restore the signal handlers."""
        self._restore()

    def _request(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT:
            signal.signal(number, self._previous.pop(number))
        if not self._writer.stop_requested:
            self._writer.stop_requested = True
            self._console.print("stopping after this step; press Ctrl-C again to stop immediately")

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
