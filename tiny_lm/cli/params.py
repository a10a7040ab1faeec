"""The command that counts parameters."""

from typing import Annotated

import typer

from tiny_lm.cli.options import Settings
from tiny_lm.config import parse_overrides
from tiny_lm.console import print_result


def params(
    model_config: Annotated[str, typer.Option(help="Model config: a YAML file or the name of a shipped one.")],
    settings: Settings = None,
) -> None:
    """Count the parameters of a model, part by part."""
    from tiny_lm.model.config import load_model_config, num_parameters, parameter_table

    config = load_model_config(model_config, parse_overrides(settings or [], ["model"])["model"])
    for part, count in parameter_table(config).items():
        print_result(f"{part:<16} {count:>14,}")
    print_result(f"{'total':<16} {num_parameters(config):>14,}")
