"""Whether the memory of a server stays flat: thousands of requests of mixed kinds, and its resident set all the while.

    python benchmarks/serve_soak.py RUN --plot memory.png                  # 10,000 requests
    python benchmarks/serve_soak.py RUN --plot memory.png --requests 1000

Of ten requests six are read to their end (half of them as a stream), two are streams that the client breaks off, and
two are refused: a wrong type, and a beginning that is too long. They come in ten waves, between which all clients fall
silent, so that every number of texts at once is met from 32 to none. The first fifth of all requests warms up; what
memory grows by behind it is printed, and the exit status is 1 when that is more than 20 MiB.
"""

import argparse
import asyncio
import random
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp
from serve_load import BEGINNINGS, free_port, ours, serving

CLIENTS = 32
WAVES = 10
WARM_UP = 0.2
MOST_GROWTH = 20.0  # MiB


class Soak:
    """Requests of a seeded mixture, and what memory the server had after how many of them."""

    def __init__(self, client: aiohttp.ClientSession, process: int, requests: int) -> None:
        self.client, self.process, self.requests = client, process, requests
        self.begun = self.done = 0
        self.answers: dict[str, int] = {}
        self.memory: list[tuple[int, float]] = []  # requests done, MiB

    async def work(self, until: int) -> None:
        """Send one request after the other until so many are begun."""
        while self.begun < until:
            number, self.begun = self.begun, self.begun + 1
            kind = await self.ask(random.Random(number))
            self.answers[kind] = self.answers.get(kind, 0) + 1
            self.done += 1
            if self.done % max(self.requests // 200, 1) == 0:
                self.memory.append((self.done, resident(self.process)))

    async def ask(self, source: random.Random) -> str:
        """Send one request; return what became of it."""
        body: dict[str, Any] = {
            "model": "story",
            "prompt": " ".join(source.choices(BEGINNINGS, k=source.randint(1, 8))),
            "max_tokens": source.randint(1, 128),
            "temperature": source.choice([0, 0.8, 1.2]),
            "top_p": source.choice([1.0, 0.9]),
            "stream": source.random() < 0.5,
        }
        kind = source.choice(["whole"] * 6 + ["broken off"] * 2 + ["wrong", "too long"])
        if kind == "wrong":
            body["max_tokens"] = "many"
        elif kind == "too long":
            body["prompt"] = "x" * 3_000_000
        elif kind == "broken off":
            body |= {"stream": True, "max_tokens": 128}
        async with self.client.post("/v1/completions", json=body) as response:
            if kind == "broken off" and response.status == 200:
                await response.content.readany()
                response.close()
                return kind
            await response.read()
            return str(response.status)


def resident(process: int) -> float:
    """Return the resident set of a process in MiB."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise ProcessLookupError(process)


async def soak(url: str, process: int, requests: int) -> Soak:
    """Send all requests, from many clients at once."""
    async with aiohttp.ClientSession(url, timeout=aiohttp.ClientTimeout(120)) as client:
        work = Soak(client, process, requests)
        for wave in range(1, WAVES + 1):
            await asyncio.gather(*(work.work(requests * wave // WAVES) for _ in range(CLIENTS)))
    return work


def draw(memory: list[tuple[int, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    axes.plot(*zip(*memory, strict=True))
    axes.set(xlabel="requests", ylabel="resident memory (MiB)", ylim=(0, None))
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--plot", type=Path, required=True, help="write a PNG here")
    arguments = parser.parse_args()
    port, started = free_port(), time.monotonic()
    with serving(ours(arguments.run, Path(), port), port) as server:
        work = asyncio.run(soak(server.url, server.process, arguments.requests))
    draw(work.memory, arguments.plot)
    after = [(done, mib) for done, mib in work.memory if done >= WARM_UP * arguments.requests]
    growth = after[-1][1] - after[0][1]
    print(
        f"{arguments.requests:,} requests in {time.monotonic() - started:.0f} s: {dict(sorted(work.answers.items()))}"
    )
    print(f"{after[0][1]:.1f} MiB after {after[0][0]:,}, {after[-1][1]:.1f} MiB at the end: {growth:+.1f} MiB")
    sys.exit(growth > MOST_GROWTH)


if __name__ == "__main__":
    main()
