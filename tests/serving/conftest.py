"""A tiny run, an export of another family, and servers of them."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from served import Serve, Served, start, stop
from story_runs import train_story_run

from tiny_lm.inference import TextGenerator


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory, stream_folder: Path) -> Path:
    """A run of a model with a context of 64 tokens that has seen a few stories."""
    folder = tmp_path_factory.mktemp("runs") / "fox"
    return train_story_run(folder, stream_folder, steps=40, context_length=64, rate=5e-3)


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
