"""``run_engine`` in a process of its own, as the command line runs it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

CODE = """
import sys
from tiny_lm.errors import UserError
from tiny_lm.serving.engines import run_engine
engine, source, port, python = sys.argv[1:]
try:
    tell = lambda line: print(line, flush=True)
    sys.exit(run_engine(engine, source, port=int(port), python=python or None, log=tell))
except UserError as error:
    print("error:", error, flush=True)
    sys.exit(2)
"""


@dataclass
class EngineProcess:
    process: "subprocess.Popen[bytes]"
    log: Path
    url: str = ""

    def wait_for(self, words: str, seconds: float) -> str:
        """Return the line that has the words, once it is there."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            found = [line for line in self.log.read_text(errors="replace").splitlines() if words in line]
            if found:
                return found[0]
            assert self.process.poll() is None, self.log.read_text(errors="replace")[-3000:]
            time.sleep(0.05)
        raise AssertionError(f"{words!r} did not come: {self.log.read_text(errors='replace')[-3000:]}")

    def stop(self, how: signal.Signals) -> int:
        self.process.send_signal(how)
        return self.process.wait(timeout=60)


@contextmanager
def engine_process(
    engine: str, source: Path, folder: Path, *, python: str = "", port: int = 0, **environment: str
) -> Iterator[EngineProcess]:
    """Start it; temporary files lie below ``folder``."""
    temporary = folder / "tmp"
    temporary.mkdir()
    log = folder / "engine.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", CODE, engine, str(source), str(port), python],
            stdout=output,
            stderr=output,
            env={**os.environ, "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1", **environment},
        )
        try:
            yield EngineProcess(process, log)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait(timeout=60)
