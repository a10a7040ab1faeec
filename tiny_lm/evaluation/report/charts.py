"""Line charts as inline SVG: the geometry is computed here, drawn by ``chart.html``.

Places are in per cent of the plot, from left and top, so that a chart takes any width while its text and strokes keep
their size. Paths are drawn in a box of 1000 x 1000 that is stretched to the plot.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from statistics import median
from typing import Literal

from tiny_lm.pages.text import number

Curve = list[tuple[int, float]]

_MOST_POINTS = 400  # of a curve in the page, whatever the run's length
_LOG_DIGITS = ((1, 1.2, 1.5, 1.8, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8), (1, 1.5, 2, 3, 4, 5, 7), (1, 2, 5), (1,))
_CLOSEST = {True: 7.0, False: 12.0}  # per cent between two labels of the upright axis, in a large and a small chart


_LARGEST = 1e100
"""Points beyond it are left out: only a damaged file holds them, and a scale over them would overflow."""


@dataclass(frozen=True)
class Line:
    """One curve of a chart."""

    name: str
    curve: Curve
    style: Literal["main", "pale", "val"] = "main"
    marks: bool = False
    """Whether each point is marked: for few ones."""


@dataclass(frozen=True)
class DrawnLine:
    """A curve as the page draws it."""

    name: str
    style: str
    path: str
    marks: list[tuple[float, float, str]]
    """Place and title of each mark."""


@dataclass(frozen=True)
class Chart:
    """A chart as the page draws it."""

    key: str
    title: str
    unit: str
    x_name: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    lines: list[DrawnLine]
    events: list[tuple[float, str]]
    """Place from the left, and name, of what happened at a moment."""
    data: dict[str, object]
    """For the script that reads values off: by line, its points with their place from the left and from the top."""
    summary: str
    """What a reader who does not see the chart is told."""
    large: bool


@dataclass(frozen=True)
class Scale:
    """A mapping of values onto 0 to 1, linear or logarithmic."""

    low: float
    high: float
    log: bool = False

    def place(self, value: float) -> float:
        """Return where ``value`` lies between both ends."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self, most: int = 6) -> list[float]:
        """Return round values inside, at least two where there are any."""
        if self.log:
            powers = range(math.floor(math.log10(self.low)) - 1, math.ceil(math.log10(self.high)) + 1)
            for digits in _LOG_DIGITS:
                ticks = [digit * 10.0**power for power in powers for digit in digits]
                ticks = [tick for tick in ticks if self.low <= tick <= self.high]
                if 2 <= len(ticks) <= most + 2:
                    return ticks
            if len(ticks) > most:  # more powers of ten than the axis has room for
                return ticks[:: math.ceil(len(ticks) / most)]
        rough = (self.high - self.low) / (most - 1)
        size = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * size for factor in (1, 2, 2.5, 5, 10) if factor * size >= rough * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        count = math.floor(self.high / step + 1e-9) - first + 1
        return [round((first + index) * step, 12) for index in range(count)]


