"""The command that opens the demo page."""

from pathlib import Path
from typing import Annotated

import typer

from tiny_lm.errors import UserError


def demo(
    runs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RUN]...", help="Run folders, checkpoints or exported folders; default: the newest run."
        ),
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65_535, help="Port of the page; 0 chooses a free one.")] = 7860,
    device: Annotated[str | None, typer.Option(help="Device to run on: cpu, cuda, mps.")] = None,
) -> None:
    """Open a web page on which trained models write stories, on this machine only."""
    from tiny_lm.inference import TextGenerator
    from tiny_lm.runs import find_newest_run
    from tiny_lm.serving.demo import serve_demo

    newest = None if runs else find_newest_run()
    paths = runs or ([str(newest.folder)] if newest else [])
    if not paths:
        raise UserError("no run under runs/ yet: train one, or name one: tiny-lm demo RUN")
    models = {
        name: TextGenerator.from_path(path, device=device) for name, path in zip(_names(paths), paths, strict=True)
    }
    serve_demo(models, port, on_start=lambda address: print(address, flush=True))


def _names(paths: list[str]) -> list[str]:
    """Return the names of the models: those of their folders, or their paths if two names are equal.

    Raises:
        UserError: a path is given twice.
    """
    names = [Path(path).resolve().name for path in paths]
    names = names if len(set(names)) == len(names) else paths
    if len(set(names)) < len(names):
        raise UserError("each model can be given only once")
    return names
