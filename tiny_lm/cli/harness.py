"""The command ``tiny-lm harness``."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from tiny_lm.console import print_result
from tiny_lm.errors import UserError
from tiny_lm.files import to_json


def harness(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="A run folder, a checkpoint inside one, or an exported folder.")
    ],
    tasks: Annotated[str, typer.Option(metavar="NAME[,NAME...]", help="Tasks of lm-eval, such as piqa.")],
    include_path: Annotated[
        Path | None, typer.Option(help="Folder of your own tasks; only these are searched.")
    ] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Examples before each question.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Maximum number of questions per task.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts scored together.")] = 16,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON instead of a table.")] = False,
) -> None:
    """Run tasks of the Language Model Evaluation Harness (lm-eval) on a run."""
    from tiny_lm.evaluation.harness import run_harness

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise UserError("--tasks: name at least one task")
    results = run_harness(
        run, names, include_path=include_path, num_fewshot=num_fewshot, limit=limit, batch_size=batch_size
    )["results"]
    if as_json:
        plain = json.loads(json.dumps(results, default=str), parse_constant=lambda _: None)  # JSON has no NaN
        print_result(to_json(plain, indent=2))
        return
    for task, metrics in results.items():
        for name, value, error in _rows(metrics):
            print_result(f"{task:<24} {name:<20} {value:>10.4f}{f'  ± {error:.4f}' if error is not None else ''}")


def _rows(metrics: dict[str, Any]) -> list[tuple[str, float, float | None]]:
    """Return (metric, value, standard error) of a task's results, whose keys are ``metric,filter``."""
    rows = []
    for key, value in metrics.items():
        metric, _, filter_ = key.partition(",")
        if filter_ and not metric.endswith("_stderr") and isinstance(value, (int, float)):
            error = metrics.get(f"{metric}_stderr,{filter_}")
            rows.append((metric, float(value), float(error) if isinstance(error, (int, float)) else None))
    return rows
