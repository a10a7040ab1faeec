"""Contenders that take turns: each is a process of its own, so what is compared is measured within seconds."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

READY = "ready"  # before each answer: a contender prints other things, too
PAUSE_SECONDS = 0.05  # the threads of the one before have gone to sleep


def take_turns(work: Callable[..., Any]) -> None:
    """Do the work in this process once for each line of the standard input, a JSON list of its arguments."""
    print(READY, "null", flush=True)
    for line in sys.stdin:
        print(READY, json.dumps(work(*json.loads(line))), flush=True)


class Contender:
    """A process that takes turns; leaving the context ends it."""

    def __init__(self, log: Path, script: str, *words: str | Path) -> None:
        """Start a script that calls :func:`take_turns`; ``log`` gets its standard error."""
        self._log, self._command = log, [sys.executable, script, *map(str, words)]
        with log.open("w") as file:
            self._child = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True
            )

    def __enter__(self) -> "Contender":
        return self

    def __exit__(self, *error: object) -> None:
        self._child.communicate()

    def wait_until_ready(self) -> None:
        """Wait until it has loaded and compiled; several may do so at a time."""
        self._answer()

    def turn(self, *arguments: Any) -> Any:
        """Let it work, and return what the work returns."""
        time.sleep(PAUSE_SECONDS)
        with suppress(BrokenPipeError):  # it has died, which its answer will tell
            print(json.dumps(arguments), file=self._child.stdin, flush=True)
        return self._answer()

    def _answer(self) -> Any:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            if line.startswith(READY):
                return json.loads(line.removeprefix(READY))
        sys.exit(f"{' '.join(self._command)} failed:\n{self._log.read_text()[-3000:]}")
