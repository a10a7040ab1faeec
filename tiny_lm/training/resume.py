"""Resume: pick a checkpoint, validate it against the configs, truncate newer outputs."""

import json
import math
import os
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from tiny_lm.errors import UserError
from tiny_lm.files import remove_leftovers
from tiny_lm.model import load_model_config
from tiny_lm.model.checkpoint import CHECKPOINT_KEY, read_checkpoint
from tiny_lm.runs import Run
from tiny_lm.tracking.jsonl_logger import JsonlLogger
from tiny_lm.training.callbacks.samples import truncate_samples
from tiny_lm.training.checkpoint_io import link
from tiny_lm.training.config import TrainingConfig
from tiny_lm.training.optim import Schedule, build_optimizer, learning_rate_at

# --- which checkpoint ------------------------------------------------------------------------------------------------


def find_checkpoint(run: Run, console: Console) -> Path | None:
    """Return the newest checkpoint that a run can resume from, or None if it has none yet.

    Each candidate is read in full; one warning names those that are damaged, unreadable or of another model.

    Raises:
        UserError: none is usable.
    """
    unfit = []
    for path in _newest_first(run):
        try:
            checkpoint = read_checkpoint(path, whole=True)
            _check_origin(path, checkpoint, run)
        except UserError as error:
            unfit.append(str(error))
            continue
        if unfit:
            step = checkpoint["global_step"]
            console.print(f"warning: {'; '.join(unfit)}; resuming from {path} of step {step:,}", markup=False)
        return path
    if unfit:
        raise UserError(
            f"{run.folder}: none of its checkpoints can be read ({unfit[0]}); restore one, or start a new run"
        )
    return None


def _check_origin(path: Path, checkpoint: dict[str, Any], run: Run) -> None:
    """Raise UserError if a checkpoint holds another model than the run folder's config, or no training state."""
    _check_state(path, checkpoint)
    try:
        model = load_model_config(run.configs / "model.yaml").to_dict()
    except UserError:
        return  # a damaged config is reported where it is used
    if model != checkpoint[CHECKPOINT_KEY]["model"]:
        raise UserError(f"{path}: holds another model than {run.configs / 'model.yaml'}")


def _check_state(path: Path, checkpoint: dict[str, Any]) -> None:
    """Raise UserError if a checkpoint lacks part of the training state, such as one with weights only."""
    for key, kind in _STATE.items():
        if not isinstance(checkpoint.get(key), kind):
            raise UserError(
                f"{path}: holds weights but no training state ({key} is missing); start a new run with "
                f"training.init_from={path}"
            )


def _newest_first(run: Run) -> list[Path]:
    """Return the checkpoints of a run; of the same step, ``last.ckpt`` comes first and ``best.ckpt`` last."""
    found = [(float(step), 1, path) for step, path in run.saved_steps()]
    # An unreadable last.ckpt is assumed to be the newest.
    for path, preference, otherwise in ((run.last_checkpoint, 2, math.inf), (run.best_checkpoint, 0, -1.0)):
        if os.path.lexists(path):
            step = otherwise
            with suppress(UserError):
                step = read_checkpoint(path)["global_step"]
            found.append((step, preference, path))
    return [path for *_, path in sorted(found, reverse=True)]


_STATE = {"callbacks": dict, "optimizer_states": list, "lr_schedulers": list, "loops": dict}

# --- what must match, and what may change ----------------------------------------------------------------------------

_MUST_MATCH = {
    "tokenizer_hash": "the text was encoded by another tokenizer",
    "optimizer": "the checkpoint holds the state of another optimizer",
    "seed": "the order of batches would change",
    "batch_size": "the order of batches would change",
    "block_size": "the order of batches would change",
    "stride": "the order of batches would change",
}

