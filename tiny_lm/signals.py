"""Signals that ask a command to end: they end it as an error would, so that its temporary files are removed.

SIGUSR1 is among them since SLURM users have it sent as a warning before the time limit (``--signal=USR1@120``).
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

TERMINATING_SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGTERM", "SIGHUP", "SIGUSR1")
    if hasattr(signal, name)  # Windows has SIGTERM only
)


class Terminated(SystemExit):
    """Raised in the main thread by a signal; ends the process with the code that a shell reports for that signal."""

    def __init__(self, number: int) -> None:
        """Carry the signal's number as the exit code 128 + number."""
        super().__init__(128 + number)
        self.name = signal.Signals(number).name


def is_handled_elsewhere(number: int) -> bool:
    """Whether a signal is ignored, or has a handler that is not ours."""
    return signal.getsignal(number) not in (signal.SIG_DFL, _terminate)


@contextmanager
def signals_as_exceptions() -> Iterator[None]:
    """Raise :class:`Terminated` where one of ``TERMINATING_SIGNALS`` arrives in the block, instead of ending at once.

    A second signal ends the process at once. A signal that is ignored (nohup) stays ignored, and one that somebody
    else handles stays theirs.
    """
    may = threading.current_thread() is threading.main_thread()  # Python lets no other one handle signals
    taken = [number for number in TERMINATING_SIGNALS if may and signal.getsignal(number) == signal.SIG_DFL]
    for number in taken:
        signal.signal(number, _terminate)
    try:
        yield
    finally:
        for number in taken:
            if signal.getsignal(number) == _terminate:
                signal.signal(number, signal.SIG_DFL)


def _terminate(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)
    raise Terminated(number)
