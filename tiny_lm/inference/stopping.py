"""Ending a text at a stop string, wherever token boundaries fall."""

from collections.abc import Sequence

from tiny_lm.errors import UserError

MAX_STOP_STRINGS = 16

MAX_STOP_LENGTH = 256
"""In characters."""


class StopStrings:
    """Passes streamed text through and ends it before the first stop string.

    Text that may be the start of a stop string is held back until it is known whether it is one.

    Attributes:
        found: whether a stop string has occurred.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """Look for any of ``stops``.

        Raises:
            UserError: one is empty or too long, or there are too many.
        """
        if len(stops) > MAX_STOP_STRINGS:
            raise UserError(f"{len(stops)} stop strings are too many: at most {MAX_STOP_STRINGS}")
        for stop in stops:
            if not 0 < len(stop) <= MAX_STOP_LENGTH:
                raise UserError(f"a stop string must have 1 to {MAX_STOP_LENGTH} characters (one has {len(stop)})")
        self._stops = stops
        self._pending = ""
        self.found = False

    def feed(self, text: str) -> str:
        """Add the next chunk of text and return what certainly comes before any stop string."""
        if self.found:
            return ""
        self._pending += text
        indices = [index for stop in self._stops if (index := self._pending.find(stop)) >= 0]
        if indices:
            self.found = True
            ready, self._pending = self._pending[: min(indices)], ""
            return ready
        cut = len(self._pending) - max((self._partial_match(stop) for stop in self._stops), default=0)
        ready, self._pending = self._pending[:cut], self._pending[cut:]
        return ready

    def flush(self) -> str:
        """Return what was held back, at the end of the text."""
        pending, self._pending = self._pending, ""
        return pending

    def _partial_match(self, stop: str) -> int:
        """Return the length of the longest prefix of ``stop`` that the pending text ends with."""
        longest = min(len(stop) - 1, len(self._pending))
        return next((length for length in range(longest, 0, -1) if self._pending.endswith(stop[:length])), 0)
