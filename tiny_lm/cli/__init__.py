"""The command line: all commands, and how errors are reported.

Each command is a plain function in a module of this folder. Those modules import nothing heavy at the top, so that
``tiny-lm --help`` is fast.
"""

import errno
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from typer.exceptions import Abort, TyperException
from typer.main import get_command

from tiny_lm import __version__
from tiny_lm.cli.data import data_app, tokenize
from tiny_lm.cli.demo import demo
from tiny_lm.cli.evaluate import EvalCommand, evaluate
from tiny_lm.cli.export import convert_to_huggingface, export_app, import_model
from tiny_lm.cli.generate import generate, generate_from_checkpoint
from tiny_lm.cli.harness import harness
from tiny_lm.cli.memory import estimate, find_batch_size
from tiny_lm.cli.params import params
from tiny_lm.cli.profiles import profiles
from tiny_lm.cli.push import push, upload_checkpoint
from tiny_lm.cli.quickstart import quickstart
from tiny_lm.cli.report import report
from tiny_lm.cli.serve import serve
from tiny_lm.cli.serve_config import serve_config
from tiny_lm.cli.tokenizer import tokenizer_app
from tiny_lm.cli.torchserve import export_torchserve
from tiny_lm.cli.train import train
from tiny_lm.console import guard_streams, print_error, print_message, print_result
from tiny_lm.errors import UserError
from tiny_lm.signals import Terminated, signals_as_exceptions

__all__ = ["app", "main"]

app = typer.Typer(
    name="tiny-lm",
    help="Pre-train small language models from raw text, end to end, and ship them everywhere.",
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(quickstart)
app.add_typer(data_app, name="data")
app.add_typer(tokenizer_app, name="tokenizer")
app.command()(tokenize)
app.command()(train)
app.command()(profiles)
app.command()(params)
app.command()(estimate)
app.command()(find_batch_size)
app.command()(generate)
app.command()(demo)
app.command("eval", cls=EvalCommand)(evaluate)
app.command()(harness)
app.command()(report)
export_app.command("torchserve")(export_torchserve)
app.add_typer(export_app, name="export")
app.command()(serve)
app.command("import")(import_model)
app.command()(push)
app.command()(serve_config)
app.command(hidden=True)(generate_from_checkpoint)  # scripts/inference/
app.command(hidden=True)(convert_to_huggingface)  # scripts/export/convert_to_hf_gpt2.py
app.command(hidden=True)(upload_checkpoint)  # scripts/hf_hub/upload_gpt2.py


def _version(show: bool) -> None:
    if show:
        print_result(f"tiny-lm {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


# Errors that a path or the machine may cause at any file access; they are not bugs.
_ENVIRONMENT = {
    **dict.fromkeys([errno.EACCES, errno.EPERM, errno.EROFS], "get the permission, or use another path"),
    **dict.fromkeys([errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR], "use another path"),
    **dict.fromkeys([errno.EIO, errno.ESTALE], "check the disk, and run the command again"),
    **dict.fromkeys([errno.EMFILE, errno.ENFILE], "raise the limit on open files (ulimit -n)"),
}


def main(*command: str) -> None:
    """Run the command line and exit.

    Results go to standard output, everything else to standard error. A user's mistake exits with code 2 and one line.

    Args:
        command: arguments before the user's: the documented scripts pass their command here.
    """
    arguments = [*command, *sys.argv[1:]] or ["--help"]
    guard_streams()
    try:
        Path.cwd()  # without it, libraries fail with misleading errors
    except FileNotFoundError:
        sys.exit(_fail("the working directory no longer exists; change to another one"))
    try:
        with signals_as_exceptions():
            code = get_command(app)(arguments, prog_name="tiny-lm", standalone_mode=False)
    except Terminated as end:
        print_message(f"ended by {end.name}")
        code = end.code
    except Abort:  # end of input at a prompt
        code = 1
    except (UserError, TyperException) as error:
        code = _fail(error.format_message() if isinstance(error, TyperException) else str(error))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            code = _fail(f"{error.filename or 'the disk'}: no space is left; make room and run the command again")
        elif error.errno in _ENVIRONMENT and error.filename is not None:
            code = _fail(f"{os.fsdecode(error.filename)}: {error.strerror}; {_ENVIRONMENT[error.errno]}")
        else:
            raise
    sys.exit(code or 0)


def _fail(message: str) -> int:
    """Print an error as one line, but the usage of a group without a command as it is."""
    if message.startswith("Usage: "):
        print_message(message)
    else:
        print_error(message)
    return 2
