"""Charts of a training run, from its ``metrics.jsonl``."""

from collections.abc import Sequence
from itertools import count, takewhile
from typing import Any

from tiny_lm.evaluation.plots import SMOOTH_FROM, curve_of, smooth
from tiny_lm.evaluation.report.charts import Chart, Curve, Line, build_chart, envelope, thin

_MAX_EPOCHS = 5
"""With more epochs, their ends are not marked: they would hide the curves."""
_MAX_MARKS = 40
"""With more validations, they are not marked."""


def training_charts(events: Sequence[dict[str, Any]], epoch: float | None = None) -> list[Chart]:
    """Build the charts of losses, learning rate, gradient norm and speed for which there are records.

    Args:
        events: records of ``metrics.jsonl``.
        epoch: optimizer steps per epoch; the ends of epochs are marked, since the training loss drops there.
    """
    train, val = curve_of(events, "train_loss"), curve_of(events, "val_loss")
    validation = Line("validation", thin(val), "val", marks=len(val) <= _MAX_MARKS)
    losses = [*_noisy("training", train), validation]
    norms, speeds = curve_of(events, "grad_norm"), curve_of(events, "tokens_per_sec")
    charts = [
        build_chart("loss", "Loss", "nats per token", losses, log=True, events=_epochs(train, epoch), large=True),
        build_chart("lr", "Learning rate", "", [Line("learning rate", thin(curve_of(events, "lr")))], from_zero=True),
        build_chart("norm", "Gradient norm", "", _noisy("gradient norm", norms), log=True),
        build_chart("speed", "Speed", "tokens/s", _noisy("tokens/s", speeds), from_zero=True),
    ]
    return [chart for chart in charts if chart]


def _noisy(name: str, curve: Curve) -> list[Line]:
    """Return the lines of a noisy metric: all values in a pale color, so that spikes show, and the smoothed curve."""
    if len(curve) < SMOOTH_FROM:
        return [Line(name, curve)]
    return [Line(f"{name}, each step logged", envelope(curve), "pale"), Line(f"{name}, smoothed", smooth(thin(curve)))]


def _epochs(train: Curve, epoch: float | None) -> list[tuple[float, str]]:
    """Return the last step and the name of each epoch, if there are few."""
    last = train[-1][0] if train else 0
    if not epoch or epoch < 0 or last / epoch > _MAX_EPOCHS:
        return []
    ends = takewhile(lambda end: end < last, (epoch * number for number in count(1)))
    return [(end, f"epoch {index}") for index, end in enumerate(ends, start=1)]
