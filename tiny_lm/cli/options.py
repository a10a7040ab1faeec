"""Options and helpers that commands share."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from tiny_lm.config import Config
from tiny_lm.console import print_message, print_result

if TYPE_CHECKING:
    from tiny_lm.inference import GenerationConfig, TextGenerator

Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a value of a config; may be repeated."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved configs and stop.")]
ReplaceErrors = Annotated[
    str, typer.Option("--errors", metavar="strict|replace", help="Invalid UTF-8: stop, or read it as U+FFFD.")
]


def print_configs(configs: Iterable[tuple[str, Config]]) -> None:
    """Print resolved configs as YAML, each under its section."""
    for section, config in configs:
        print_result(f"# {section}")
        print_result(config.to_yaml())


def expand_multi_value(words: Sequence[str], option: str) -> list[str]:
    """Rewrite ``--option A B`` as ``--option A --option B``, up to the next argument that starts with a dash."""
    result: list[str] = []
    values = -1  # values of the option so far; -1 after other arguments
    for word in words:
        if word.startswith("-"):
            values = 0 if word == option else -1
        elif values >= 0:
            if values:
                result.append(option)
            values += 1
        result.append(word)
    return result


def warn_if_truncated(generator: "TextGenerator", prompt: str, config: "GenerationConfig") -> None:
    """Print which part of a prompt does not fit into the context."""
    dropped = "" if config.strict else generator.truncated_text(prompt, add_bos=config.add_bos)
    if dropped:
        shown = dropped if len(dropped) <= 60 else f"{dropped[:30]}...{dropped[-30:]}"
        context = generator.model.config.context_length
        print_message(
            f"the prompt is longer than the context of {context:,} tokens: its first {len(dropped):,} characters "
            f"are dropped ({shown!r})"
        )
