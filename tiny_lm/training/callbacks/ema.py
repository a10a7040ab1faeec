"""An exponential moving average of the weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from tiny_lm.model.checkpoint import AVERAGE_KEY
from tiny_lm.training.callbacks.base import StepCallback


class WeightAverage(StepCallback):
    """Keeps an exponential moving average of the weights (Polyak averaging, as in arXiv:1706.03762 and many since).

    After optimizer step t the average moves by ``1 - min(decay, (1 + t) / (10 + t))`` towards the weights: early on it
    follows them closely instead of remembering their initial values. Checkpoints hold both; whoever loads the model
    gets the average, and only a resumed run continues from the weights themselves.
    """

    def __init__(self, decay: float) -> None:
        """Average with ``decay``, between 0 and 1."""
        self._decay = decay
        self._average: dict[str, Tensor] = {}

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Start from the current weights, unless a checkpoint holds an average."""
        weights = module.state_dict()
        saved = self._average or weights
        self._average = {name: saved[name].detach().to(weight.device, copy=True) for name, weight in weights.items()}

    @torch.no_grad()
    def on_step_end(self, trainer: pl.Trainer, module: Any, step: int) -> None:
        """Update the average."""
        decay = min(self._decay, (1 + step) / (10 + step))
        weights = module.state_dict()
        update = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]  # torch gives it no types
        update(list(self._average.values()), [weights[name] for name in self._average], None)

    @contextmanager
    def applied(self, module: Any) -> Iterator[None]:
        """Use the average as the weights of ``module`` while the block runs."""
        weights = {name: weight.clone() for name, weight in module.state_dict().items()}
        module.load_state_dict(self._average)
        try:
            yield
        finally:
            module.load_state_dict(weights)

    def on_save_checkpoint(self, trainer: pl.Trainer, module: Any, checkpoint: dict[str, Any]) -> None:
        """Save the average."""
        checkpoint[AVERAGE_KEY] = self._average

    def on_load_checkpoint(self, trainer: pl.Trainer, module: Any, checkpoint: dict[str, Any]) -> None:
        """Load the average; without one, it starts from the weights."""
        self._average = checkpoint.get(AVERAGE_KEY, {})
