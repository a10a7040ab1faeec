"""Starting processes that train together, and comparing what they did with what one process does."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import losses

from tiny_lm.runs import Run, read_metrics

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def environment() -> dict[str, str]:
    """That of a shell, without the variables by which launchers number processes."""
    ours = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "RANK", "WORLD_SIZE", "GROUP_RANK")
    return {key: value for key, value in os.environ.items() if key not in ours}


def start_two_processes(script: str, stream_folder: Path, folder: Path) -> Path:
    """Let two processes of torchrun do what a script beside this file says, into ``folder``."""
    command = [*TORCHRUN, "--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port", free_port()]
    command += [str(Path(__file__).with_name(script)), str(stream_folder), str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment())
    assert result.returncode == 0, result.stderr[-5000:]
    return folder


def values_of(run: Run, key: str) -> list[float]:
    return [event[key] for event in read_metrics(run.metrics) if key in event]


def assert_same_run(run: Run, expected: Run) -> None:
    assert losses(run) == pytest.approx(losses(expected), abs=1e-4)
    assert values_of(run, "val_loss") == pytest.approx(values_of(expected, "val_loss"), abs=1e-5)
    assert values_of(run, "tokens") == values_of(expected, "tokens")
    assert values_of(run, "grad_norm") == pytest.approx(values_of(expected, "grad_norm"), abs=1e-4)
