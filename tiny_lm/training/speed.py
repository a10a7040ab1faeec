"""How fast this machine trains a model: measured by training it for a moment."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console

from tiny_lm.data import BinDataConfig
from tiny_lm.model import ModelConfig
from tiny_lm.runs import Run
from tiny_lm.training.config import TrainingConfig
from tiny_lm.training.fit import train


@dataclass(frozen=True)
class Speed:
    """What a short run took."""

    tokens_per_second: float
    validation_seconds: float
    """One pass over the whole validation stream."""


def measure_speed(
    model_config: ModelConfig, training_config: TrainingConfig, data_config: BinDataConfig, *, steps: int = 30
) -> Speed:
    """Train for ``steps`` optimizer steps into a temporary folder, in the way of a real run.

    The first half of the steps, in which memory is taken and kernels are chosen, is not counted.
    """
    short = replace(training_config, max_steps=steps, log_every_n_steps=steps // 2, save_every_n_steps=steps)
    with TemporaryDirectory() as folder, Path(os.devnull).open("w") as nowhere:
        silent = Console(file=nowhere)
        metrics = train(model_config, short, data_config, Run(Path(folder) / "run"), console=silent).metrics
    return Speed(metrics["tokens_per_sec"], metrics["val_seconds"])
