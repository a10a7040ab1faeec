"""A progress bar on standard error for anything that is iterated over."""

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_T = TypeVar("_T")


def track(items: Iterable[_T], description: str, *, total: int | None = None) -> Iterator[_T]:
    """Yield ``items`` and show how many there were, how many come in a second and, if ``total`` is known, the rest."""
    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(show_speed=True)
        if total is None
        else TextColumn("{task.completed:,.0f} of {task.total:,.0f}"),
        TextColumn("{task.completed:,.0f} documents") if total is None else TaskProgressColumn(),
        TimeElapsedColumn(),
        *([] if total is None else [TimeRemainingColumn()]),
    ]
    with Progress(*columns, console=Console(file=sys.stderr), transient=True) as progress:
        yield from progress.track(items, total=total, description=description)