def thin(curve: Curve, most: int = _MOST_POINTS) -> Curve:
    """Return at most ``most`` points, each the median of its neighbourhood."""
    return [(points[len(points) // 2][0], median(value for _, value in points)) for points in _buckets(curve, most)]


def envelope(curve: Curve, most: int = _MOST_POINTS) -> Curve:
    """Return at most ``most`` points that keep the lowest and the highest value of each neighbourhood: spikes stay."""
    if len(curve) <= most:
        return curve
    kept = []
    for points in _buckets(curve, most // 2):
        ends = {min(points, key=lambda point: point[1]), max(points, key=lambda point: point[1])}
        kept += sorted(ends)
    return kept


def _buckets(curve: Curve, most: int) -> list[Curve]:
    size = max(len(curve) / most, 1.0)
    numbered = groupby(enumerate(curve), key=lambda item: int(item[0] / size))
    return [[point for _, point in group] for _, group in numbered]


def draw(
    key: str,
    title: str,
    unit: str,
    lines: Sequence[Line],
    *,
    x_name: str = "optimizer step",
    events: Sequence[tuple[float, str]] = (),
    log_x: bool = False,
    log: bool = False,
    from_zero: bool = False,
    large: bool = False,
) -> Chart | None:
    """Lay out a chart.

    Args:
        key: by which the page knows it.
        title: what is drawn.
        unit: of the values.
        lines: at least one with points, or there is no chart.
        x_name: what runs along the horizontal axis.
        events: moments on that axis that explain the curves, with their names; those outside it are left out.
        log_x: a logarithmic horizontal axis, where all steps are positive.
        log: a logarithmic vertical axis, where all values are positive.
        from_zero: the vertical axis begins at 0.
        large: as wide as the page, and higher.
    """
    drawable = ((line, [point for point in line.curve if max(map(abs, point)) < _LARGEST]) for line in lines)
    lines = [replace(line, curve=curve) for line, curve in drawable if curve]
    if not lines:
        return None
    steps = [step for line in lines for step, _ in line.curve]
    values = [value for line in lines for _, value in line.curve]
    x = _x_scale(min(steps), max(steps), log_x and min(steps) > 1 / _LARGEST)
    y = _y_scale(min(values), max(values), log and min(values) > 1 / _LARGEST, from_zero)
    return Chart(
        key=key,
        title=title,
        unit=unit,
        x_name=x_name,
        x_ticks=[(100 * x.place(tick), _step_label(tick, x)) for tick in x.ticks() if float(tick).is_integer()],
        y_ticks=_labels(y, _CLOSEST[large]),
        lines=[_draw_line(line, x, y, x_name) for line in lines],
        events=[(100 * x.place(at), name) for at, name in events if x.low < at < x.high],
        data={
            "x": x_name,
            "lines": [
                {
                    "name": line.name,
                    "style": line.style,
                    "points": [_point(step, value, x, y) for step, value in line.curve],
                }
                for line in lines
            ],
        },
        summary="; ".join(_summarize(line, x_name) for line in lines),
        large=large,
    )


def _x_scale(low: float, high: float, log: bool) -> Scale:
    return Scale(low, high, log) if high > low else Scale(low - 1, high + 1)


def _y_scale(low: float, high: float, log: bool, from_zero: bool) -> Scale:
    """Return a scale with some air above and below."""
    if log:
        air = (high / low) ** 0.06 if high > low else 1.2
        return Scale(low / air, high * air, log=True)
    low = min(low, 0.0) if from_zero else low
    air = 0.06 * (high - low) or abs(high) * 0.2 or 1.0
    return Scale(low if from_zero and low == 0 else low - air, high + air)


def _step_label(tick: float, x: Scale) -> str:
    """Return a step as the axis writes it: in thousands, or millions, where whole numbers would touch each other."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if tick and x.high >= 10 * size:
            return f"{tick / size:,g}{unit}"
    return f"{tick:,.0f}"


def _labels(y: Scale, closest: float) -> list[tuple[float, str]]:
    """Return place and text of the marks of a vertical axis, without those that would overlap."""
    labels: list[tuple[float, str]] = []
    for tick in y.ticks():
        top = _top(y, tick)
        if not labels or abs(labels[-1][0] - top) >= closest:
            labels.append((top, number(tick)))
    return labels


def _top(y: Scale, value: float) -> float:
    return 100 * (1 - y.place(value))


def _point(step: int, value: float, x: Scale, y: Scale) -> list[float]:
    return [step, float(f"{value:.5g}"), round(100 * x.place(step), 2), round(_top(y, value), 2)]


def _draw_line(line: Line, x: Scale, y: Scale, x_name: str) -> DrawnLine:
    places = [(1000 * x.place(step), 10 * _top(y, value)) for step, value in line.curve]
    marks = [
        (left / 10, top / 10, f"{line.name} {number(value, 4)} at {x_name} {step:,}")
        for (left, top), (step, value) in zip(places, line.curve, strict=True)
    ]
    path = "M" + "L".join(f"{left:.1f} {top:.1f}" for left, top in places)
    is_point = len(line.curve) == 1
    return DrawnLine(line.name, line.style, path, marks if line.marks or is_point else [])


def _summarize(line: Line, x_name: str) -> str:
    (first, begin), (last, end) = line.curve[0], line.curve[-1]
    return f"{line.name} from {number(begin, 4)} at {x_name} {first:,} to {number(end, 4)} at {last:,}"
