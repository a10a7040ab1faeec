"""Which run `--resume auto` resumes: the one that trained the same thing, from the same config files.

A run is identified by what it trained and from where, never by its age:

* its model config, its data config and token stream, and those values of its training config that determine what is
  learned (optimizer, learning rate, seed, ...), all as recorded in its folder;
* the config files that it was started from: the same values in another folder are another experiment;
* its own name: a copy of a run folder is not the run while the original exists.

``MAY_CHANGE`` lists what may change while a run remains the same run.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tiny_lm.config import Config, find_config, read_yaml, shipped_configs
from tiny_lm.console import shell_command
from tiny_lm.data import BinDataConfig
from tiny_lm.data.bin.stream import open_stream
from tiny_lm.errors import UserError
from tiny_lm.runs import Run, last_saved, list_runs

MAY_CHANGE = {
    "model": (),
    "data": ("num_workers", "pin_memory", "val_path"),
    "training": (
        "max_steps",
        "run_name",
        "resume_from_checkpoint",
        *("val_every_n_steps", "save_every_n_steps", "log_every_n_steps", "system_metrics_every_n_steps"),
        *("keep_checkpoints", "val_max_tokens", "spike_threshold", "sample_prompts", "sample_tokens", "trackers"),
        *("devices", "num_nodes", "strategy", "precision", "compile", "gradient_checkpointing"),
    ),
}
"""Keys of each config that may change while a run remains the same run."""


def config_origin(kind: str, file: str) -> str:
    """Return the path of a config file, relative to the working directory or marked as shipped.

    Args:
        kind: its folder (models, training, data).
        file: as for :func:`~tiny_lm.config.find_config`.
    """
    path = find_config(kind, file).resolve()
    for folder, prefix in ((shipped_configs().resolve(), "shipped:"), (Path.cwd(), "")):
        if path.is_relative_to(folder):
            return prefix + path.relative_to(folder).as_posix()
    return path.as_posix()


def find_run(configs: Sequence[Config], names: Sequence[str], origins: Sequence[str]) -> Run | None:
    """Return the run that trained these configs, or None.

    Args:
        configs: of model, training and data.
        names: of the config files, which is all that runs of older versions record.
        origins: of the config files, see :func:`config_origin`.

    Raises:
        UserError: several runs match.
    """
    fitting = [run for run in list_runs() if _comes_from(run, names, origins) and not _differences(run, configs)]
    fitting = [run for run in fitting if not _is_copy(run)]
    saved = [run for run in fitting if last_saved(run)[0]]
    if len(saved) > 1:
        listed = ", ".join(f"{run.folder} ({_describe(run)})" for run in saved)
        raise UserError(
            f"--resume auto: {len(saved)} runs match these configs: {listed}; name the one to resume, such as "
            f"{shell_command('--resume', saved[-1].folder)}"
        )
    # None has a checkpoint, so nothing can be lost: take the newest.
    return saved[0] if saved else max(fitting, key=last_saved, default=None)


def describe_near_misses(configs: Sequence[Config], names: Sequence[str], origins: Sequence[str]) -> str | None:
    """Describe why the newest run of these config files is not resumed; None if there is none."""
    near = [run for run in list_runs() if _comes_from(run, names, origins) and last_saved(run)[0] and not _is_copy(run)]
    run = max(near, key=last_saved, default=None)
    if run is None:
        return None
    what = ", ".join(_differences(run, configs)[:3])
    option = shell_command("--resume", run.folder)
    return f"{run.folder} was trained differently ({what}), so a new run starts; to resume it: {option}"


def _comes_from(run: Run, names: Sequence[str], origins: Sequence[str]) -> bool:
    record = run.read_metadata()
    known = record.get("config_files")
    return bool(known == list(origins)) if known is not None else bool(record.get("configs") == list(names))


def _is_copy(run: Run) -> bool:
    """Whether a run folder is a copy of another one that still exists: it records the original's name."""
    name = run.read_metadata().get("name")
    if not isinstance(name, str) or name in ("", run.name) or Path(name).name != name:
        return False
    return Run(run.folder.parent / name).metadata_file.is_file()


def _differences(run: Run, configs: Sequence[Config]) -> list[str]:
    """Return the values that a run was trained with and that differ in these configs."""
    found = []
    for section, config in zip(("model", "training", "data"), configs, strict=True):
        try:
            before = read_yaml(run.configs / f"{section}.yaml")
        except UserError:
            return [f"its {section} config cannot be read"]
        now = config.to_dict()
        for key in before:
            if key in now and key not in MAY_CHANGE[section] and before[key] != now[key]:
                found.append(f"{section}.{key} {before[key]} and not {now[key]}")
    return found or _stream_differences(run, configs[2])


def _stream_differences(run: Run, data: Any) -> list[str]:
    """Return how the token stream differs from the one that a run was trained on."""
    assert isinstance(data, BinDataConfig)
    try:
        stream = open_stream(data.train_path, data)
    except UserError:
        return []  # reported by the training itself
    record = run.read_metadata()
    now = {"train_tokens": stream.tokens, "tokenizer_hash": stream.metadata.tokenizer_hash}
    return [
        f"{key} {record[key]} and not {value}" for key, value in now.items() if key in record and record[key] != value
    ]


def _describe(run: Run) -> str:
    steps = [step for step, _ in run.saved_steps()]
    status = run.read_metadata().get("status")
    return ", ".join([f"step {max(steps):,}" if steps else "saved", *([status] if isinstance(status, str) else [])])
