"""The command that trains a model."""

from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from math import isfinite
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from tiny_lm.cli.options import DryRun, Settings, print_configs
from tiny_lm.cli.report import write_report_beside
from tiny_lm.config import parse_overrides, shipped_configs
from tiny_lm.console import make_console, shell_command
from tiny_lm.errors import UserError
from tiny_lm.files import remove_leftovers
from tiny_lm.runs import RUNS_FOLDER, Run, create_run, is_checkpoint, new_run_name, number_in, open_run, run_folder_of
from tiny_lm.training.launch import check_variables

if TYPE_CHECKING:
    from rich.console import Console

    from tiny_lm.data import BinDataConfig
    from tiny_lm.model.config import ModelConfig
    from tiny_lm.training import TrainingConfig
    from tiny_lm.training.fit import TrainingResult

Configs: TypeAlias = "tuple[ModelConfig, TrainingConfig, BinDataConfig]"


def train(
    profile: Annotated[str | None, typer.Argument(help="Profile, such as speed: a named set of three configs.")] = None,
    model_config: Annotated[str | None, typer.Option(help="Model config: a YAML file or a shipped name.")] = None,
    training_config: Annotated[str | None, typer.Option(help="Training config: a YAML file or a shipped name.")] = None,
    data_config: Annotated[str | None, typer.Option(help="Data config: a YAML file or a shipped name.")] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="auto|RUN|CHECKPOINT",
            help="Resume from a run or checkpoint; auto: from this run's newest checkpoint, if any.",
        ),
    ] = None,
    settings: Settings = None,
    dry_run: DryRun = False,
) -> None:
    """Train a model, or resume training.

    Train PROFILE, or the three given configs; a given config overrides the profile's.
    """
    check_variables()
    resumed = _named_run(resume)
    given = {"model": model_config, "training": training_config, "data": data_config}
    files = _config_files(profile, given, resumed)
    configs = _load(files, settings)
    if dry_run:
        print_configs(zip(("model", "training", "data"), configs, strict=True))
        return
    started_from = _started_from(files, resumed)
    resume = resume or configs[1].resume_from_checkpoint
    run, checkpoint = _choose_run(configs, resume, started_from)
    try:
        if checkpoint is None:
            _check_streams(configs[2])
        if resume == "auto" and _is_finished(run, configs[1]):  # so that a job that is restarted until it succeeds ends
            _refresh_outputs(run, configs[1])
        else:
            run_training(run, configs, *started_from, checkpoint=checkpoint)
    finally:
        if not configs[1].run_name:
            with suppress(OSError):  # remove a folder that we named if it is empty because training did not start
                run.folder.rmdir()
                run.folder.parent.rmdir()
    _print_summary(run)


def _named_run(resume: str | None) -> Run | None:
    """Return the run that `--resume` names by its folder or a checkpoint, if any."""
    if resume is None or resume == "auto":
        return None
    path = Path(resume)
    if is_checkpoint(path) and not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    return open_run(run_folder_of(path))


def _config_files(profile: str | None, given: dict[str, str | None], resumed: Run | None) -> list[str]:
    """Return the config files of model, training and data: those given, else the profile's, else the resumed run's."""
    from tiny_lm.profile import Profile

    chosen = Profile.from_yaml(profile) if profile else None
    files = {
        section: file or (chosen and getattr(chosen, section)) or (resumed and str(resumed.configs / f"{section}.yaml"))
        for section, file in given.items()
    }
    missing = [f"--{section}-config" for section, file in files.items() if not file]
    if missing:
        raise UserError(f"name a profile (such as `tiny-lm train speed`) or give {' and '.join(missing)}")
    return [str(file) for file in files.values()]


