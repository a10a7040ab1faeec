"""What the tests of several rooms share: real text, and small things built from it once."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tiny_lm.data import BinDataConfig
from tiny_lm.data.tokenize import tokenize_corpus
from tiny_lm.dataset.stories import generate_stories
from tiny_lm.runs import Run
from tiny_lm.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer

ROOT = Path(__file__).parent.parent


_LONGEST_FIRST = (
    "test_cli_pipeline.py",
    "test_training_profiles.py",
    "test_cli_signals.py",
    "test_scripts.py",
    "test_cli_demo.py",
    "test_training_parallel.py",
    "test_training_resume.py",
    "test_training_launch.py",
    "test_export_onnx.py",
    "test_export_hub.py",
    "test_cli_helpers.py",
    "test_dataset_huggingface.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the files that take minutes first: one of them at the end would keep a process busy alone."""
    rank = {name: number for number, name in enumerate(_LONGEST_FIRST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


@pytest.fixture(scope="session", autouse=True)
def one_core_for_children() -> None:
    """Give what the tests start (the command line, a killed run) one core each, so that they do not fight.

    The tests themselves compute with all cores: torch has read the variable when a fixture sets it, and pytest-xdist's
    first process, whose environment the others get, runs no fixtures.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def signals_that_reach_children() -> None:
    """Undo what `nohup make test &` does: background jobs ignore Ctrl-C, and so would all that the tests start."""
    for name, handler in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, handler)


@pytest.fixture(scope="session")
def tinystories() -> Path:
    """The folder of the real TinyStories sample, with train.txt and valid.txt."""
    folder = ROOT.parent / "shared" / "data" / "tinystories"
    if not folder.is_dir():
        pytest.skip(f"the TinyStories sample is not at {folder}")
    return folder


@pytest.fixture(scope="session")
def stories() -> list[str]:
    return list(generate_stories(300, seed=1))


@pytest.fixture(scope="session")
def tokenizer(stories: list[str]) -> Tokenizer:
    config = TokenizerConfig(name="test", vocab_size=512, dataset_config="stories")
    return train_tokenizer(config, stories)


@pytest.fixture(scope="session")
def stream_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer, stories: list[str]) -> Path:
    """A token stream of 280 stories to train on and 20 to validate."""
    folder = tmp_path_factory.mktemp("stream")
    tokenize_corpus(tokenizer, {"train": stories[:280], "val": stories[280:]}, folder, source="test")
    return folder


@pytest.fixture
def data_config(stream_folder: Path) -> Callable[..., BinDataConfig]:
    """Make a data config of the stream, with values of one's own."""

    def make(**values: Any) -> BinDataConfig:
        defaults = {
            "train_path": str(stream_folder / "train.bin"),
            "val_path": str(stream_folder / "val.bin"),
            "block_size": 32,
            "batch_size": 4,
        }
        return BinDataConfig(**{**defaults, **values})

    return make


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "runs" / "test")
