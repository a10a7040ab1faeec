"""Training a model with PyTorch Lightning."""

from tiny_lm.training.config import TrainingConfig

__all__ = ["TrainingConfig"]
