"""A progress bar on standard error for documents that stream by."""

import sys
from collections.abc import Iterable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


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
    console = Console(file=sys.stderr)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(description, total=total_bytes, documents=0)
        size = 0
        for count, document in enumerate(documents, start=1):
            yield document
            size += len(document)  # characters; for a bar they are bytes enough
            if count % 100 == 0:
                progress.update(task, completed=size, documents=count)
