"""A tiny run, an export of another family, and servers of them."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from served import Serve, Served, start, stop

from tiny_lm.data import BinDataConfig
from tiny_lm.inference import TextGenerator
from tiny_lm.model import model_config_from_dict
from tiny_lm.runs import Run
from tiny_lm.training import TrainingConfig
from tiny_lm.training.fit import train


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory, stream_folder: Path) -> Path:
    """A run of a model with a context of 64 tokens that has seen a few stories."""
    config = model_config_from_dict(
        {"vocab_size": 512, "context_length": 64, "d_model": 32, "n_layers": 1, "n_heads": 2}, source="test"
    )
    data = BinDataConfig(
        train_path=str(stream_folder / "train.bin"),
        val_path=str(stream_folder / "val.bin"),
        block_size=64,
        batch_size=4,
    )
    run = Run(tmp_path_factory.mktemp("runs") / "fox")
    train(config, TrainingConfig(max_steps=40, learning_rate=5e-3, precision="32-true", sample_tokens=0), data, run)
    return run.folder


@pytest.fixture(scope="session")
def generator(run_folder: Path) -> TextGenerator:
    return TextGenerator.from_run(run_folder)


@pytest.fixture(scope="session")
def server(run_folder: Path) -> Iterator[Served]:
    """A server of the run under two names, as it comes."""
    served = start(run_folder, f"bear={run_folder}", "--max-tokens", "100000")
    yield served
    told = stop(served)
    assert "Traceback" not in told, told
    assert served.process.returncode == 0


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Start servers of one's own, which are gone when the test is over."""
    with contextlib.ExitStack() as running:

        def run(*words: str | Path, **environment: str) -> Served:
            served = start(*words, **environment)
            running.enter_context(served.process)
            running.callback(served.process.kill)
            running.callback(served.client.close)
            return served

        yield run
