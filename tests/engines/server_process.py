"""A server in a process of its own: a shell block is run, waited for until it answers, and stopped."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import httpx


def free_ports(count: int = 1) -> int:
    """Return the first of some ports in a row that nobody listens on."""
    for first in range(20_000 + os.getpid() % 10_000, 32_000):
        listeners = []
        try:
            for port in range(first, first + count):
                listeners.append(socket.create_server(("127.0.0.1", port)))
            return first
        except OSError:
            continue
        finally:
            for listener in listeners:
                listener.close()
    raise AssertionError("no free port")


@contextmanager
def server(
    block: str, folder: Path, health: str, *, path: Path, environment: Mapping[str, str], seconds: float = 300
) -> Iterator[httpx.Client]:
    """Run ``block`` in ``folder`` until the block of the caller ends; yield a client for the server.

    Args:
        block: of a shell; its last command is the server, which does not return.
        folder: to run in; gets ``server.log``.
        health: address that answers with 200 when the server is ready.
        path: folder of programs that comes before others.
        environment: further variables.
        seconds: longest time until it is ready.
    """
    log = folder / "server.log"
    variables = {**os.environ, **environment, "PATH": f"{path}{os.pathsep}{os.environ['PATH']}"}
    with log.open("w") as output:
        process = subprocess.Popen(
            ["bash", "-e", "-c", block],
            cwd=folder,
            env=variables,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    try:
        with httpx.Client(base_url=health[: health.index("/", 8)], timeout=120, trust_env=False) as client:
            end = time.monotonic() + seconds
            while not _answers(client, health):
                assert process.poll() is None and time.monotonic() < end, log.read_text(errors="replace")[-4000:]
                time.sleep(0.5)
            yield client
    finally:
        _stop(process)


def _answers(client: httpx.Client, health: str) -> bool:
    try:
        return client.get(health).status_code == 200
    except httpx.TransportError:
        return False


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """Ask the whole group to end, and end it where it does not."""
    for kind in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, kind)
            process.wait(timeout=20)
        except ProcessLookupError:
            break
        except subprocess.TimeoutExpired:
            continue
