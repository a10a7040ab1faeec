"""Validation at the end of optimizer steps."""

import math
import time
from contextlib import nullcontext
from typing import Any

import pytorch_lightning as pl

from tiny_lm.data.bin.stream import TokenStream
from tiny_lm.inference.scoring import LossStats, evaluate_loss
from tiny_lm.training.callbacks.base import StepCallback, StepMetrics
from tiny_lm.training.callbacks.ema import WeightAverage
from tiny_lm.training.callbacks.samples import SampleWriter
from tiny_lm.training.callbacks.tokens import TokensMonitor
from tiny_lm.training.config import TrainingConfig
from tiny_lm.training.distributed import sum_over_ranks


class Validation(StepCallback):
    """Measures the loss over the validation stream, tracks the best one, and writes samples."""

    def __init__(
        self,
        config: TrainingConfig,
        stream: TokenStream,
        monitor: TokensMonitor,
        average: WeightAverage | None,
        samples: SampleWriter,
        metrics: StepMetrics,
    ) -> None:
        """Validate every ``val_every_n_steps`` optimizer steps, and after the last one over the whole stream."""
        self._config = config
        self._average = average
        self._samples = samples
        self._stream = stream
        self._monitor = monitor
        self._metrics = metrics
        self.latest: StepMetrics = {}
        self.best_loss = math.inf
        self.best_step = 0

    def on_step_end(self, trainer: pl.Trainer, module: Any, step: int) -> None:
        """Validate if due."""
        is_last = step == trainer.max_steps
        if step % self._config.val_every_n_steps and not is_last:
            return
        averaged = self._average.applied(module) if self._average else nullcontext()
        with self._monitor.pause(), averaged:
            module.eval()
            started = time.perf_counter()
            stats = self._measure(trainer, module, None if is_last else self._config.val_max_tokens)
            seconds = time.perf_counter() - started
            self._samples.on_validation(trainer, module, step, stats.loss, self._monitor.tokens)
            module.train()
        self.latest = {
            "val_loss": stats.loss,
            "val_ppl": stats.perplexity,
            "val_bpb": stats.bits_per_byte(self._stream.bytes_per_token),
            "val_seconds": seconds,
        }
        if stats.loss < self.best_loss:
            self.best_loss, self.best_step = stats.loss, step
        self._metrics.update(self.latest)

    def _measure(self, trainer: pl.Trainer, module: Any, max_tokens: int | None) -> LossStats:
        batches = trainer.datamodule.val_dataloader(max_tokens)  # type: ignore[attr-defined]  # Lightning sets it
        network: Any = trainer.model  # a sharded model must be called through its wrapper
        with trainer.precision_plugin.forward_context():
            stats = evaluate_loss(network, batches, device=module.device, ignore_index=self._config.ignore_index)
        nats, tokens = sum_over_ranks(trainer, [stats.nats, stats.tokens])
        return LossStats(nats, int(tokens))

    def forget_best(self) -> None:
        """Reset the best result: the next validation becomes the best."""
        self.best_loss, self.best_step = math.inf, 0

    def state_dict(self) -> dict[str, Any]:
        """Return the best result so far, and the latest one."""
        return {"best_loss": self.best_loss, "best_step": self.best_step, "latest": self.latest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best result so far."""
        self.best_loss, self.best_step = state_dict["best_loss"], state_dict["best_step"]
        self.latest = state_dict.get("latest", {})
