"""Ending a text at a stop string, wherever token borders fall."""

from collections.abc import Sequence

from tiny_lm.errors import UserError

MOST = 16
"""So many stop strings at most."""

LONGEST = 256
"""Characters of a stop string at most."""


class StopStrings:
    """Passes text on as it comes and ends it before the first stop string.

    What could be the beginning of a stop string is held back until it turns out to be one or not.

    Attributes:
        found: whether a stop string has come.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """Look for any of ``stops``.

        Raises:
            UserError: one is empty or too long, or there are too many.
        """
        if len(stops) > MOST:
            raise UserError(f"{len(stops)} stop strings are too many: at most {MOST}")
        for stop in stops:
            if not 0 < len(stop) <= LONGEST:
                raise UserError(f"a stop string must have 1 to {LONGEST} characters (one has {len(stop)})")
        self._stops = stops
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """Take the next piece of text and return what is certain to stand before any stop string."""
        if self.found:
            return ""
        self._held += text
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            self.found = True
            ready, self._held = self._held[: min(places)], ""
            return ready
        cut = len(self._held) - max((self._begun(stop) for stop in self._stops), default=0)
        ready, self._held = self._held[:cut], self._held[cut:]
        return ready

    def flush(self) -> str:
        """End the text: return what was held back."""
        held, self._held = self._held, ""
        return held

    def _begun(self, stop: str) -> int:
        """Return the length of the longest beginning of ``stop`` that the held text ends with."""
        most = min(len(stop) - 1, len(self._held))
        return next((length for length in range(most, 0, -1) if self._held.endswith(stop[:length])), 0)
