"""The curves of a training run, out of its ``metrics.jsonl``."""

from collections.abc import Sequence
from typing import Any

from tiny_lm.evaluation.plots import SMOOTH_FROM, curve_of, smooth
from tiny_lm.evaluation.report.charts import Chart, Line, draw, envelope, thin


def training_charts(events: Sequence[dict[str, Any]]) -> list[Chart]:
    """Return the charts of losses, learning rate, gradient norm and speed that the events allow."""
    train, val = curve_of(events, "train_loss"), curve_of(events, "val_loss")
    is_long = len(train) >= SMOOTH_FROM
    losses = [
        Line("training, each step logged", envelope(train), "pale") if is_long else Line("training", train),
        Line("training, smoothed", smooth(thin(train)) if is_long else []),
        Line("validation", thin(val), "val", marks=len(val) <= 60),
    ]
    speed = curve_of(events, "tokens_per_sec")
    charts = [
        draw("loss", "Loss", "nats per token", losses, log=True),
        draw("lr", "Learning rate", "", [Line("learning rate", thin(curve_of(events, "lr")))], from_zero=True),
        draw("norm", "Gradient norm", "", [Line("gradient norm", envelope(curve_of(events, "grad_norm")))], log=True),
        draw("speed", "Speed", "tokens/s", [Line("tokens/s", envelope(speed))], from_zero=True),
    ]
    return [chart for chart in charts if chart]
