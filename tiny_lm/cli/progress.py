"""Progress bars on standard error: for documents that are streamed, and for work in several stages."""

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
    """Yield ``documents`` under a progress bar (see :func:`document_progress`)."""
    with document_progress(description, total_bytes=total_bytes) as on_document:
        for document in documents:
            yield document
            on_document(document)


@contextmanager
def document_progress(description: str, *, total_bytes: int | None = None) -> Iterator[Callable[[str], None]]:
    """Yield a function to call with each document; it shows their number, their size, the rate and the time left."""
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
        size = count = 0

        def on_document(document: str) -> None:
            nonlocal size, count
            count += 1
            size += len(document)  # characters: close enough to bytes for a progress bar
            if count % 100 == 0:
                progress.update(task, completed=size, documents=count)

        yield on_document


@contextmanager
def stages(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """Yield ``advance(stage, steps, total)``, which shows a bar for each stage; ``total`` 0 is unknown.

    A stage starts when it is first named.
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

        def advance(stage: str, steps: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total or None, rate="")
            progress.update(tasks[stage], advance=steps)
            speed = progress.tasks[tasks[stage]].speed
            if speed:
                progress.update(tasks[stage], rate=f"{speed:,.0f}/s" if speed >= 10 else f"{speed:,.1f}/s")

        yield advance
