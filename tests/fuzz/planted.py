"""Readers with a fault each on any file that was changed: test_fuzz_harness.py sees them reported."""

import os
import time
from collections.abc import Callable
from pathlib import Path

from readers import Reader

from tiny_lm.errors import UserError

WHOLE = "The content of a file that no fault is planted for.\n" * 8
kept = []


def _crash() -> None:
    raise KeyError("planted")


def _die() -> None:
    os._exit(7)


def _hang() -> None:
    while True:
        time.sleep(0.01)


def _grow() -> None:
    kept.append(bytearray(3 * 2**29))


def _explain_in_lines() -> None:
    raise UserError("one\ntwo")


def _explain() -> None:
    raise UserError("one line")


def _faulty(fault: Callable[[], None]) -> Reader:
    def read(path: Path) -> None:
        if path.read_bytes() != WHOLE.encode():
            fault()

    return Reader(("a.txt",), lambda _: read, "binary", seconds=1.5)


READERS = {
    "crash": _faulty(_crash),
    "death": _faulty(_die),
    "hang": _faulty(_hang),
    "growth": _faulty(_grow),
    "lines": _faulty(_explain_in_lines),
    "sound": _faulty(_explain),
}
