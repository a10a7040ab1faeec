from collections.abc import Callable
from pathlib import Path

import pytest

from tiny_lm.data import BinDataConfig
from tiny_lm.model import model_config_from_dict
from tiny_lm.runs import Run
from tiny_lm.training import TrainingConfig
from tiny_lm.training.fit import train


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, stream_folder: Path) -> Run:
    """A run of a few steps on the built-in stories; its last validation read the whole stream."""
    run = Run(tmp_path_factory.mktemp("runs") / "trained")
    model = model_config_from_dict(
        {"vocab_size": 512, "context_length": 32, "d_model": 32, "n_layers": 2, "n_heads": 2, "d_ff": 64}, source="test"
    )
    training = TrainingConfig.from_dict(
        {"max_steps": 30, "learning_rate": 1e-2, "precision": "32-true", "val_every_n_steps": 10, "sample_tokens": 0}
    )
    data = BinDataConfig(
        train_path=str(stream_folder / "train.bin"),
        val_path=str(stream_folder / "val.bin"),
        block_size=32,
        batch_size=8,
    )
    train(model, training, data, run)
    return run


Silent = Callable[[str, int, int], None]


@pytest.fixture
def silent() -> Silent:
    return lambda stage, steps, total: None
