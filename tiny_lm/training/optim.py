"""The optimizer and the learning-rate schedule."""

import math

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from tiny_lm.training.config import TrainingConfig


def build_optimizer(model: nn.Module, config: TrainingConfig) -> Optimizer:
    """Build AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101); weight decay touches matrices only."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    # The fused kernel updates all parameters in one call, on the CPU too; but it would unscale the gradients of fp16
    # itself, behind the clipping.
    return AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        fused=config.precision != "16-mixed",
    )


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
