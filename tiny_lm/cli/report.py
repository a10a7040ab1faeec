"""The command ``tiny-lm report``, and the report that other commands write at their end."""

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
    """Write report.html, a self-contained page about the run, into its folder and print its path."""
    from tiny_lm.evaluation.report import write_report

    print(write_report(open_run(run), settings or ()))


def write_report_beside(run: Run, settings: Sequence[str] = ()) -> None:
    """Write the report of a run; if that fails, print a one-line warning and return.

    Args:
        run: the run folder.
        settings: as for :func:`tiny_lm.evaluation.report.write_report`.
    """
    try:
        from tiny_lm.evaluation.report import write_report

        write_report(run, settings)
    except UserError as error:
        print_message(f"warning: the report could not be written: {one_line(error)}")
    except Exception as error:  # the result of hours of training is safe: a bug in the report must not hide that
        frame = traceback.extract_tb(error.__traceback__)[-1]
        reason = " ".join(f"{type(error).__name__}: {error} ({frame.filename}:{frame.lineno})".split())
        print_message(f"warning: the report could not be written: {reason}")
