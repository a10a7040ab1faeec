"""How many tokens a second a server tells to many clients at once, beside llama.cpp's server and `transformers serve`.

    python benchmarks/serve_load.py RUN              # a run folder; some ten minutes
    python benchmarks/serve_load.py RUN --turns 1 --json result.json --engines "tiny-lm serve"

Each server runs the same weights in float32 and listens at 127.0.0.1, alone on the machine but for the clients, which
are one process with 1, 8 and 32 connections. Each client asks for streamed texts of 128 tokens, one after the other,
from beginnings of different lengths. Tokens are counted as the server counts them (`usage`); a text that outlasts the
measurement counts for the share of its time that lies inside, so that there are as many clients all the time. One
client, eight and 32 take turns, so that what is compared was measured within a minute; a figure is the median of the
turns, a ratio that of the ratios within each turn. `llama-server` is tried where it is on the PATH.
"""

import argparse
import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from tempfile import TemporaryDirectory
from typing import Any

import aiohttp  # costs less than httpx, and the cores are the server's
import httpx
from generate_speed import export

TOKENS = 128
CLIENTS = (1, 8, 32)
SECONDS = 20.0  # of a measurement
START_SECONDS = 120.0
TEMPERATURE = 0.8
BEGINNINGS = (
    "Once upon a time, there was a little",
    "Tom and Anna went to the park. They saw a big",
    "The bear was",
    "One day, a small bird wanted to fly over the high hill behind the house. Her mother said that she",
)


@dataclass(frozen=True)
class Figures:
    """What the clients saw; times in seconds."""

    clients: int
    requests: int
    tokens_per_second: float
    first_p50: float
    first_p95: float
    whole_p95: float


# --- the servers -----------------------------------------------------------------------------------------------------

OURS = "tiny-lm serve"


def ours(run: Path, exports: Path, port: int) -> list[str]:
    code = "from tiny_lm.cli import main; main()"
    return [sys.executable, "-c", code, "serve", f"story={run}", "--port", str(port), "--slots", "32"]


def llama_cpp_python(run: Path, exports: Path, port: int) -> list[str]:
    options = {"model": exports / "model.gguf", "model_alias": "story", "n_ctx": 256, "n_threads": os.cpu_count()}
    options |= {"port": port, "interrupt_requests": False, "verbose": False}
    return [sys.executable, "-m", "llama_cpp.server", *flags(options)]


def llama_server(run: Path, exports: Path, port: int) -> list[str]:
    options = {"model": exports / "model.gguf", "ctx-size": 32 * 256, "parallel": 32, "threads": os.cpu_count()}
    return ["llama-server", *flags(options | {"port": port})]


def transformers_serve(run: Path, exports: Path, port: int) -> list[str]:
    transformers = str(Path(sys.executable).with_name("transformers"))
    model = str(exports / "huggingface")
    return [transformers, "serve", model, "--port", str(port), "--device", "cpu", "--continuous-batching"]


SERVERS: dict[str, Callable[[Path, Path, int], list[str]]] = {
    OURS: ours,
    "llama-cpp-python server": llama_cpp_python,
    "llama-server": llama_server,
    "transformers serve": transformers_serve,
}


def flags(options: dict[str, Any]) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def installed(name: str) -> bool:
    from importlib.util import find_spec

    needed = {"llama-cpp-python server": "llama_cpp", "transformers serve": "transformers"}
    if name == "llama-server":
        return shutil.which("llama-server") is not None
    return name not in needed or find_spec(needed[name]) is not None


@dataclass(frozen=True)
class Served:
    """A server that runs: its address, and the id of its process."""

    url: str
    process: int


@contextmanager
def serving(command: list[str], port: int) -> Iterator[Served]:
    """Start a server, wait until it answers, and end it."""
    url = f"http://127.0.0.1:{port}"
    with TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        # transformers lists the models of its cache, and fails without one.
        environment = os.environ | {"HF_HUB_CACHE": folder, "HF_HUB_OFFLINE": "1"}
        with log.open("w") as file:
            server = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
        try:
            deadline = time.monotonic() + START_SECONDS
            while not answers(url):
                if server.poll() is not None or time.monotonic() > deadline:
                    sys.exit(f"{' '.join(command)} does not answer:\n{log.read_text()[-3000:]}")
                time.sleep(0.2)
            yield Served(url, server.pid)
        finally:
            server.terminate()
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/v1/models", timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


# --- the clients, in a process of their own --------------------------------------------------------------------------


@dataclass
class Text:
    """What one client saw of one text; seconds."""

    began: float
    first: float
    whole: float
    tokens: int