_SCHEDULE = ("max_steps", "learning_rate", "min_lr", "scheduler", "warmup_ratio", "decay_ratio")
_ROUNDING = "the same batches; losses match those of an uninterrupted run up to rounding"
_SAME_WEIGHTS = "the weights are not affected"
_OTHER_TARGETS = "different targets are counted, so losses are not comparable with earlier ones"
_OTHER_VALIDATION = "validation losses are not comparable with earlier ones, nor with the best one"
_EXPLANATIONS = {
    **dict.fromkeys(("precision", "device", "compile", "compiled", "gradient_checkpointing"), _ROUNDING),
    **dict.fromkeys(("devices", "num_nodes", "strategy"), _ROUNDING),
    **dict.fromkeys(("val_every_n_steps", "save_every_n_steps", "log_every_n_steps"), _SAME_WEIGHTS),
    **dict.fromkeys(("system_metrics_every_n_steps", "keep_checkpoints", "spike_threshold"), _SAME_WEIGHTS),
    **dict.fromkeys(("sample_prompts", "sample_tokens", "trackers", "num_workers", "pin_memory"), _SAME_WEIGHTS),
    **dict.fromkeys(("ignore_index", "mask_after_eos"), _OTHER_TARGETS),
    **dict.fromkeys(("val_path", "val_max_tokens", "val_tokens"), _OTHER_VALIDATION),
    "init_from": "ignored: a resumed run has its own weights",
    "train_path": "assumed to be the same text if it has as many tokens",
    "train_tokens": "a different text, whose sequences have their own order",
    "drop_last": "epochs have a different length, so batches differ from the next epoch on",
}
_NOT_REPORTED = ("run_name", "resume_from_checkpoint", *_MUST_MATCH)


def check_resume(path: Path, meta: dict[str, Any], console: Console, *, finished: bool = False) -> int:
    """Validate a checkpoint, print what has changed since it was written, and return its step.

    Args:
        path: the checkpoint; it is read in full.
        meta: what the checkpoints of this run carry.
        console: prints one line for each changed value, with its consequence.
        finished: whether the run finished. One that was killed after its last checkpoint did not.

    Raises:
        UserError: the checkpoint is damaged, nothing is left to train, or a value differs that must match.
    """
    checkpoint = read_checkpoint(path, whole=True)
    _check_state(path, checkpoint)
    saved = checkpoint[CHECKPOINT_KEY]
    if saved["model"] != meta["model"]:
        differences = ", ".join(
            f"{key} {old} and not {new}" for key, old, new in _differences(saved["model"], meta["model"])
        )
        raise UserError(
            f"{path}: holds another model than the model config ({differences}); resume with the run's configs"
        )
    for key, why in _MUST_MATCH.items():
        if saved.get(key) != meta[key]:
            raise UserError(f"{path}: was trained with {key} {saved.get(key)} and not {meta[key]}: {why}")
    if meta["training"]["strategy"] == "fsdp" and saved.get("training", {}).get("strategy") != "fsdp":
        # Lightning would assign states to the wrong weights: it numbers weights in the order of the model.
        raise UserError(f"{path}: was not written by strategy fsdp, which cannot read its optimizer state; use ddp")
    step, max_steps = int(checkpoint["global_step"]), meta["training"]["max_steps"]
    was_last = not finished and step == max_steps == saved.get("training", {}).get("max_steps")
    if step >= max_steps and not was_last:
        raise UserError(
            f"{path}: is at step {step} of max_steps {max_steps}, so nothing is left to train; to continue, raise "
            "training.max_steps"
        )
    for line in _describe_changes(saved, meta, step):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return step


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return the keys of both whose values differ, with the two values."""
    return [(key, before[key], now[key]) for key in before if key in now and before[key] != now[key]]


def _describe_changes(before: dict[str, Any], now: dict[str, Any], step: int) -> list[str]:
    """Return a line for each value that differs from the checkpoint's."""
    lines = []
    for section in ("training", "data"):
        if section in before:  # older checkpoints carry no configs
            for key, *values in _differences(before[section], now[section]):
                if key not in _NOT_REPORTED and not (key == "precision" and "precision" in before):
                    old, new = map(json.dumps, values)
                    lines.append(f"changed {section}.{key}: {old} -> {new}: {_explain_change(key, before, now, step)}")
    for key in ("precision", "device", "compiled", "train_tokens", "val_tokens"):
        if key in before and before[key] != now[key]:
            lines.append(f"changed {key}: {before[key]} -> {now[key]}: {_explain_change(key, before, now, step)}")
    return lines


