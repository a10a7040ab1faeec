"""Text and numbers as a page shows them: whatever a story, a name or a prompt holds."""

import math
import sys

from tiny_lm.console import visible

__all__ = ["duration", "fixed", "number", "percent", "short", "spoken", "visible"]


def _is_finite(value: float) -> bool:
    """Return whether a page can show a number; a damaged file may hold an integer that no float can."""
    return abs(value) <= sys.float_info.max


def number(value: float | None, digits: int = 3) -> str:
    """Return a number in ``digits`` digits or, from 1,000 on, without fractions."""
    if value is None or not _is_finite(value):
        return "–"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    text = f"{value:.{digits}g}"
    if "e" in text and 1e-6 < abs(value) < 1e6:
        text = f"{value:.10f}".rstrip("0").rstrip(".")[: 9 + digits] if abs(value) < 1 else f"{value:.0f}"
    return text


def fixed(value: float | None, places: int) -> str:
    """Return a number with so many places."""
    return "–" if value is None or not _is_finite(value) else f"{value:,.{places}f}"


def short(value: float | None) -> str:
    """Return a count in three digits and its unit: 6.79M."""
    if value is None or not _is_finite(value):
        return "–"
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= 0.9995 * size:
            scaled = value / size
            return f"{scaled:.{max(0, 2 - int(math.log10(max(abs(scaled), 1))))}f}{unit}"
    return f"{value:.0f}"


def spoken(value: float | None) -> str:
    """Return a count as one says it: 6.8 million."""
    if value is None or not _is_finite(value):
        return "–"
    for word, size in (("billion", 1e9), ("million", 1e6)):
        if value >= size:
            return f"{value / size:.3g} {word}"
    return f"{value:,.0f}"


def duration(seconds: float | None) -> str:
    """Return a time in its two largest units: 4 min 12 s."""
    if seconds is None or not _is_finite(seconds):
        return "–"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    for (name, size), (smaller, part) in (
        (("d", 86_400), ("h", 3600)),
        (("h", 3600), ("min", 60)),
        (("min", 60), ("s", 1)),
    ):
        if whole >= size:
            rest = whole % size // part
            text = f"{whole // size} {name} {rest} {smaller}" if rest else f"{whole // size} {name}"
            return text.replace(" ", "\N{NO-BREAK SPACE}")
    return f"{whole} s"


def percent(share: float | None, places: int = 0) -> str:
    """Return a share in per cent; a small one is not 0."""
    if share is None or not _is_finite(share):
        return "–"
    smallest = 10.0**-places
    return f"<{smallest:g}%" if 0 < 100 * share < smallest / 2 else f"{100 * share:.{places}f}%"
