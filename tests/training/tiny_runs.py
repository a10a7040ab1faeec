"""A model small enough to be trained in a moment, how the tests train it, and what came out."""

from typing import Any

from tiny_lm.model import ModelConfig, model_config_from_dict
from tiny_lm.runs import Run, read_metrics
from tiny_lm.training import TrainingConfig

FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_heads": 2, "d_ff": 64},
    "smalllm": {"n_heads": 2, "d_ff": 64},
    "llama3": {"n_heads": 4, "n_kv_heads": 2},
    "qwen3": {"n_heads": 4, "n_kv_heads": 2},
}


def model(family: str = "gpt2", **values: Any) -> ModelConfig:
    size = {"vocab_size": 512, "context_length": 32, "d_model": 32, "n_layers": 2, "dropout": 0.1}
    return model_config_from_dict({"architecture": family, **size, **FAMILIES[family], **values}, source="test")


def training(**values: Any) -> TrainingConfig:
    defaults = {
        "max_steps": 12,
        "learning_rate": 3e-3,
        "precision": "32-true",
        "val_every_n_steps": 6,
        "save_every_n_steps": 4,
        "log_every_n_steps": 1,
        "system_metrics_every_n_steps": 5,
    }
    return TrainingConfig.from_dict({**defaults, **values})


def losses(run: Run) -> dict[int, float]:
    return {event["step"]: event["train_loss"] for event in read_metrics(run.metrics) if "train_loss" in event}
