from pathlib import Path
from typing import Any

import pytest

from tiny_lm.evaluation.plots import plot_run
from tiny_lm.runs import Run


def events(count: int) -> list[dict[str, Any]]:
    return [
        {
            "step": step,
            "train_loss": 6.0 / step**0.2,
            "lr": 0.001 * step,
            "grad_norm": 1.0 / step,
            "tokens_per_sec": 5000.0,
            **({"val_loss": 6.1 / step**0.2} if step % 10 == 0 else {}),
        }
        for step in range(1, count + 1)
    ]


def sizes(paths: list[Path]) -> list[tuple[int, int]]:
    from PIL import Image

    found = []
    for path in paths:
        with Image.open(path) as picture:
            colours = picture.convert("RGB").getcolors(maxcolors=2**24)
            assert colours is not None
            assert len(colours) > 20  # something is drawn
            found.append(picture.size)
    return found


@pytest.mark.parametrize("count", [1, 2, 5, 400])
def test_a_run_of_any_length_has_its_pictures(count: int, run: Run) -> None:
    paths = plot_run(run, events(count))
    assert [path.name for path in paths] == ["loss.png", "training.png"]
    assert all(width > 800 for width, _ in sizes(paths))
    assert sorted(path.name for path in run.plots.iterdir()) == ["loss.png", "training.png"]


def test_odd_figures_do_not_stop_the_drawing(tmp_path: Path) -> None:
    """A gap where a loss was no number, a gradient of 0, and a name that looks like mathematics."""
    odd = [{**event, "grad_norm": 0.0, "lr": 0.0} for event in events(30)]
    odd[3]["train_loss"] = None
    odd[5] = {"step": 6, "process_memory_mb": 1.0}
    odd[8]["train_loss"] = 250.0
    assert len(plot_run(Run(tmp_path / "a $dollar_{name"), odd)) == 2


def test_nothing_is_drawn_of_a_run_without_losses(run: Run) -> None:
    assert plot_run(run, []) == []
    assert plot_run(run, [{"step": 1, "process_memory_mb": 1.0}]) == []
    assert not run.plots.exists()
