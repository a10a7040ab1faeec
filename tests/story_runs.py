"""Small runs on stories, for tests of what comes after training."""

from pathlib import Path

from tiny_lm.data import BinDataConfig
from tiny_lm.model import model_config_from_dict
from tiny_lm.runs import Run
from tiny_lm.training import TrainingConfig
from tiny_lm.training.fit import train


def train_story_run(folder: Path, stream: Path, *, steps: int, context_length: int = 32, rate: float = 3e-3) -> Path:
    """Train a GPT-2 of one layer for a moment; return its run folder."""
    model = {"vocab_size": 512, "context_length": context_length, "d_model": 32, "n_layers": 1, "n_heads": 2}
    paths = {"train_path": str(stream / "train.bin"), "val_path": str(stream / "val.bin")}
    train(
        model_config_from_dict(model, source="test"),
        TrainingConfig(max_steps=steps, learning_rate=rate, precision="32-true", sample_tokens=0),
        BinDataConfig(**paths, block_size=context_length, batch_size=4),
        Run(folder),
    )
    return folder
