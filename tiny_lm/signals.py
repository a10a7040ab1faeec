"""Terminating signals as exceptions, so that temporary files are removed.

SIGUSR1 is one of them: SLURM can send it as a warning before the time limit (``--signal=USR1@120``).
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
        """Set the exit code to 128 + the signal's number."""
        super().__init__(128 + number)
        self.name = signal.Signals(number).name


def is_handled_elsewhere(number: int) -> bool:
    """Return whether a signal is ignored or has a foreign handler."""
    return signal.getsignal(number) not in (signal.SIG_DFL, _terminate)


@contextmanager
def signals_as_exceptions() -> Iterator[None]:
    """Raise :class:`Terminated` on one of ``TERMINATING_SIGNALS`` while the block runs.

    A second signal kills the process immediately. Signals that are ignored (nohup) or already handled are left alone.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()  # only it can set handlers
    handled = [
        number for number in TERMINATING_SIGNALS if in_main_thread and signal.getsignal(number) == signal.SIG_DFL
    ]
    for number in handled:
        signal.signal(number, _terminate)
    try:
        yield
    finally:
        for number in handled:
            if signal.getsignal(number) == _terminate:
                signal.signal(number, signal.SIG_DFL)


def _terminate(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)
    raise Terminated(number)
