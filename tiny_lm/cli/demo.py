"""The command that opens a page on which models tell stories."""

from pathlib import Path
from typing import Annotated

import typer

from tiny_lm.errors import UserError


def demo(
    runs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RUN]...", help="Run folders, checkpoints or exported folders; without any, the newest run."
        ),
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65_535, help="Where the page is; 0: any free port.")] = 7860,
    device: Annotated[str | None, typer.Option(help="Where to run: cpu, cuda, mps.")] = None,
) -> None:
    """Open a page in the browser on which trained models tell stories, on this machine only."""
    from tiny_lm.inference import TextGenerator
    from tiny_lm.runs import find_newest_run
    from tiny_lm.serving.demo import serve_demo

    newest = None if runs else find_newest_run()
    paths = runs or ([str(newest.folder)] if newest else [])
    if not paths:
        raise UserError("there is no run under runs/ yet: train one, or name one: tiny-lm demo RUN")
    models = {
        name: TextGenerator.from_path(path, device=device) for name, path in zip(_names(paths), paths, strict=True)
    }
    serve_demo(models, port, on_start=lambda address: print(address, flush=True))


def _names(paths: list[str]) -> list[str]:
    """Return what the menu calls the models: the names of their folders, or their whole paths where two are alike.

    Raises:
        UserError: a path is named twice.
    """
    names = [Path(path).resolve().name for path in paths]
    names = names if len(set(names)) == len(names) else paths
    if len(set(names)) < len(names):
        raise UserError("each model can be named once only")
    return names
