"""The curves of a training run, out of its ``metrics.jsonl``."""

from collections.abc import Sequence
from itertools import count, takewhile
from typing import Any

from tiny_lm.evaluation.plots import SMOOTH_FROM, curve_of, smooth
from tiny_lm.evaluation.report.charts import Chart, Curve, Line, draw, envelope, thin

_MOST_EPOCHS = 5
"""Ends of epochs that are marked; more would hide the curves."""
_MOST_MARKS = 40
"""Validations that are marked."""


def training_charts(events: Sequence[dict[str, Any]], epoch: float | None = None) -> list[Chart]:
    """Return the charts of losses, learning rate, gradient norm and speed that the events allow.

    Args:
        events: of ``metrics.jsonl``.
        epoch: optimizer steps in which the training text is read once; at the next ones the loss of training falls,
            since it knows the text, and so they are marked.
    """
    train, val = curve_of(events, "train_loss"), curve_of(events, "val_loss")
    validation = Line("validation", thin(val), "val", marks=len(val) <= _MOST_MARKS)
    losses = [*_noisy("training", train), validation]
    norms, speeds = curve_of(events, "grad_norm"), curve_of(events, "tokens_per_sec")
    charts = [
        draw("loss", "Loss", "nats per token", losses, log=True, events=_epochs(train, epoch), large=True),
        draw("lr", "Learning rate", "", [Line("learning rate", thin(curve_of(events, "lr")))], from_zero=True),
        draw("norm", "Gradient norm", "", _noisy("gradient norm", norms), log=True),
        draw("speed", "Speed", "tokens/s", _noisy("tokens/s", speeds), from_zero=True),
    ]
    return [chart for chart in charts if chart]


def _noisy(name: str, curve: Curve) -> list[Line]:
    """Return the lines of what jumps from step to step: all of it palely, so that spikes show, and its course."""
    if len(curve) < SMOOTH_FROM:
        return [Line(name, curve)]
    return [Line(f"{name}, each step logged", envelope(curve), "pale"), Line(f"{name}, smoothed", smooth(thin(curve)))]


def _epochs(train: Curve, epoch: float | None) -> list[tuple[float, str]]:
    """Return the step at which each reading of the training text ended, where there are few, and its name."""
    last = train[-1][0] if train else 0
    if not epoch or epoch < 0 or last / epoch > _MOST_EPOCHS:
        return []
    ends = takewhile(lambda end: end < last, (epoch * number for number in count(1)))
    names = ["text read once", "twice"]
    return [(end, names[place] if place < 2 else f"{place + 1} times") for place, end in enumerate(ends)]
