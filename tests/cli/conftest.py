import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tiny_lm.cli import main


@dataclass
class Result:
    code: int
    stdout: str
    stderr: str


Cli = Callable[..., Result]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run `tiny-lm` with some words and return what a shell would see of it."""

    def run(*words: str | Path) -> Result:
        monkeypatch.setattr(sys, "argv", ["tiny-lm", *map(str, words)])
        with pytest.raises(SystemExit) as exit_:
            main()
        captured = capsys.readouterr()
        return Result(int(exit_.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
