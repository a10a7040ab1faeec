"""The optimizers and the learning-rate schedule."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from tiny_lm.training.config import TrainingConfig


def build_optimizer(model: nn.Module, config: TrainingConfig) -> Optimizer:
    """Build the optimizer that the config names; weight decay touches matrices and embeddings only.

    ``adamw`` is AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) on everything. ``muon`` is Muon (Jordan et al. 2024,
    kellerjordan.github.io/posts/muon) on the hidden matrices and AdamW on the rest.
    """
    embeddings = [p for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()]
    tables = {id(parameter) for parameter in embeddings}  # the tied head is one of them
    vectors = [p for p in model.parameters() if p.dim() < 2]
    hidden = [p for p in model.parameters() if p.dim() >= 2 and id(p) not in tables]
    if config.optimizer == "muon":
        return MuonAdamW(hidden, embeddings, vectors, config)
    return _adamw([*embeddings, *hidden], vectors, config)


def _adamw(decayed: list[nn.Parameter], vectors: list[nn.Parameter], config: TrainingConfig) -> AdamW:
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    # The fused kernel updates all parameters in one call, on the CPU too; but it would unscale the gradients of fp16
    # itself, behind the clipping.
    fused = config.precision != "16-mixed"
    return AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=fused)


class MuonAdamW(Optimizer):
    """Muon on hidden matrices and AdamW on embeddings and vectors, as the one optimizer that Lightning takes.

    The two share this object's parameter groups and state, so that schedulers, clipping and checkpoints see one
    optimizer. Muon's updates are scaled to the size of AdamW's (Liu et al. 2025, arXiv:2502.16982, section 2.2), so
    one learning rate serves both.
    """

    def __init__(
        self,
        hidden: list[nn.Parameter],
        embeddings: list[nn.Parameter],
        vectors: list[nn.Parameter],
        config: TrainingConfig,
    ) -> None:
        """Optimize ``hidden`` with Muon and the rest with AdamW."""
        self._muon = Muon(
            hidden, lr=config.learning_rate, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        self._adamw = _adamw(embeddings, vectors, config)
        super().__init__([*self._muon.param_groups, *self._adamw.param_groups], defaults={})
        self._share()

    def _share(self) -> None:
        """Let both optimizers work on the groups and the state of this one."""
        self._muon.param_groups, self._adamw.param_groups = self.param_groups[:1], self.param_groups[1:]
        self._muon.state = self._adamw.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """Update all parameters; ``closure`` computes the loss and the gradients first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._muon.step()  # type: ignore[no-untyped-call]  # torch gives it no types
        self._adamw.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned; it puts new groups and a new state in place of the shared ones."""
        super().load_state_dict(state_dict)
        self._share()


def build_scheduler(optimizer: Optimizer, config: TrainingConfig) -> LambdaLR:
    """Build the schedule; it is stepped once for each optimizer step."""
    return LambdaLR(optimizer, lambda step: learning_rate_at(step, config) / config.learning_rate)


def learning_rate_at(step: int, config: TrainingConfig) -> float:
    """Return the learning rate of optimizer step ``step``, counted from 0.

    The rate rises linearly over the first ``warmup_ratio`` of the run, reaching the peak with the last step of the
    warm-up; then it follows the schedule down to ``min_lr``, reached with the last step.
    """
    if config.scheduler == "none":
        return config.learning_rate
    warmup = round(config.warmup_ratio * config.max_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    if config.scheduler == "constant":
        return config.learning_rate
    progress = min((step - warmup) / max(config.max_steps - 1 - warmup, 1), 1.0)
    fall = (1 + math.cos(math.pi * progress)) / 2 if config.scheduler == "cosine" else 1 - progress
    return config.min_lr + (config.learning_rate - config.min_lr) * fall
