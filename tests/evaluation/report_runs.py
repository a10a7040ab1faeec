"""A small run folder as training leaves it, for the tests of the report, here and in a browser."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tiny_lm.data import BinDataConfig
from tiny_lm.model import ModelConfig, model_config_from_dict
from tiny_lm.runs import Run
from tiny_lm.training import TrainingConfig
from tiny_lm.training.fit import train

EVALUATION: dict[str, Any] = {
    "checkpoint": "runs/test/checkpoints/best.ckpt",
    "step": 60,
    "created": "2026-11-24T12:00:00+00:00",
    "stream": {"path": "val.bin", "tokens": 4321, "bytes": 9876, "method": "sliding", "window": 64, "stride": 32},
    "loss": 4.5678,
    "perplexity": 96.33,
    "bits_per_byte": 1.2345,
    "position_loss": [
        {"first": first, "last": 2 * first - 1, "tokens": 100, "loss": 5.0 - 0.1 * place}
        for place, first in enumerate([1, 2, 4, 8, 16, 32])
    ],
    "quality": {
        "prompts": 2,
        "samples": 4,
        "temperature": 0.8,
        "max_new_tokens": 100,
        "seed": 0,
        "distinct": {"1": 0.31, "2": 0.62, "3": 0.83, "4": 0.94},
        "repeated": {"2": 0.05, "3": 0.02, "4": 0.01},
        "ended": 0.75,
        "length": {"mean": 71.5, "median": 70, "min": 33, "max": 100},
        "copied": {"longest": 17, "mean_longest": 9.5, "text": " and they all lived happily ever after"},
        "invented_words": {"share": 0.021, "examples": ["flumbled", "grinsy"]},
    },
    "samples": [{"prompt": "One day", "text": ", a cat came.", "ended": True, "tokens": 6, "longest_copy": 4}],
    "judge": {"model": "some-judge", "grades": {"grammar": 6.5, "plot": 3.25}},
}


def small_model(family: str = "gpt2", **values: Any) -> ModelConfig:
    sizes = {"vocab_size": 512, "context_length": 64, "d_model": 32, "n_layers": 2, "n_heads": 4}
    return model_config_from_dict({"architecture": family, **sizes, **values}, source="test")


def train_small(run: Run, make_data: Callable[..., BinDataConfig], *, steps: int = 60, **values: Any) -> Run:
    """Train a model for a moment; three validations tell their stories."""
    config = TrainingConfig.from_dict(
        {
            "max_steps": steps,
            "learning_rate": 1e-2,
            "precision": "32-true",
            "val_every_n_steps": steps // 3,
            "val_max_tokens": 512,
            "save_every_n_steps": steps,
            "log_every_n_steps": 1,
            "sample_tokens": 30,
            **values,
        }
    )
    data = dataclasses.replace(make_data(), block_size=64)
    train(small_model(), config, data, run, names=["quickstart"] * 3)
    return run


def write_evaluation(run: Run, **values: Any) -> None:
    run.evaluation.write_text(json.dumps({**EVALUATION, **values}), encoding="utf-8")


def write_metrics(run: Run, events: Sequence[dict[str, Any]]) -> Path:
    run.metrics.write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
    return run.metrics
