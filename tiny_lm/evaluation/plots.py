"""Pictures of a run."""

from pathlib import Path
from typing import Any

from tiny_lm.errors import UserError
from tiny_lm.files import atomic_path
from tiny_lm.runs import Run


def plot_loss(run: Run, events: list[dict[str, Any]]) -> Path:
    """Draw training and validation loss over the optimizer steps into ``plots/loss.png``.

    Args:
        run: the run folder.
        events: of its ``metrics.jsonl``.

    Raises:
        UserError: nothing was logged yet.
    """
    from matplotlib.figure import Figure

    train = [(event["step"], event["train_loss"]) for event in events if event.get("train_loss") is not None]
    val = [(event["step"], event["val_loss"]) for event in events if event.get("val_loss") is not None]
    if not train:
        raise UserError(f"{run.metrics}: holds no training loss yet")
    figure = Figure(figsize=(8, 4.5), layout="constrained")  # pyplot would pick, or change, the caller's backend
    axes = figure.subplots()
    axes.plot(*zip(*train, strict=True), color="#9db4d0", linewidth=1.2, label="training")
    if val:
        axes.plot(*zip(*val, strict=True), color="#c2410c", linewidth=2, marker="o", markersize=4, label="validation")
        step, loss = val[-1]
        axes.annotate(f"{loss:.3f}", (step, loss), textcoords="offset points", xytext=(0, 10), ha="center")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(run.name, loc="left")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path = run.plots / "loss.png"
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    return path
