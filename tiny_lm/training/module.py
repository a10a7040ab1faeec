"""The Lightning module: a causal language model and its loss."""

from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim import Optimizer

from tiny_lm.model import ModelConfig, build_model
from tiny_lm.model.checkpoint import CHECKPOINT_KEY
from tiny_lm.training.config import TrainingConfig
from tiny_lm.training.optim import build_optimizer, build_scheduler


class CausalLMModule(pl.LightningModule):
    """Next-token prediction: mean cross-entropy over the targets of a batch.

    Attributes:
        model: the network.
        gradient_norm: global norm of the last step's gradients before clipping, a tensor of one number.
    """

    def __init__(self, model_config: ModelConfig, config: TrainingConfig, identity: dict[str, Any]) -> None:
        """Build the model; its weights are drawn from torch's global random state.

        Args:
            model_config: the network.
            config: the training run.
            identity: plain values that every checkpoint carries, so that it is used only where it belongs: ``model``
                (its config), ``tokenizer_hash`` and whatever a resumed run must agree with.
        """
        super().__init__()
        self.model = build_model(model_config)
        if config.gradient_checkpointing:
            self.model.enable_gradient_checkpointing()
        if config.compile is True:
            self.model.compile()  # in place: the keys of the state dict stay as they are
        self.config = config
        self._identity = identity
        self.gradient_norm = torch.zeros(())
        self._saved_rng: dict[str, Any] | None = None

    def forward(self, input_ids: Tensor) -> Tensor:
        """Map ids ``[B, T]`` to logits ``[B, T, V]``."""
        logits: Tensor = self.model(input_ids)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the mean loss of a micro-batch, in nats per token."""
        x, y = batch
        logits = self(x)  # [B, T, V]
        return F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=self.config.ignore_index)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimizer and its schedule, stepped with each optimizer step."""
        optimizer = build_optimizer(self.model, self.config)
        scheduler = build_scheduler(optimizer, self.config)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the global norm and keep it; Lightning's own way refuses fused optimizers under mixed precision."""
        limit = self.config.grad_clip_norm or float("inf")
        self.gradient_norm = torch.nn.utils.clip_grad_norm_(self.parameters(), limit)

    # --- checkpoints: what the model is, and the random state, so that a resumed run draws what it would have drawn ---

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what is needed to use the weights, and the state of torch's random generators."""
        checkpoint[CHECKPOINT_KEY] = self._identity
        checkpoint["rng"] = {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the random state until the first batch: what happens before it draws numbers of its own."""
        self._saved_rng = checkpoint["rng"]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Restore the random state of the checkpoint, once."""
        if self._saved_rng is not None:
            torch.set_rng_state(self._saved_rng["cpu"].cpu())
            if torch.cuda.is_available():
                for device, state in enumerate(self._saved_rng["cuda"][: torch.cuda.device_count()]):
                    torch.cuda.set_rng_state(state.cpu(), device)
            self._saved_rng = None
