"""Writing the metrics of a step to every logger."""

from typing import Any

import pytorch_lightning as pl
from rich.console import Console

from tiny_lm.training.callbacks.base import StepCallback, StepMetrics


class MetricsWriter(StepCallback):
    """Passes the metrics that the other callbacks collected in a step to every logger, as one event.

    Lightning's own ``log`` would collect the metrics at every batch.
    """

    def __init__(self, metrics: StepMetrics, console: Console) -> None:
        """Write ``metrics``, which earlier callbacks fill; print a line for each validation."""
        self._metrics = metrics
        self._console = console

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Pass the resolved configs to every logger, which starts it."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]  # Lightning sets it
        configs = {"model": module.model.config, "training": module.config, "data": data.config}
        for logger in trainer.loggers:
            logger.log_hyperparams({section: config.to_dict() for section, config in configs.items()})

    def on_step_end(self, trainer: pl.Trainer, module: Any, step: int) -> None:
        """Write the metrics of this step, if any."""
        if not self._metrics:
            return
        for logger in trainer.loggers:
            logger.log_metrics(dict(self._metrics), step)
        if "val_loss" in self._metrics:
            parts = [f"{name} {self._metrics[key]:.3f}" for key, name in _SHOWN.items()]
            self._console.print(f"step {step:>6,}  " + "  ".join(parts), highlight=False, soft_wrap=True)
        self._metrics.clear()


_SHOWN = {"train_loss": "train loss", "val_loss": "val loss", "val_ppl": "perplexity", "val_bpb": "bits per byte"}
