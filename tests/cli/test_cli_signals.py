"""Signals that end commands, and what the commands leave behind."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

PROGRAM = [sys.executable, "-c", "from tiny_lm.cli import main; main()"]
IGNORING = "import os, signal, sys; signal.signal(signal.{0}, signal.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])"
TERMINATING = [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    started = []

    def do(*words: str, ignoring: str | None = None) -> subprocess.Popen[str]:
        before = [sys.executable, "-c", IGNORING.format(ignoring)] if ignoring else []
        process = subprocess.Popen(
            [*before, *PROGRAM, *words],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield do
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [*TERMINATING, signal.SIGKILL])
def test_a_command_that_is_ended_leaves_nothing_that_stays(
    number: signal.Signals, start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    """SIGKILL leaves a temporary file, which the next command of its kind removes."""
    process = start("data", "stories", "--count", "100000000")

    def temporary() -> list[Path]:
        return [path for path in tmp_path.glob(".stories.txt.*.tmp") if path.stat().st_size]

    wait_for(lambda: bool(temporary()), process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    if number == signal.SIGKILL:
        assert temporary()
        assert start("data", "stories", "--count", "5").wait(60) == 0
    else:
        assert process.returncode == 128 + number
        assert errors.splitlines()[-1] == f"ended by {number.name}"
        assert "Traceback" not in errors
    assert temporary() == []


def test_a_signal_that_is_ignored_stays_ignored(start: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    process = start("data", "stories", "--count", "100000000", ignoring="SIGHUP")
    wait_for(lambda: any(tmp_path.glob(".stories.txt.*.tmp")), process)
    process.send_signal(signal.SIGHUP)
    (size,) = [path.stat().st_size for path in tmp_path.glob(".stories.txt.*.tmp")]
    wait_for(lambda: max(path.stat().st_size for path in tmp_path.glob(".stories.txt.*.tmp")) > size, process)


def train_words(tmp_path: Path, stream_folder: Path) -> list[str]:
    (tmp_path / "model.yaml").write_text(
        "architecture: gpt2\nvocab_size: 512\ncontext_length: 32\nd_model: 32\nn_layers: 1\nn_heads: 2\nd_ff: 64\n"
    )
    (tmp_path / "training.yaml").write_text(
        "max_steps: 1000000\nlearning_rate: 0.001\nprecision: 32-true\nlog_every_n_steps: 1\ncompile: false\n"
        "val_every_n_steps: 1000000\nsave_every_n_steps: 1000000\nrun_name: r\n"
    )
    (tmp_path / "data.yaml").write_text(
        f"train_path: {stream_folder}/train.bin\nval_path: {stream_folder}/val.bin\nblock_size: 32\nbatch_size: 4\n"
    )
    return ["train", *(f"--{section}-config={section}.yaml" for section in ("model", "training", "data"))]


def lines(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_a_closed_terminal_or_a_warning_of_slurm_stops_training_with_a_checkpoint(
    number: signal.Signals, start: Callable[..., subprocess.Popen[str]], tmp_path: Path, stream_folder: Path
) -> None:
    """A terminal that closes sends SIGHUP twice: the second one comes while the checkpoint is being written."""
    process = start(*train_words(tmp_path, stream_folder))
    run = tmp_path / "runs" / "r"
    wait_for(lambda: lines(run / "metrics.jsonl") >= 2, process)
    process.send_signal(number)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert (run / "checkpoints" / "last.ckpt").is_file()
    assert json.loads((run / "run.json").read_text())["status"] == "stopped"
    assert "resume with: tiny-lm train --resume runs/r" in errors


@pytest.mark.parametrize("name", ["SIGHUP", "SIGINT"])
def test_training_goes_on_where_a_signal_is_ignored(
    name: str, start: Callable[..., subprocess.Popen[str]], tmp_path: Path, stream_folder: Path
) -> None:
    """As nohup does it for SIGHUP, and a script's ``&`` for SIGINT."""
    process = start(*train_words(tmp_path, stream_folder), ignoring=name)
    metrics = tmp_path / "runs" / "r" / "metrics.jsonl"
    wait_for(lambda: lines(metrics) >= 2, process)
    process.send_signal(getattr(signal, name))
    before = lines(metrics)
    wait_for(lambda: lines(metrics) >= before + 20, process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
