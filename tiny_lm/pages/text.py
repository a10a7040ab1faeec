"""Formatting of text and numbers for pages."""

import math
import sys

from tiny_lm.console import visible

__all__ = ["duration", "fixed", "number", "percent", "short", "spoken", "visible"]


def _is_finite(value: float) -> bool:
    """Return whether a number fits into a float; a damaged file may contain larger integers."""
    return abs(value) <= sys.float_info.max


def number(value: float | None, digits: int = 3) -> str:
    """Format a number with ``digits`` significant digits or, from 1,000 on, as an integer."""
    if value is None or not _is_finite(value):
        return "–"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    text = f"{value:.{digits}g}"
    if "e" in text and 1e-6 < abs(value) < 1e6:
        text = f"{value:.10f}".rstrip("0").rstrip(".")[: 9 + digits] if abs(value) < 1 else f"{value:.0f}"
    return text


def fixed(value: float | None, places: int) -> str:
    """Format a number with a fixed number of decimal places."""
    return "–" if value is None or not _is_finite(value) else f"{value:,.{places}f}"


def short(value: float | None) -> str:
    """Format a count with three digits and a unit: 6.79M."""
    if value is None or not _is_finite(value):
        return "–"
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= 0.9995 * size:
            scaled = value / size
            return f"{scaled:.{max(0, 2 - int(math.log10(max(abs(scaled), 1))))}f}{unit}"
    return f"{value:.0f}"


def spoken(value: float | None) -> str:
    """Format a count in words: 6.8 million."""
    if value is None or not _is_finite(value):
        return "–"
    for word, size in (("billion", 1e9), ("million", 1e6)):
        if value >= size:
            return f"{value / size:.3g} {word}"
    return f"{value:,.0f}"


def duration(seconds: float | None) -> str:
    """Format a duration in its two largest units: 4 min 12 s."""
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
    """Format a share in percent; small values are not rounded to 0."""
    if share is None or not _is_finite(share):
        return "–"
    smallest = 10.0**-places
    return f"<{smallest:g}%" if 0 < 100 * share < smallest / 2 else f"{100 * share:.{places}f}%"