async def tell(client: aiohttp.ClientSession, model: str, prompt: str, seed: int) -> Text:
    body = {"model": model, "prompt": prompt, "max_tokens": TOKENS, "temperature": TEMPERATURE, "seed": seed}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    started = time.perf_counter()
    first, tokens, chunks = 0.0, 0, 0
    async with client.post("/v1/completions", json=body) as response:
        if response.status != 200:
            sys.exit(f"HTTP {response.status}: {(await response.text())[:500]}")
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if any(choice.get("text") for choice in event.get("choices") or []):
                first = first or time.perf_counter() - started
                chunks += 1
            tokens = (event.get("usage") or {}).get("completion_tokens") or tokens
    # A server that tells no usage sends a chunk for each token.
    return Text(started, first, time.perf_counter() - started, tokens or chunks)


async def load(url: str, model: str, clients: int) -> Figures:
    """Ask as long as a measurement takes; texts that are begun are told to their end."""
    texts: list[Text] = []
    # A connection for each text: llama-server closes one after a hundred, in the middle of the next request.
    connector, timeout = aiohttp.TCPConnector(limit=clients, force_close=True), aiohttp.ClientTimeout(120)
    async with aiohttp.ClientSession(url, connector=connector, timeout=timeout) as client:
        await tell(client, model, BEGINNINGS[0], 0)  # warms up
        started = time.perf_counter()

        async def ask(number: int) -> None:
            turn = 0
            while time.perf_counter() - started < SECONDS:
                prompt = BEGINNINGS[(number + turn) % len(BEGINNINGS)]
                texts.append(await tell(client, model, prompt, 1000 * number + turn))
                turn += 1

        await asyncio.gather(*map(ask, range(clients)))
    end = started + SECONDS
    firsts, wholes = [text.first for text in texts], [text.whole for text in texts]
    return Figures(
        clients,
        len(texts),
        sum(text.tokens * min(1.0, (end - text.began) / text.whole) for text in texts) / SECONDS,
        median(firsts),
        percentile_95(firsts),
        percentile_95(wholes),
    )


def percentile_95(values: list[float]) -> float:
    return quantiles(values, n=20, method="inclusive")[-1] if len(values) > 1 else values[0]


def load_in_child(url: str, model: str, clients: int) -> Figures:
    command = [sys.executable, __file__, "--load", url, "--model", model, "--clients", str(clients)]
    child = subprocess.run(command, capture_output=True, text=True)
    if child.returncode:
        sys.exit(f"the clients failed:\n{child.stderr[-3000:]}")
    return Figures(**json.loads(child.stdout.splitlines()[-1]))


# --- the race --------------------------------------------------------------------------------------------------------


def race(run: Path, names: list[str], turns: int) -> dict[str, list[list[Figures]]]:
    """Return for each server and turn the figures for each number of clients."""
    results: dict[str, list[list[Figures]]] = {}
    with TemporaryDirectory() as folder:
        exports = Path(folder)
        export(run, exports)
        for name in names:
            port = free_port()
            with serving(SERVERS[name](run, exports, port), port) as server:
                model = str(exports / "huggingface") if name == "transformers serve" else "story"
                results[name] = [[load_in_child(server.url, model, each) for each in CLIENTS] for _ in range(turns)]
    return results


def print_table(results: dict[str, list[list[Figures]]]) -> None:
    print("\n                         clients  tokens/s  x one stream   first token p50 / p95   whole text p95")
    for name, turns in results.items():
        for place, clients in enumerate(CLIENTS):
            own = [figures[place] for figures in turns]
            ratio = median(figures[place].tokens_per_second / figures[0].tokens_per_second for figures in turns)
            first, late, whole = (
                median(getattr(figures, field) for figures in own) for field in ("first_p50", "first_p95", "whole_p95")
            )
            rate = median(figures.tokens_per_second for figures in own)
            print(
                f"{name:<24} {clients:>7} {rate:>9,.0f} {ratio:>10.2f} x   "
                f"{1000 * first:>9,.0f} / {1000 * late:>6,.0f} ms   {1000 * whole:>11,.0f} ms"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", help="a run folder")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--engines", nargs="+", choices=list(SERVERS), help="only these; all that are installed")
    parser.add_argument("--json", type=Path, help="write all figures here, too")
    for hidden in ("--load", "--model"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--clients", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load:
        print(json.dumps(asdict(asyncio.run(load(arguments.load, arguments.model, arguments.clients)))))
        return
    if arguments.run is None:
        parser.error("name a run folder")
    from machine import machine  # loads torch, which the clients do not need

    print(machine(), flush=True)
    names = arguments.engines or [name for name in SERVERS if installed(name)]
    results = race(arguments.run, names, arguments.turns)
    print_table(results)
    if arguments.json:
        figures = {name: [[asdict(one) for one in each] for each in turns] for name, turns in results.items()}
        arguments.json.write_text(json.dumps({"machine": machine(), "figures": figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