def _check_streams(config: "BinDataConfig") -> None:
    """Name the two commands that write the token streams of a shipped data config if they are missing."""
    from tiny_lm.data import BinDataConfig
    from tiny_lm.profile import Profile

    if Path(config.train_path).exists():
        return
    for file in sorted((shipped_configs() / Profile.folder).glob("*.yaml")):
        profile = Profile.from_yaml(file)
        data = BinDataConfig.from_yaml(shipped_configs() / BinDataConfig.folder / f"{profile.data}.yaml")
        if data.train_path == config.train_path:
            raise UserError(
                f"{config.train_path}: no such token stream; write it with: "
                f"{shell_command('tiny-lm', 'tokenizer', 'train', '--config', profile.tokenizer)} && "
                f"{shell_command('tiny-lm', 'tokenize', '--config', profile.tokenizer)}"
            )


def _load(files: list[str], settings: list[str] | None) -> Configs:
    from tiny_lm.data import BinDataConfig
    from tiny_lm.model.config import load_model_config
    from tiny_lm.training import TrainingConfig

    overrides = parse_overrides(settings or [], ["model", "training", "data"])
    return (
        load_model_config(files[0], overrides["model"]),
        TrainingConfig.from_yaml(files[1], overrides["training"]),
        BinDataConfig.from_yaml(files[2], overrides["data"]),
    )


def _started_from(files: list[str], resumed: Run | None) -> tuple[list[str], list[str]]:
    """Return names and paths of the config files; of a resumed run, those that it was started with."""
    from tiny_lm.training.auto_resume import config_origin

    names = [Path(file).stem for file in files]
    origins = [config_origin(kind, file) for kind, file in zip(("models", "training", "data"), files, strict=True)]
    if resumed is not None:
        names, origins = (
            [str(value) for value in known] if isinstance(known := record.get(key), list) and len(known) == 3 else given
            for record in [resumed.read_metadata()]
            for key, given in (("configs", names), ("config_files", origins))
        )
    return names, origins


def _choose_run(
    configs: Configs, resume: str | None, started_from: tuple[list[str], list[str]]
) -> tuple[Run, Path | None]:
    """Return the run folder to write and the checkpoint to resume from, if the run has one."""
    from tiny_lm.training.auto_resume import describe_near_misses, find_run
    from tiny_lm.training.resume import find_checkpoint

    config, names = configs[1], started_from[0]
    run = _named_run(resume)
    if resume == "auto" and config.run_name:
        run = Run(RUNS_FOLDER / config.run_name)
    elif resume == "auto":
        run = find_run(configs, *started_from)
        if run is None and (why := describe_near_misses(configs, *started_from)):
            _console(_is_main_process(config)).print(why, markup=False)
    if run is not None:
        is_named = str(resume).endswith(".ckpt")
        return run, Path(str(resume)) if is_named else find_checkpoint(run, _console(_is_main_process(config)))
    name = config.run_name or new_run_name(names[0], names[2])
    run = Run(RUNS_FOLDER / name)
    if not _is_main_process(config):
        return run, None
    if not config.run_name:
        return create_run(name), None
    if resume is None and run.folder.exists() and any(run.folder.iterdir()):
        raise UserError(f"{run.folder}: already exists; resume with --resume auto, or choose another run_name")
    return run, None


def _console(prints: bool) -> "Console":
    return make_console(quiet=not prints)


def _is_main_process(config: "TrainingConfig") -> bool:
    """Return whether this process is rank 0, which writes the run folder."""
    from tiny_lm.hardware.device import fastest_device
    from tiny_lm.training.distributed import get_distributed_context

    return get_distributed_context(config, fastest_device()).is_main


def _is_finished(run: Run, config: "TrainingConfig") -> bool:
    record = run.read_metadata()
    return record.get("status") == "finished" and (number_in(record, "steps") or 0) >= config.max_steps


def _refresh_outputs(run: Run, config: "TrainingConfig") -> None:
    """Write plots and report of a finished run: its process may have been killed before it did."""
    main = _is_main_process(config)
    _console(main).print(f"run folder {run.folder}, already finished")
    if not main:
        raise typer.Exit
    with run.claim():
        remove_leftovers(run.folder)
        _write_plots_and_report(run)


