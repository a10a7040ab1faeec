"""Loss, learning rate, tokens and their rate, and MFU."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
from torch import Tensor
from torch.optim import Optimizer

from tiny_lm.training.callbacks.base import StepCallback, StepMetrics
from tiny_lm.training.config import TrainingConfig
from tiny_lm.training.optim import PARAM_GROUPS


class TokensMonitor(StepCallback):
    """Logs loss, learning rates, gradient norm, tokens seen, tokens per second and model FLOPs utilization (MFU).

    The logged loss is the mean over all micro-batches since the last log, and is fetched from the device only then.
    The clock is stopped during validation and while a checkpoint is written (:meth:`pause`).
    """

    def __init__(self, config: TrainingConfig, metrics: StepMetrics, ideal_seconds: float) -> None:
        """Log every ``log_every_n_steps`` optimizer steps, at each validation and at the last step.

        Args:
            config: the training run.
            metrics: receives the metrics.
            ideal_seconds: time per token at the peak FLOPs of one device.
        """
        self._config = config
        self._metrics = metrics
        self._ideal_seconds = ideal_seconds
        self.tokens = 0
        self.latest: StepMetrics = {}
        self._loss_sum: Tensor | float = 0.0
        self._rates: list[float] = []
        self._steps = 0  # since the last log, like the next two
        self._new_tokens = 0
        self._seconds = 0.0  # since the last log, as saved in the resumed checkpoint
        self._started = 0.0
        self._reduce: Callable[[Any], Any] = float

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Start the clock."""
        self._reduce = trainer.strategy.reduce  # to the mean of all ranks; all must call it
        self._started = time.perf_counter() - self._seconds

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Add the loss and the tokens of a micro-batch."""
        self._loss_sum = self._loss_sum + outputs["loss"].detach()
        tokens = batch[0].numel() * trainer.world_size  # every rank has as many
        self._new_tokens += tokens
        self.tokens += tokens
        super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: Any, optimizer: Optimizer) -> None:
        """Remember the learning rates of this step: the scheduler sets the next ones before the step ends."""
        self._rates = [group["lr"] for group in optimizer.param_groups]

    def on_step_end(self, trainer: pl.Trainer, module: Any, step: int) -> None:
        """Log if due."""
        config = self._config
        self._steps += 1
        if step % config.log_every_n_steps and step % config.val_every_n_steps and step != trainer.max_steps:
            return
        # Lightning divides the loss by the number of micro-batches before it passes it to callbacks.
        loss = float(self._reduce(self._loss_sum)) / self._steps
        now = time.perf_counter()
        rate = self._new_tokens / (now - self._started)
        self.latest = {
            "train_loss": loss,
            "train_ppl": math.exp(min(loss, 700.0)),
            "lr": self._rates[0],
            **{
                f"lr_{name}": rate
                for name, rate in zip(PARAM_GROUPS, self._rates, strict=True)
                if rate != self._rates[0]
            },
            "grad_norm": float(module.gradient_norm),
            "tokens": self.tokens,
            "tokens_per_sec": rate,
            "mfu": rate / trainer.world_size * self._ideal_seconds,
        }
        self._metrics.update(self.latest)
        self._loss_sum, self._steps, self._new_tokens, self._started = 0.0, 0, 0, now

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Stop the clock of tokens per second while the block runs."""
        before = time.perf_counter()
        yield
        self._started += time.perf_counter() - before

    def state_dict(self) -> dict[str, Any]:
        """Return the counts since the last log, too: a checkpoint may fall between two logs."""
        return {
            "tokens": self.tokens,
            "latest": self.latest,
            "loss_sum": float(self._reduce(self._loss_sum)),
            "steps": self._steps,
            "window_tokens": self._new_tokens,
            "seconds": time.perf_counter() - self._started,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue counting from the checkpoint."""
        self.tokens = state_dict["tokens"]
        self.latest = state_dict.get("latest", {})
        self._loss_sum = state_dict["loss_sum"]
        # Older checkpoints count micro-batches.
        micro_batches = state_dict.get("batches", 0)
        self._steps = state_dict.get("steps", micro_batches // self._config.accumulate_grad_batches)
        self._new_tokens = state_dict["window_tokens"]
        self._seconds = state_dict["seconds"]
