"""Benchmark of a training step on random tokens: speed and memory are measured before there is a run."""

import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from tiny_lm.hardware.device import fastest_device
from tiny_lm.inference.scoring import evaluate_loss
from tiny_lm.model import ModelConfig
from tiny_lm.training.acceleration import keep_freed_memory, prefers_blocked_attention
from tiny_lm.training.config import TrainingConfig
from tiny_lm.training.fit import quiet_lightning
from tiny_lm.training.lm_module import CausalLMModule
from tiny_lm.training.precision import choose_precision

_REPEATS = 5
"""Timed micro-batches of one size, if there is time."""


@dataclass(frozen=True)
class StepTimes:
    """The fastest times of the parts of a step, in seconds."""

    sequences: int
    """Size of the timed micro-batch."""
    micro_batch: float
    """Its forward and backward pass."""
    update: float
    """Clipping and the optimizer step."""
    validation: float
    """A forward pass of the same size, with the loss."""


def benchmark_step(
    model_config: ModelConfig,
    config: TrainingConfig,
    sequences: int,
    block_size: int,
    *,
    seconds: float = 0.0,
    grow: bool = False,
) -> StepTimes:
    """Train briefly through Lightning's trainer, on random tokens and without a run folder.

    At least two optimizer steps and one validation run, so that gradients, optimizer state and logits have all been in
    memory together. Nothing is compiled.

    Args:
        model_config: the network.
        config: optimizer, precision and gradient checkpointing.
        sequences: sequences in a micro-batch.
        block_size: tokens in a sequence.
        seconds: repeat for this long for better timings.
        grow: start with one sequence and double up to ``sequences`` while ``seconds`` allow.
    """
    device = fastest_device()
    precision, _ = choose_precision(config, device)
    torch.set_float32_matmul_precision("high")
    if device == "cpu":
        keep_freed_memory()
    module = CausalLMModule(model_config, config, {})
    if prefers_blocked_attention(device, block_size):
        module.model.use_blocked_attention()
    # Gradients outlive a micro-batch only with accumulation.
    accumulate = 1 if grow else min(config.accumulate_grad_batches, 2)
    timer = _StepTimer(sequences, block_size, model_config.vocab_size, seconds, grow=grow)
    with quiet_lightning():
        trainer = pl.Trainer(
            accelerator=device,
            devices=1,
            precision=precision,
            max_epochs=-1,
            accumulate_grad_batches=accumulate,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            plugins=[LightningEnvironment()],  # one process, whatever launched this one
            callbacks=[timer],
        )
        trainer.fit(module, train_dataloaders=timer)
    return timer.times


class _StepTimer(Callback):
    """Provides batches, times their processing, and ends with a validation."""

    def __init__(self, sequences: int, block_size: int, vocab_size: int, seconds: float, *, grow: bool) -> None:
        self._sequences = 1 if grow else sequences
        self._max_sequences = sequences
        self._block_size = block_size
        self._vocab_size = vocab_size
        self._seconds = seconds
        self._timed = 0  # sequences of the current batch
        self._first = self._started = self._backward_done = 0.0
        self._passes: defaultdict[int, list[float]] = defaultdict(list)  # by sequences
        self._updates: list[float] = []
        self._steps = 0
        self._validation = 0.0

    @property
    def times(self) -> StepTimes:
        """The times of the largest micro-batch."""
        # The shortest: the first ones warm up, and others may share the machine.
        return StepTimes(self._sequences, min(self._passes[self._sequences]), min(self._updates), self._validation)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield self._batch()

    def _batch(self) -> tuple[Tensor, Tensor]:
        ids = torch.randint(self._vocab_size, (self._sequences, self._block_size + 1))
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Start the clock."""
        self._first = _now()

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        """Start timing a micro-batch."""
        self._timed = len(batch[0])  # Lightning prefetches: the batch may have an earlier size
        self._started = _now()

    def on_after_backward(self, trainer: pl.Trainer, module: Any) -> None:
        """Stop timing at the end of the backward pass."""
        self._backward_done = _now()
        self._passes[self._timed].append(self._backward_done - self._started)

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Time the update, and choose the next size."""
        if trainer.global_step == self._steps:
            return
        self._steps = trainer.global_step
        self._updates.append(_now() - self._backward_done)
        used, passes = _now() - self._first, self._passes[self._sequences]
        if self._steps < 2 or self._timed != self._sequences:
            return
        if self._sequences < self._max_sequences and used + 5 * passes[-1] <= self._seconds:  # two of twice the size
            self._sequences = min(2 * self._sequences, self._max_sequences)
        elif len(passes) < 2 or (len(passes) <= _REPEATS and used + 1.5 * passes[-1] <= self._seconds):
            return
        else:
            self._validate(trainer, module, batch)
            trainer.should_stop = True

    def _validate(self, trainer: pl.Trainer, module: Any, batch: tuple[Tensor, Tensor]) -> None:
        module.eval()
        started = _now()
        with trainer.precision_plugin.forward_context():
            evaluate_loss(module, [batch], device=module.device)
        self._validation = _now() - started
        module.train()


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
