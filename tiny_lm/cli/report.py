"""The command that writes the report of a run, and how other commands write it on the way."""

import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from tiny_lm.cli.options import Settings
from tiny_lm.console import one_line, print_message
from tiny_lm.errors import UserError
from tiny_lm.runs import Run, open_run


def report(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder.")],
    settings: Settings = None,
) -> None:
    """Write report.html into a run folder and print its path: one page to look at, on its own in any browser."""
    from tiny_lm.evaluation.report import write_report

    print(write_report(open_run(run), settings or ()))


def write_report_beside(run: Run, settings: Sequence[str] = ()) -> None:
    """Write the report of a run that a command has just ended; where that fails, warn in one line and go on.

    Args:
        run: the run folder.
        settings: as of :func:`tiny_lm.evaluation.report.write_report`.
    """
    try:
        from tiny_lm.evaluation.report import write_report

        write_report(run, settings)
    except UserError as error:
        print_message(f"warning: no report was written: {one_line(error)}")
    except Exception as error:  # training took hours, and its result is safe: no fault of the page may hide it
        place = traceback.extract_tb(error.__traceback__)[-1]
        told = " ".join(f"{type(error).__name__}: {error} ({place.filename}:{place.lineno})".split())
        print_message(f"warning: no report was written: {told}")
