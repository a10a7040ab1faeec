"""What the tests of this folder share: `tiny-lm serve` in a process of its own."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import httpx

ROOT = Path(__file__).parent.parent.parent


@dataclass
class Served:
    """A running server."""

    url: str
    process: "subprocess.Popen[str]"
    client: httpx.Client

    def metric(self, name: str) -> float:
        """Return a figure of /metrics, summed over its labels."""
        lines = self.client.get("/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if re.split("[{ ]", line)[0] == name)


Serve = Callable[..., Served]


def start(*words: str | Path, **environment: str) -> Served:
    """Run `tiny-lm serve` at a free port and wait until it listens."""
    process = subprocess.Popen(
        [sys.executable, "-c", "from tiny_lm.cli import main; main('serve')", *map(str, words), "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    assert process.stdout and process.stderr
    url = process.stdout.readline().strip()
    assert url.startswith("http://127.0.0.1:"), process.stderr.read()
    return Served(url, process, httpx.Client(base_url=url, timeout=60, headers={"content-type": "application/json"}))


def stop(served: Served) -> str:
    """Ask a server to stop, and return what it wrote to standard error."""
    served.client.close()
    served.process.send_signal(signal.SIGTERM)
    try:
        _, told = served.process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        served.process.kill()
        raise
    return told


def wait_for(condition: Callable[[], bool], *, seconds: float = 20) -> None:
    """Return once ``condition`` holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
