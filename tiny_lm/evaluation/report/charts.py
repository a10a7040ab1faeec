"""Line charts as inline SVG: the geometry is computed here, rendered by the macro ``chart``.

Positions are in percent of the plot, from left and top, so that a chart takes any width while text and strokes keep
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

_MAX_POINTS = 400  # per curve, however long the run
_LOG_DIGITS = ((1, 1.2, 1.5, 1.8, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8), (1, 1.5, 2, 3, 4, 5, 7), (1, 2, 5), (1,))
_MIN_DISTANCE = {True: 7.0, False: 12.0}  # percent between two labels of the y axis, in a large and a small chart

_MAX_VALUE = 1e100
"""Larger values are dropped: only a damaged file has them, and they would overflow the scale."""


@dataclass(frozen=True)
class Line:
    """One curve of a chart."""

    name: str
    curve: Curve
    style: Literal["main", "pale", "val"] = "main"
    marks: bool = False
    """Whether to mark each point; for curves of few points."""


@dataclass(frozen=True)
class ChartLine:
    """A curve as the page renders it."""

    name: str
    style: str
    path: str
    marks: list[tuple[float, float, str]]
    """Position and title of each mark."""


@dataclass(frozen=True)
class Chart:
    """A chart as the page renders it."""

    key: str
    title: str
    unit: str
    x_name: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    lines: list[ChartLine]
    events: list[tuple[float, str]]
    """Position from the left and name of each event."""
    data: dict[str, object]
    """For the script that shows values: each line's points with their positions from left and top."""
    summary: str
    """Text alternative for screen readers."""
    large: bool


@dataclass(frozen=True)
class Scale:
    """A mapping of values onto 0 to 1, linear or logarithmic."""

    low: float
    high: float
    log: bool = False

    def position(self, value: float) -> float:
        """Return where ``value`` lies between ``low`` (0) and ``high`` (1)."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self, max_ticks: int = 6) -> list[float]:
        """Return round values within the scale, at least two if there are any."""
        if self.log:
            powers = range(math.floor(math.log10(self.low)) - 1, math.ceil(math.log10(self.high)) + 1)
            for digits in _LOG_DIGITS:
                ticks = [digit * 10.0**power for power in powers for digit in digits]
                ticks = [tick for tick in ticks if self.low <= tick <= self.high]
                if 2 <= len(ticks) <= max_ticks + 2:
                    return ticks
            if len(ticks) > max_ticks:  # too many powers of ten for the axis
                return ticks[:: math.ceil(len(ticks) / max_ticks)]
        rough = (self.high - self.low) / (max_ticks - 1)
        size = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * size for factor in (1, 2, 2.5, 5, 10) if factor * size >= rough * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        count = math.floor(self.high / step + 1e-9) - first + 1
        return [round((first + index) * step, 12) for index in range(count)]


def thin(curve: Curve, max_points: int = _MAX_POINTS) -> Curve:
    """Downsample to at most ``max_points`` points, each the median of its bucket."""
    return [
        (points[len(points) // 2][0], median(value for _, value in points)) for points in _buckets(curve, max_points)
    ]


def envelope(curve: Curve, max_points: int = _MAX_POINTS) -> Curve:
    """Downsample to at most ``max_points`` points: the minimum and maximum of each bucket, so that spikes stay."""
    if len(curve) <= max_points:
        return curve
    kept = []
    for points in _buckets(curve, max_points // 2):
        ends = {min(points, key=lambda point: point[1]), max(points, key=lambda point: point[1])}
        kept += sorted(ends)
    return kept


def _buckets(curve: Curve, max_buckets: int) -> list[Curve]:
    size = max(len(curve) / max_buckets, 1.0)
    numbered = groupby(enumerate(curve), key=lambda item: int(item[0] / size))
    return [[point for _, point in group] for _, group in numbered]


def build_chart(
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
    """Lay out a chart; None if no line has points.

    Args:
        key: identifies the chart in the page.
        title: the title.
        unit: unit of the values.
        lines: the curves.
        x_name: name of the x axis.
        events: named positions on the x axis that explain the curves; those outside the axis are dropped.
        log_x: logarithmic x axis, if all steps are positive.
        log: logarithmic y axis, if all values are positive.
        from_zero: start the y axis at 0.
        large: full width, and taller.
    """
    drawable = ((line, [point for point in line.curve if max(map(abs, point)) < _MAX_VALUE]) for line in lines)
    lines = [replace(line, curve=curve) for line, curve in drawable if curve]
    if not lines:
        return None
    steps = [step for line in lines for step, _ in line.curve]
    values = [value for line in lines for _, value in line.curve]
    x = _x_scale(min(steps), max(steps), log_x and min(steps) > 1 / _MAX_VALUE)
    y = _y_scale(min(values), max(values), log and min(values) > 1 / _MAX_VALUE, from_zero)
    return Chart(
        key=key,
        title=title,
        unit=unit,
        x_name=x_name,
        x_ticks=[(100 * x.position(tick), _step_label(tick, x)) for tick in x.ticks() if float(tick).is_integer()],
        y_ticks=_labels(y, _MIN_DISTANCE[large]),
        lines=[_layout_line(line, x, y, x_name) for line in lines],
        events=[(100 * x.position(at), name) for at, name in events if x.low < at < x.high],
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
    """Return a scale with a margin above and below."""
    if log:
        margin = (high / low) ** 0.06 if high > low else 1.2
        return Scale(low / margin, high * margin, log=True)
    low = min(low, 0.0) if from_zero else low
    margin = 0.06 * (high - low) or abs(high) * 0.2 or 1.0
    return Scale(low if from_zero and low == 0 else low - margin, high + margin)


def _step_label(tick: float, x: Scale) -> str:
    """Format a step: in thousands or millions where full numbers would overlap."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if tick and x.high >= 10 * size:
            return f"{tick / size:,g}{unit}"
    return f"{tick:,.0f}"


def _labels(y: Scale, min_distance: float) -> list[tuple[float, str]]:
    """Return positions and labels of the y axis ticks, without those that would overlap."""
    labels: list[tuple[float, str]] = []
    for tick in y.ticks():
        top = _top(y, tick)
        if not labels or abs(labels[-1][0] - top) >= min_distance:
            labels.append((top, number(tick)))
    return labels


def _top(y: Scale, value: float) -> float:
    return 100 * (1 - y.position(value))


def _point(step: int, value: float, x: Scale, y: Scale) -> list[float]:
    return [step, float(f"{value:.5g}"), round(100 * x.position(step), 2), round(_top(y, value), 2)]


def _layout_line(line: Line, x: Scale, y: Scale, x_name: str) -> ChartLine:
    positions = [(1000 * x.position(step), 10 * _top(y, value)) for step, value in line.curve]
    marks = [
        (left / 10, top / 10, f"{line.name} {number(value, 4)} at {x_name} {step:,}")
        for (left, top), (step, value) in zip(positions, line.curve, strict=True)
    ]
    path = "M" + "L".join(f"{left:.1f} {top:.1f}" for left, top in positions)
    is_point = len(line.curve) == 1
    return ChartLine(line.name, line.style, path, marks if line.marks or is_point else [])


def _summarize(line: Line, x_name: str) -> str:
    (first, begin), (last, end) = line.curve[0], line.curve[-1]
    return f"{line.name} from {number(begin, 4)} at {x_name} {first:,} to {number(end, 4)} at {last:,}"
