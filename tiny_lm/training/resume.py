"""Going on from a checkpoint: what must agree, and what is forgotten."""

from pathlib import Path
from typing import Any

from tiny_lm.errors import UserError
from tiny_lm.model.checkpoint import CHECKPOINT_KEY, read_checkpoint
from tiny_lm.runs import Run
from tiny_lm.training.trackers import JsonlLogger

_KEPT_WHEN_RESUMING = {
    "tokenizer_hash": "the text was encoded by another tokenizer",
    "optimizer": "the state in the checkpoint is another optimizer's",
    "seed": "other batches would follow",
    "batch_size": "other batches would follow",
    "block_size": "other batches would follow",
    "stride": "other batches would follow",
}


def check_resume(path: Path, identity: dict[str, Any], max_steps: int) -> int:
    """Return the step of a checkpoint that this run can go on from."""
    checkpoint = read_checkpoint(path)
    ours = checkpoint[CHECKPOINT_KEY]
    if ours["model"] != identity["model"]:
        raise UserError(f"{path}: holds another model than the model config; resume with the run's own configs")
    for key, why in _KEPT_WHEN_RESUMING.items():
        if ours.get(key) != identity[key]:
            raise UserError(f"{path}: was trained with {key} {ours.get(key)} and not {identity[key]}: {why}")
    step = int(checkpoint["global_step"])
    if step >= max_steps:
        raise UserError(f"{path}: stands at step {step} of max_steps {max_steps}: nothing is left to train")
    return step


def forget_after(run: Run, step: int) -> None:
    """Drop metrics and checkpoints of later steps, which a run that goes on from ``step`` is about to write again."""
    JsonlLogger(run.metrics).drop_after(step)
    for checkpoint in [*run.checkpoints.glob("step-*.ckpt"), run.best_checkpoint]:
        if checkpoint.is_file() and read_checkpoint(checkpoint)["global_step"] > step:
            checkpoint.unlink()
