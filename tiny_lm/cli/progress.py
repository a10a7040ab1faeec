"""Progress bars on standard error: for documents that stream by, and for work of several stages."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from tiny_lm.console import make_console


def track(documents: Iterable[str], description: str, *, total_bytes: int | None = None) -> Iterator[str]:
    """Yield ``documents`` and show their number, the amount of text, its rate and, if known, the time left."""
    columns = [
        TextColumn("{task.description}"),
        BarColumn(bar_width=12),  # all columns together fit into 80 characters
        TextColumn("{task.fields[documents]:,} documents"),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(compact=True),
    ]
    console = make_console()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(description, total=total_bytes, documents=0)
        size = 0
        for count, document in enumerate(documents, start=1):
            yield document
            size += len(document)  # characters; for a bar they are bytes enough
            if count % 100 == 0:
                progress.update(task, completed=size, documents=count)


@contextmanager
def stages(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """Yield a function that is told of a stage's name, its new steps and their total (0: unknown), and shows them.

    A stage begins when it is first named; each has a bar of its own.
    """
    columns = [
        TextColumn("{task.description:<28}"),
        BarColumn(bar_width=12),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(compact=True),
    ]
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:

        def tell(stage: str, steps: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total or None, rate="")
            progress.update(tasks[stage], advance=steps)
            speed = progress.tasks[tasks[stage]].speed
            if speed:
                progress.update(tasks[stage], rate=f"{speed:,.0f}/s" if speed >= 10 else f"{speed:,.1f}/s")

        yield tell