def _explain_change(key: str, before: dict[str, Any], now: dict[str, Any], step: int) -> str:
    """Return the consequence of a changed value for the run."""
    old, new = before["training"], now["training"]
    if key in _SCHEDULE:
        then = learning_rate_at(step, TrainingConfig.from_dict(new))
        first = learning_rate_at(step, TrainingConfig.from_dict({**new, **{k: old[k] for k in _SCHEDULE if k in old}}))
        return f"rates follow the new schedule; step {step + 1:,} has {then:.3g}, by the old one {first:.3g}"
    if key == "accumulate_grad_batches":
        tokens = now["data"]["batch_size"] * now["data"]["block_size"]
        return f"a step is {tokens * new[key]:,} tokens from here on; it was {tokens * old[key]:,}"
    if key == "ema_decay":
        if new[key] is None:
            return "the average is dropped: the weights themselves are validated and saved"
        return (
            "the average starts from the weights of the checkpoint"
            if old[key] is None
            else "the average continues with the new decay"
        )
    return _EXPLANATIONS.get(key, f"used from step {step + 1:,} on")


def override_optimizer_hparams(checkpoint: dict[str, Any], model: nn.Module, config: TrainingConfig) -> None:
    """Replace the hyperparameters in a checkpoint's optimizer and scheduler states by those of the config.

    Loading the states unchanged would restore the earlier config's learning rate, weight decay and so on. With equal
    configs the result is bit-identical.
    """
    (state,), (scheduler_state,) = checkpoint["optimizer_states"], checkpoint["lr_schedulers"]
    fresh = build_optimizer(model, config)
    schedule = Schedule(fresh, config, step=scheduler_state["last_epoch"])
    scheduler_state["base_lrs"] = schedule.base_lrs
    for saved, group in zip(state["param_groups"], fresh.param_groups, strict=True):
        parameters = {key: saved[key] for key in ("params", "param_names") if key in saved}
        saved.clear()
        saved.update({**group, **parameters})


# --- truncating newer outputs ---------------------------------------------------------------------------------------


def truncate_run(run: Run, checkpoint: Path | None, step: int) -> None:
    """Delete what was written after ``step``, which a run resumed from ``checkpoint`` will write again.

    At every moment the newest remaining checkpoint has all its metrics, so it is safe to be killed in here.
    """
    remove_leftovers(run.folder)
    _move_folders_aside(run)
    if checkpoint is None:
        run.last_checkpoint.unlink(missing_ok=True)
    else:
        link(checkpoint, run.last_checkpoint)
    for later, path in reversed(run.saved_steps()):
        if later > step:
            path.unlink()
    if run.best_checkpoint.is_file() and _step_of(run.best_checkpoint) > step:
        run.best_checkpoint.unlink()
    if checkpoint is not None:
        _restore_best(run, run.last_checkpoint)
    JsonlLogger(run.metrics).truncate(step)
    truncate_samples(run.samples, step)


def _move_folders_aside(run: Run) -> None:
    """Rename folders in the way of checkpoints: their contents are not ours to delete."""
    for path in run.checkpoints.glob("*.ckpt"):
        if path.is_dir() and not path.is_symlink():
            number = next(n for n in count(1) if not os.path.lexists(path.with_name(f"{path.name}.folder-{n}")))
            path.rename(path.with_name(f"{path.name}.folder-{number}"))


def _restore_best(run: Run, checkpoint: Path) -> None:
    """Restore the ``best.ckpt`` that a checkpoint refers to if it still exists under another name.

    It is missing if the process was killed between two links, or if ``best.ckpt`` was of a later step.
    """
    state = read_checkpoint(checkpoint)
    best = state["callbacks"].get("Validation", {}).get("best_step")
    if not isinstance(best, int):
        return
    file = checkpoint if best == state["global_step"] else run.step_checkpoint(best)
    if file.is_file():
        link(file, run.best_checkpoint)


def _step_of(path: Path) -> float:
    """Return the step of a checkpoint; infinity if it is damaged."""
    try:
        return float(read_checkpoint(path)["global_step"])
    except UserError:
        return math.inf