def _write_plots_and_report(run: Run) -> None:
    from tiny_lm.evaluation.plots import plot_run
    from tiny_lm.runs import read_metrics

    plot_run(run, read_metrics(run.metrics) if run.metrics.is_file() else [])
    write_report_beside(run)


def run_training(
    run: Run, configs: Configs, names: list[str], config_files: Sequence[str] = (), *, checkpoint: Path | None = None
) -> "TrainingResult":
    """Train, then write plots and report, also for a run that was stopped or failed.

    Raises:
        UserError: the run failed.
        typer.Exit: with code 130 if the user stopped the run.
    """
    from tiny_lm.training.fit import train as fit

    main = _is_main_process(configs[1])
    console = _console(main)
    start = f"resuming from {checkpoint}" if checkpoint else "a new run"
    console.print(f"run folder {run.folder}, {start}")
    try:
        result = fit(*configs, run, resume_from=checkpoint, names=names, config_files=config_files, console=console)
    except UserError:
        if main and run.read_metadata().get("status") == "failed":
            with suppress(UserError):  # the original error matters more
                _write_plots_and_report(run)
        raise
    if not main:
        raise typer.Exit  # rank 0 does the rest
    _write_plots_and_report(run)
    if not result.finished:
        resume = shell_command("tiny-lm", "train", "--resume", run.folder)
        console.print(f"stopped at step {result.steps:,}; resume with: {resume}")
        raise typer.Exit(130)
    return result


def _print_summary(run: Run) -> None:
    """Print a summary of the run."""
    from tiny_lm.runs import mean_over_time, read_metrics

    record, events = run.read_metadata(), read_metrics(run.metrics) if run.metrics.is_file() else []

    def show(form: str, *keys: str) -> str:  # values may be missing in an edited run.json
        value = number_in(record, *keys)
        return "" if value is None else form.format(value)

    best = min((event for event in events if event.get("val_loss") is not None), key=itemgetter("val_loss"), default={})
    mfu, speed = mean_over_time(events, "mfu"), mean_over_time(events, "tokens_per_sec")
    memory = {"process": "process_peak_memory_mb", "GPU": "gpu_peak_memory_mb"}
    peaks = [show(f"{name} {{:,.0f}} MiB", "memory", key) for name, key in memory.items()]
    seconds = number_in(record, "seconds")
    rows = {
        "run": str(run.folder),
        "device": f"{record.get('device')}, {record.get('precision')}",
        "parameters": show("{:,.0f}", "parameters"),
        "steps": show("{:,.0f}", "steps")
        + show(" of {:,.0f} tokens", "tokens_per_step")
        + show(", {:,.0f} in total", "tokens"),
        "wall time": str(timedelta(seconds=round(seconds))) if seconds is not None and seconds < 1e9 else "",
        "speed": f"{speed:,.0f} tokens/s" if isfinite(speed) else "",
        "MFU": f"{mfu:.1%} of {_peak(record)}" if isfinite(mfu) else "",
        "peak memory": ", ".join(filter(None, peaks)),
        "train loss": show("{:.4f}", "metrics", "train_loss"),
        "val loss": show("{:.4f}", "metrics", "val_loss"),
        "best val loss": f"{best['val_loss']:.4f} at step {best['step']:,}" if best else "",
        "val perplexity": show("{:.3f}", "metrics", "val_ppl"),
        "bits per byte": show("{:.4f}", "metrics", "val_bpb"),
        "plots": " ".join(str(path) for path in sorted(run.plots.glob("*.png"))),
        "report": str(run.report) if run.report.is_file() else "",
        "samples": str(run.samples) if run.samples.is_file() else "",
        "next": shell_command("tiny-lm", "generate", run.folder, "--prompt", "Once upon a time"),
    }
    for name, value in rows.items():
        if value:
            print(f"{name:<15} {value}")


def _peak(record: dict[str, Any]) -> str:
    value, source = number_in(record, "peak_flops", "value") or 0.0, record.get("peak_flops")
    return f"{value / 1e12:,.3g} TFLOP/s ({source.get('source') if isinstance(source, dict) else source})"
