"""Options that several commands share, and the few things that commands do alike."""

from collections.abc import Iterable
from typing import Annotated

import typer

from tiny_lm.config import Config

Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a value of a config; may be repeated."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved configs and stop.")]
ReplaceErrors = Annotated[
    str, typer.Option("--errors", metavar="strict|replace", help="Invalid UTF-8: stop, or read it as U+FFFD.")
]


def print_configs(configs: Iterable[tuple[str, Config]]) -> None:
    """Print resolved configs as YAML, each under the name of its section."""
    for section, config in configs:
        print(f"# {section}")
        print(config.to_yaml())
