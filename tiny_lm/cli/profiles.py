"""The command that lists the profiles."""

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tiny_lm.config import shipped_configs
from tiny_lm.console import make_console, print_result
from tiny_lm.files import to_json
from tiny_lm.training.launch import check_variables

if TYPE_CHECKING:
    from tiny_lm.profile import Profile
    from tiny_lm.training.planning.run_time import PlannedRun, RunTime

_SECONDS = 10.0


def profiles(
    time: Annotated[
        bool, typer.Option(help="Measure for ten seconds how long each would take on this machine.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the profiles of `tiny-lm train`.

    For each: parameters, tokens, the estimated time on this machine, and what its guide promises.
    """
    from tiny_lm.model.config import num_parameters

    planned = _load()
    times = _measure(run for _, run in planned.values()) if time else [None] * len(planned)
    rows = [
        {
            "name": name,
            "description": profile.description,
            "expect": profile.expect,
            "parameters": num_parameters(run.model),
            "tokens": run.tokens,
            "time": result,
        }
        for (name, (profile, run)), result in zip(planned.items(), times, strict=True)
    ]
    if as_json:
        print_result(to_json([_plain(row) for row in rows], indent=2))
    else:
        _print_table(rows, with_times=time)


def _load() -> "dict[str, tuple[Profile, PlannedRun]]":
    """Return every shipped profile and its configs, by name."""
    from tiny_lm.data import BinDataConfig
    from tiny_lm.model.config import load_model_config
    from tiny_lm.profile import Profile
    from tiny_lm.training import TrainingConfig
    from tiny_lm.training.planning.run_time import PlannedRun

    loaded = {}
    for file in sorted((shipped_configs() / Profile.folder).glob("*.yaml")):
        profile = Profile.from_yaml(file)
        loaded[file.stem] = (
            profile,
            PlannedRun(
                load_model_config(profile.model),
                TrainingConfig.from_yaml(profile.training),
                BinDataConfig.from_yaml(profile.data),
            ),
        )
    return loaded


def _measure(runs: "Iterable[PlannedRun]") -> "list[RunTime]":
    check_variables()
    from tiny_lm.training.planning.run_time import estimate_run_times

    with make_console().status(f"measuring this machine for {_SECONDS:.0f} seconds"):
        return estimate_run_times(list(runs), seconds=_SECONDS)


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row for JSON; times are null if they were not measured."""
    result: RunTime | None = row["time"]
    return {
        **{key: value for key, value in row.items() if key != "time"},
        "seconds": result and round(result.seconds),
        "tokens_per_second": result and round(result.tokens_per_second),
        "measured": result and result.measured,
        "validation_included": result and result.validates,
    }


def _print_table(rows: list[dict[str, Any]], *, with_times: bool) -> None:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="")
    table.add_column("profile", no_wrap=True)
    table.add_column("parameters", justify="right", no_wrap=True)
    table.add_column("tokens", justify="right", no_wrap=True)
    if with_times:
        table.add_column("time here", no_wrap=True)
    table.add_column("description, and what its guide promises")
    for row in rows:
        size = [f"{row['parameters'] / 1e6:.1f}M", f"{row['tokens'] / 1e6:,.1f}M"]
        about = [_about(row["time"])] if with_times else []
        promise = f"\nguide: {row['expect']}" if row["expect"] else ""
        table.add_row(row["name"], *size, *about, row["description"] + promise)
    # A pipe has no width.
    width = None if sys.stdout.isatty() else 100
    make_console(stderr=False, soft_wrap=False, width=width).print(table)
    for remark in _remarks([row["time"] for row in rows]) if with_times else ():
        print_result(remark)
    print_result(end="")  # the table is a result, too


def _about(result: "RunTime") -> str:
    """Format the duration of a run, rounded to its precision."""
    seconds = result.seconds
    for unit, size in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 1.5 * size:
            number = seconds / size
            mark = "" if result.validates else "*"
            return f"about {number:.1f} {unit}{mark}" if number < 10 else f"about {number:.0f} {unit}{mark}"
    return f"about {seconds:.0f} s"


def _remarks(times: "list[RunTime]") -> list[str]:
    """Describe how the times were measured."""
    from tiny_lm.hardware.device import describe_device, fastest_device

    device = describe_device(fastest_device())
    remarks = [f"measured on this machine ({device}) in short benchmarks; a long run is compiled and somewhat faster"]
    if not all(result.measured for result in times):
        remarks.append("some were scaled from the others by their operations: ten seconds were not enough for all")
    if not all(result.validates for result in times):
        remarks.append("* without validation: its token stream does not exist yet")
    return remarks
