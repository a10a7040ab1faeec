"""What watches a run: tokens and their rate, memory, the progress bar."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
from torch import Tensor

from tiny_lm.training.callbacks.base import StepCallback, StepMetrics
from tiny_lm.training.config import TrainingConfig
from tiny_lm.training.optim import learning_rate_at


class TokensMonitor(StepCallback):
    """Notes loss, learning rate, gradient norm, tokens seen, tokens per second and model FLOPs utilisation (MFU).

    The loss of every micro-batch enters the mean that is noted, and is fetched from the device only then. The clock
    stands still in validation and while a checkpoint is written (:meth:`pause`).
    """

    def __init__(self, config: TrainingConfig, metrics: StepMetrics, ideal_seconds: float | None = None) -> None:
        """Note them every ``log_every_n_steps`` optimizer steps, at each validation and at the last step.

        Args:
            config: the training run.
            event: where they are noted.
            ideal_seconds: time that a token would take at the peak of one device; None: MFU is not noted.
        """
        self._config = config
        self._metrics = metrics
        self._ideal_seconds = ideal_seconds
        self.tokens = 0
        self.latest: StepMetrics = {}
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
        self._metrics.update(self.latest)
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
