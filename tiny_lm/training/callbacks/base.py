"""Callbacks that run at the end of optimizer steps, and the metrics they share."""

from typing import Any, TypeAlias

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

StepMetrics: TypeAlias = dict[str, float]
"""Metrics of one optimizer step, by name."""


class StepCallback(Callback):
    """A callback that runs at the end of optimizer steps, whatever the accumulation.

    Attributes:
        latest: the metrics that it collected last, if any.
    """

    latest: StepMetrics

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Call :meth:`on_step_end` if this micro-batch completed an optimizer step."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.on_step_end(trainer, module, trainer.global_step)

    def on_step_end(self, trainer: pl.Trainer, module: Any, step: int) -> None:
        """Run after optimizer step ``step``, counted from 1."""
