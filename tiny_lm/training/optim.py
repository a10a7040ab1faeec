"""Optimizers, and the schedules of learning rate and weight decay."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from tiny_lm.training.config import TrainingConfig
from tiny_lm.training.muon import Muon

PARAM_GROUPS = ("hidden", "embeddings", "vectors")
"""Parameter groups of every optimizer, in this order: hidden matrices, embeddings and head, norms and biases."""


def build_optimizer(model: nn.Module, config: TrainingConfig) -> Optimizer:
    """Build the configured optimizer; weight decay applies to matrices and embeddings only.

    ``adamw``: AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) on everything. ``muon``: Muon (Jordan et al. 2024,
    kellerjordan.github.io/posts/muon) on hidden matrices, AdamW on the rest. Both have the groups of ``PARAM_GROUPS``.
    """
    # By module type, not by shape: sharded weights are flat. An untied head counts as an embedding; a tied one is one.
    ends = [m for name, m in model.named_modules() if isinstance(m, nn.Embedding) or name.endswith("lm_head")]
    embeddings = list({id(m.weight): m.weight for m in ends}.values())
    tables = {id(weight) for weight in embeddings}
    hidden = [m.weight for m in model.modules() if isinstance(m, nn.Linear) and id(m.weight) not in tables]
    matrices = tables | {id(weight) for weight in hidden}
    vectors = [p for p in model.parameters() if id(p) not in matrices]
    if config.optimizer == "muon":
        return MuonAdamW(hidden, embeddings, vectors, config)
    groups = [{"params": hidden, "weight_decay": config.weight_decay}, *_other_groups(embeddings, vectors, config)]
    return _adamw(groups, config)


def _other_groups(
    embeddings: Sequence[Tensor], vectors: Sequence[Tensor], config: TrainingConfig
) -> list[dict[str, Any]]:
    """Return the parameter groups of everything except hidden matrices."""
    rate, decay = config.embedding_learning_rate, config.embedding_weight_decay
    return [
        {
            "params": embeddings,
            "lr": config.learning_rate if rate is None else rate,
            "weight_decay": config.weight_decay if decay is None else decay,
        },
        {"params": vectors, "weight_decay": 0.0},
    ]


def _adamw(groups: list[dict[str, Any]], config: TrainingConfig) -> AdamW:
    # Fused: one call updates all parameters, on the CPU too. Not for fp16: it would unscale gradients after clipping.
    fused = config.precision != "16-mixed"
    return AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=fused)


class MuonAdamW(Optimizer):
    """Muon on hidden matrices and AdamW on embeddings and vectors, as a single optimizer for Lightning.

    The two share this object's parameter groups and state, so that schedulers, clipping and checkpoints see one
    optimizer. Muon's updates are scaled to the size of AdamW's (Liu et al. 2025, arXiv:2502.16982, section 2.2), so
    both use one learning rate.
    """

    def __init__(
        self,
        hidden: Sequence[Tensor],
        embeddings: Sequence[Tensor],
        vectors: Sequence[Tensor],
        config: TrainingConfig,
    ) -> None:
        """Optimize ``hidden`` with Muon and the rest with AdamW."""
        self._muon = Muon(
            hidden,
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            momentum=config.muon_momentum,
            adjust_lr_fn="match_rms_adamw",  # our Muon always does this
        )
        self._adamw = _adamw(_other_groups(embeddings, vectors, config), config)
        super().__init__([*self._muon.param_groups, *self._adamw.param_groups], defaults={})
        self._share()

    def _share(self) -> None:
        """Make both optimizers use the groups and the state of this one."""
        self._muon.param_groups, self._adamw.param_groups = self.param_groups[:1], self.param_groups[1:]
        self._muon.state = self._adamw.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """Update all parameters; ``closure`` computes the loss and the gradients first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._muon.step()
        self._adamw.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict, which replaces groups and state, and share the new ones."""
        super().load_state_dict(state_dict)
        self._share()


class Schedule(LambdaLR):
    """Sets learning rate and weight decay for each optimizer step."""

    def __init__(self, optimizer: Optimizer, config: TrainingConfig, *, step: int = 0) -> None:
        """Schedule the groups of ``optimizer``, which has taken ``step`` steps; groups without decay stay without."""
        self._config = config
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
            if group["weight_decay"]:
                group["initial_weight_decay"] = group["weight_decay"]  # also marks the group in checkpoints
        super().__init__(
            optimizer, lambda step: learning_rate_at(step, config) / config.learning_rate, last_epoch=step - 1
        )

    def step(self, epoch: int | None = None) -> None:
        """Set both for the next optimizer step."""
        super().step(epoch)
        for group in self.optimizer.param_groups:
            if "initial_weight_decay" in group:
                share = weight_decay_share(self.last_epoch, self._config)
                group["weight_decay"] = group["initial_weight_decay"] * share

    def state_dict(self) -> dict[str, Any]:
        """Return the state without the config, which belongs to the run, not to the checkpoint."""
        state: dict[str, Any] = super().state_dict()
        del state["_config"]
        return state


def learning_rate_at(step: int, config: TrainingConfig) -> float:
    """Return the learning rate of optimizer step ``step``, counted from 0.

    The rate rises linearly over the first ``warmup_ratio`` of the run, reaching the peak with the last step of the
    warm-up; then it follows the schedule down to ``min_lr``, reached with the last step. ``wsd`` (warm-up, stable,
    decay: Hu et al. 2024, arXiv:2404.06395, section 4) holds the peak until the last ``decay_ratio`` of the run.
    """
    if config.scheduler == "none":
        return config.learning_rate
    warmup = round(config.warmup_ratio * config.max_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    if config.scheduler == "constant":
        return config.learning_rate
    peak = warmup  # the last step at the peak
    if config.scheduler == "wsd":
        peak = max(warmup, config.max_steps - 1 - round(config.decay_ratio * config.max_steps))
    progress = min(max((step - peak) / max(config.max_steps - 1 - peak, 1), 0.0), 1.0)
    factor = (1 + math.cos(math.pi * progress)) / 2 if config.scheduler == "cosine" else 1 - progress
    return config.min_lr + (config.learning_rate - config.min_lr) * factor


def weight_decay_share(step: int, config: TrainingConfig) -> float:
    """Return the factor of the weight decay at optimizer step ``step``, counted from 0.

    ``linear`` and ``cosine`` reach 0 at the last step.
    """
    progress = min(step / max(config.max_steps - 1, 1), 1.0)
    match config.weight_decay_schedule:
        case "constant":
            return 1.0
        case "linear":
            return 1 - progress
        case "cosine":
            return (1 + math.cos(math.pi * progress)) / 2
