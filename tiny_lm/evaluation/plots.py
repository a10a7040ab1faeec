"""Plots of a run, and of several runs side by side (PNG, by matplotlib)."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from tiny_lm.files import atomic_path
from tiny_lm.runs import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PALE, _TRAIN, _VAL = "#b9c9dd", "#2f5d8c", "#c2410c"
SMOOTH_FROM = 40
"""Curves of at least this many points are smoothed: a running median over 1/40 of the curve on either side."""

Curve = list[tuple[int, float]]


def plot_run(run: Run, events: Sequence[dict[str, Any]]) -> list[Path]:
    """Write ``plots/loss.png``, and ``plots/training.png`` with learning rate, gradient norm and speed.

    Args:
        run: the run folder.
        events: records of its ``metrics.jsonl``.

    Returns:
        the files; empty if no training loss has been logged yet.
    """
    if not curve_of(events, "train_loss"):
        return []
    figures = {"loss": _plot_loss(run, events), "training": _plot_training(run, events)}
    return [_save(figure, run.plots / f"{name}.png") for name, figure in figures.items()]


def compare_runs(
    curves: Mapping[str, Sequence[dict[str, Any]]], bits_per_byte: Mapping[str, float], path: Path
) -> Path:
    """Plot several runs together: validation loss over tokens seen, and bits per byte of the whole stream.

    Args:
        curves: records of each run's ``metrics.jsonl``, by run name.
        bits_per_byte: of the evaluations, by run name.
        path: the PNG to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5 + 0.35 * len(curves)), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=[4, 0.6 + 0.4 * len(curves)])
    colors = {name: f"C{number % 10}" for number, name in enumerate(curves)}  # matplotlib's color cycle
    for name, events in curves.items():
        points = [(event["tokens"], event["val_loss"]) for event in events if {"tokens", "val_loss"} <= event.keys()]
        _line(above, [point for point in points if None not in point], color=colors[name], linewidth=1.6)
    above.set_yscale("log")
    _label_log(above)
    above.set_xlabel("training tokens seen")
    above.xaxis.set_major_formatter(_tokens_formatter())
    above.set_ylabel("validation loss (nats per token)")
    _style_axes(above, "")
    bars = below.barh(list(map(_escape, curves)), list(bits_per_byte.values()), color=list(colors.values()), height=0.6)
    below.bar_label(bars, fmt="%.4f", padding=4)
    below.invert_yaxis()  # the first run on top
    below.margins(x=0.12)
    below.set_xlabel("bits per byte of the validation stream (compares across tokenizers)")
    _style_axes(below, "")
    return _save(figure, path)


def _tokens_formatter() -> Any:
    from matplotlib.ticker import EngFormatter

    return EngFormatter(sep="")


def _escape(name: str) -> str:
    """Escape a name, which matplotlib would otherwise read as math."""
    return name.replace("$", r"\$")


def curve_of(events: Sequence[dict[str, Any]], key: str) -> Curve:
    """Return (step, value) of the records with a finite number under ``key``, sorted by step."""
    numbers = {
        event["step"]: float(event[key])
        for event in events
        if type(event.get(key)) in (int, float) and math.isfinite(event[key])
    }
    return sorted(numbers.items())


def _plot_loss(run: Run, events: Sequence[dict[str, Any]]) -> "Figure":
    """Plot every logged training loss in a pale color, so that spikes show, the smoothed curve, and the validations."""
    from matplotlib.figure import Figure

    train, val = curve_of(events, "train_loss"), curve_of(events, "val_loss")
    figure = Figure(figsize=(8, 4.5), layout="constrained")  # not pyplot, which may change the caller's backend
    axes = figure.subplots()
    _line(axes, train, color=_PALE if len(train) >= SMOOTH_FROM else _TRAIN, linewidth=1.2, label="training")
    if len(train) >= SMOOTH_FROM:
        _line(axes, smooth(train), color=_TRAIN, linewidth=1.8, label="training, smoothed")
    if val:
        _line(axes, val, color=_VAL, linewidth=1.5, marker="o", markersize=4, label="validation")
        step, loss = min(val, key=lambda point: point[1])
        axes.annotate(
            f"{loss:.3f}", (step, loss), xytext=(0, -6), textcoords="offset points", ha="center", va="top", color=_VAL
        )
    axes.set_yscale("log")  # on a linear scale the first steps flatten the rest
    axes.margins(y=0.12)
    _label_log(axes)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per token)")
    axes.legend(frameon=False)
    _style_axes(axes, run.name)
    return figure


def _plot_training(run: Run, events: Sequence[dict[str, Any]]) -> "Figure":
    """Plot learning rate, gradient norm and speed in stacked panels that share the x axis."""
    from matplotlib.figure import Figure

    panels = {"lr": "learning rate", "grad_norm": "gradient norm", "tokens_per_sec": "tokens per second"}
    figure = Figure(figsize=(8, 7), layout="constrained")
    rows = figure.subplots(len(panels), 1, sharex=True)
    for axes, (key, label) in zip(rows, panels.items(), strict=True):
        _line(axes, curve_of(events, key), color=_TRAIN, linewidth=1.2)
        axes.set_ylabel(label)
        if key == "grad_norm" and any(norm > 0 for _, norm in curve_of(events, key)):
            axes.set_yscale("log")
            _label_log(axes)
        else:
            axes.set_ylim(bottom=0)
        if key == "tokens_per_sec":
            axes.yaxis.set_major_formatter("{x:,.0f}")
        _style_axes(axes, run.name if key == "lr" else "")
    rows[-1].set_xlabel("optimizer step")
    return figure


def _line(axes: "Axes", curve: Curve, **style: Any) -> None:
    """Plot a curve, with markers if it has few points: a single point makes no line."""
    marker = {"marker": "o", "markersize": 3} if len(curve) < 20 else {}
    axes.plot([step for step, _ in curve], [value for _, value in curve], **{**marker, **style})


def _label_log(axes: "Axes") -> None:
    """Label a logarithmic axis with plain numbers, also between powers of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7), numticks=12))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def smooth(curve: Curve) -> Curve:
    """Return a running median with symmetric neighborhoods, which neither spikes nor slopes shift."""
    smoothed = []
    for index, (step, _) in enumerate(curve):
        reach = min(len(curve) // SMOOTH_FROM, index, len(curve) - 1 - index)
        neighbors = [value for _, value in curve[index - reach : index + reach + 1]]
        smoothed.append((step, median(neighbors)))
    return smoothed


def _style_axes(axes: "Axes", title: str) -> None:
    axes.set_title(title, loc="left", parse_math=False)  # a name may contain a dollar sign
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: "Figure", path: Path) -> Path:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    return path
