"""The Lightning module: a causal language model and its loss."""

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim import Optimizer

from tiny_lm.model import ModelConfig, build_model
from tiny_lm.model.checkpoint import CHECKPOINT_KEY
from tiny_lm.training.config import TrainingConfig
from tiny_lm.training.distributed import clip_gradients, gather_random_states
from tiny_lm.training.loss import LossFunction, next_token_loss
from tiny_lm.training.optim import Schedule, build_optimizer
from tiny_lm.training.resume import override_optimizer_hparams


class CausalLMModule(pl.LightningModule):
    """Next-token prediction: mean cross-entropy over the targets of a batch.

    Attributes:
        model: the network.
        gradient_norm: global norm of the last step's gradients before clipping, a tensor of one number.
    """

    def __init__(
        self,
        model_config: ModelConfig,
        config: TrainingConfig,
        checkpoint_meta: dict[str, Any],
        loss: LossFunction = next_token_loss,
    ) -> None:
        """Build the model, initialized from torch's global random state.

        Args:
            model_config: the network.
            config: the training run.
            checkpoint_meta: plain values that every checkpoint carries: ``model`` (its config), ``tokenizer_hash`` and
                what a resumed run must match.
            loss: computes the loss of the model on a micro-batch.
        """
        super().__init__()
        self.model = build_model(model_config)
        if config.gradient_checkpointing:
            self.model.enable_gradient_checkpointing()
        self.config = config
        self._loss = loss
        self._checkpoint_meta = checkpoint_meta
        self.gradient_norm = torch.zeros(())
        self._saved_rng: dict[str, Any] | None = None

    def forward(self, input_ids: Tensor) -> Tensor:
        """Map ids ``[B, T]`` to logits ``[B, T, V]``."""
        logits: Tensor = self.model(input_ids)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the mean loss of a micro-batch, in nats per token."""
        x, y = batch
        return self._loss(self.model, x, y, self.config.ignore_index)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimizer and its schedule, which steps with each optimizer step."""
        optimizer = build_optimizer(self.model, self.config)
        scheduler = Schedule(optimizer, self.config)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the global norm and store it; Lightning's own clipping refuses fused optimizers in mixed precision."""
        limit = self.config.grad_clip_norm or float("inf")
        self.gradient_norm = clip_gradients(self.trainer, self.parameters(), limit)

    # --- checkpoints: metadata, and the random state, so that a resumed run repeats exactly --------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the metadata and the state of torch's random generators of each rank."""
        checkpoint[CHECKPOINT_KEY] = self._checkpoint_meta
        checkpoint["rng"] = gather_random_states(self.device)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Override hyperparameters; hold back the random state until the first batch, since setup uses it too."""
        override_optimizer_hparams(checkpoint, self.model, self.config)
        saved, rank = checkpoint["rng"], self.trainer.global_rank
        states = (
            saved if isinstance(saved, list) else [{"cpu": saved["cpu"]}]
        )  # older checkpoints hold that of one process
        self._saved_rng = states[rank] if rank < len(states) else None  # None: a new rank

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Restore the random state of the checkpoint, once."""
        if self._saved_rng is not None:
            torch.set_rng_state(self._saved_rng["cpu"].cpu())
            if self.device.type == "cuda" and "cuda" in self._saved_rng:
                torch.cuda.set_rng_state(self._saved_rng["cuda"].cpu(), self.device)
            self._saved_rng = None
