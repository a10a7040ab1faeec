"""The progress bar."""

from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tiny_lm.training.callbacks.base import StepCallback


class OptimizerStepProgressBar(ProgressBar, StepCallback):
    """A progress bar that counts optimizer steps, with losses, tokens per second and time left, in 80 columns."""

    def __init__(self, sources: Sequence[StepCallback], console: Console) -> None:
        """Show the latest metrics of ``sources``."""
        super().__init__()
        self._sources = sources
        self._progress = Progress(
            BarColumn(bar_width=12),
            MofNCompleteColumn(),
            TextColumn("{task.fields[metrics]}"),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )

    def disable(self) -> None:
        """Show nothing; Lightning calls it on all ranks but 0."""
        self._progress.disable = True

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Show the bar at the current step."""
        self._progress.start()
        self._task = self._progress.add_task("", total=trainer.max_steps, completed=trainer.global_step, metrics="")

    def on_step_end(self, trainer: pl.Trainer, module: Any, step: int) -> None:
        """Advance the bar."""
        latest = {key: value for source in self._sources for key, value in source.latest.items()}
        metrics = [text.format(latest[key]) for key, text in _BAR.items() if key in latest]
        self._progress.update(self._task, completed=step, metrics="  ".join(metrics))

    def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
        """Remove the bar."""
        self._progress.stop()

    def on_exception(self, trainer: pl.Trainer, module: Any, exception: BaseException) -> None:
        """Remove the bar."""
        self._progress.stop()


_BAR = {"train_loss": "loss {:.3f}", "val_loss": "val {:.3f}", "tokens_per_sec": "{:,.0f} tok/s"}
