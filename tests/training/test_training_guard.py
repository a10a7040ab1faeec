"""A loss that is no number, or jumps: what is told, and what is never saved."""

import io
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from tiny_runs import losses, model, training

from tiny_lm.data import BinDataConfig, StreamMetadata
from tiny_lm.errors import UserError
from tiny_lm.model.checkpoint import load_checkpoint_model, read_checkpoint
from tiny_lm.runs import Run
from tiny_lm.tokenizer import Tokenizer
from tiny_lm.training.fit import TrainingResult, train

Fit = Callable[..., TrainingResult]

# Finite until the first update, whose weights overflow: the loss of step 2 is no number.
EXPLODING = {
    "learning_rate": 10.0,
    "warmup_ratio": 0.0,
    "scheduler": "none",
    "max_steps": 60,
    "grad_clip_norm": 0,
    "weight_decay": 3e38,
    "save_every_n_steps": 50,
    "val_every_n_steps": 50,
}


def test_a_loss_that_is_no_number_ends_the_run_in_one_line(fit: Fit, run: Run) -> None:
    """The step is the exact one, inside a log window; so is the micro-batch."""
    with pytest.raises(UserError) as error:
        fit(**EXPLODING, log_every_n_steps=50, accumulate_grad_batches=2)
    message = str(error.value)
    assert "\n" not in message
    assert re.search(r"the loss is (nan|inf) at step 2, in micro-batch 2 \(epoch 0, sequences \d+, ", message)
    assert "no checkpoint was written yet; start again with a lower rate: tiny-lm train --resume" in message
    assert message.endswith("--set training.learning_rate=5")
    assert json.loads(run.metadata_file.read_text())["status"] == "failed"
    assert not list(run.checkpoints.glob("*"))


def test_the_text_of_the_batch_is_the_one_that_was_trained_on(
    fit: Fit, run: Run, data_config: Callable[..., BinDataConfig], tokenizer: Tokenizer
) -> None:
    """Of the tokens that the file names, read from the stream by hand."""
    with pytest.raises(UserError):
        fit(**EXPLODING, log_every_n_steps=1)
    (file,) = run.batches.iterdir()
    assert file.name == "00000001.txt"
    text = file.read_text()
    assert text.startswith("step 2, micro-batch 1, epoch 0, loss ")
    stream = np.fromfile(data_config().train_path, dtype="<u2")
    places = re.findall(r"--- sequence (\d+): (\S+), tokens (\d+) to (\d+) ---\n(.*?)\n(?=\n---|\Z)", text, re.DOTALL)
    assert len(places) == 4
    for window, path, start, stop, quoted in places:
        assert path == data_config().train_path
        assert int(start) == int(window) * 32
        assert quoted == tokenizer.decode(stream[int(start) : int(stop)].tolist(), skip_special=False)


def test_a_spoilt_model_is_not_saved_though_its_loss_was_a_number(fit: Fit, run: Run) -> None:
    """The weights overflow in the update of the step that a checkpoint is due after."""
    fit(max_steps=4)
    good = run.last_checkpoint.read_bytes()
    broken = {**EXPLODING, "save_every_n_steps": 5, "val_every_n_steps": 60, "log_every_n_steps": 60}
    with pytest.raises(
        UserError,
        match=r"^step 5 left NaN or infinite weights: the last good checkpoint is .*step-0{7}4.ckpt; resume",
    ):
        fit(**broken, resume_from=run.last_checkpoint)
    assert run.last_checkpoint.read_bytes() == good
    assert load_checkpoint_model(run.best_checkpoint).step == 4
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["best.ckpt", "last.ckpt", "step-00000004.ckpt"]


def test_a_loss_that_is_no_number_is_seen_before_the_next_checkpoint(fit: Fit, run: Run) -> None:
    """Also where no log window closes between; a validation is no way around it."""
    fit(max_steps=4)
    broken = {**EXPLODING, "save_every_n_steps": 8, "val_every_n_steps": 8, "log_every_n_steps": 60}
    with pytest.raises(UserError, match=r"the loss is (nan|inf) at step 6, in micro-batch 5 "):
        fit(**broken, resume_from=run.last_checkpoint)
    assert read_checkpoint(run.last_checkpoint)["global_step"] == 4
    assert read_checkpoint(run.best_checkpoint)["global_step"] == 4
    assert all(math.isfinite(loss) for loss in losses(run).values())


# --- jumps -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def junk_stream(tmp_path: Path, stream_folder: Path) -> Path:
    """A stream that repeats two tokens for 199 of 200 windows, with one window of noise in it: window 120."""
    folder = tmp_path / "stream"
    folder.mkdir()
    metadata = StreamMetadata.read(stream_folder).to_dict()
    ids = np.tile(np.array([300, 301], dtype="<u2"), 200 * 16)
    ids = np.append(ids, ids[:1])
    ids[120 * 32 + 1 : 121 * 32] = np.random.default_rng(0).integers(4, 500, size=31)
    ids.tofile(folder / "train.bin")
    metadata["files"]["train.bin"]["tokens"] = len(ids)
    (folder / "metadata.json").write_text(json.dumps(metadata))
    (folder / "tokenizer").symlink_to(stream_folder / "tokenizer")
    return folder


@pytest.fixture
def train_on_it(junk_stream: Path, data_config: Callable[..., BinDataConfig], run: Run) -> Callable[..., str]:
    """Train for one epoch on one window a step, and return the warnings."""

    def do(run: Run = run, resume_from: Path | None = None, **values: Any) -> str:
        data = data_config(train_path=str(junk_stream / "train.bin"), batch_size=1)
        defaults = {
            "max_steps": 200,
            "log_every_n_steps": 50,
            "save_every_n_steps": 30,
            "val_every_n_steps": 1000,
            "val_max_tokens": 64,
            "learning_rate": 2e-3,
            "sample_tokens": 0,
            "keep_checkpoints": 100,
            "seed": 3,
        }
        output = io.StringIO()
        console = Console(file=output, width=2000)
        train(
            model(dropout=0.0), training(**{**defaults, **values}), data, run, resume_from=resume_from, console=console
        )
        others = ("step ", "training on ")
        return "\n".join(line for line in output.getvalue().splitlines() if not line.startswith(others))

    return do


Train = Callable[..., str]


def step_of(message: str) -> int:
    found = re.search(r"at step (\d+)", message)
    assert found is not None
    return int(found[1])


def test_a_jump_is_told_once_with_step_batch_and_checkpoint(train_on_it: Train, run: Run) -> None:
    (warning,) = train_on_it(log_every_n_steps=1).splitlines()
    curve = losses(run)
    step = max((step for step in curve if step > 20), key=lambda step: curve[step])
    past = min(step - 1, 100)
    assert re.search(
        rf"^warning: the loss is {curve[step]:.3f} at step {step}, \d+\.\d\d nats above the median of the {past} steps "
        rf"before, worst in micro-batch {step - 1} \(epoch 0, sequences 120; its text is in \S+/{step - 1:08}\.txt\); ",
        warning,
    )
    saved = (step - 1) // 30 * 30
    assert saved > 0
    assert warning.endswith(f"the last good checkpoint is {run.step_checkpoint(saved)}")


def test_a_jump_above_the_threshold_ends_the_run(train_on_it: Train, run: Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"sequences 120; .*spike_threshold is 3\.0: the last good") as error:
        train_on_it(spike_threshold=3.0)
    assert max(saved for saved, _ in run.saved_steps()) < step_of(str(error.value))
    assert train_on_it(run=Run(tmp_path / "calm"), spike_threshold=20.0) == ""


def test_a_loss_that_climbs_from_the_first_steps_on_is_told(
    fit: Fit, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """Far above what knowing nothing costs (ln 512 = 6.2), though there is no usual loss yet to compare with."""
    wild = {"learning_rate": 10.0, "warmup_ratio": 0.0, "grad_clip_norm": 0, "weight_decay": 0.0}
    fit(**wild, config=model(dropout=0.0))
    curve = losses(run)
    line = capsys.readouterr().err.replace("\n", " ").split("warning: ")[1]
    found = re.match(r"the loss is (\S+) at step (\d+), (\S+) nats above (the step|the highest of the) ", line)
    assert found is not None, line
    loss, step, rise = float(found[1]), int(found[2]), float(found[3])
    before = [curve[number] for number in range(1, step)]
    assert loss == pytest.approx(curve[step], abs=1e-3)
    assert rise == pytest.approx(curve[step] - max(before), abs=1e-2)
    assert rise > 2
    with pytest.raises(UserError, match=r"spike_threshold is 1\.0"):
        fit(**wild, config=model(dropout=0.0), spike_threshold=1.0)


def test_a_resumed_run_tells_the_same_jump(train_on_it: Train, run: Run) -> None:
    """What a loss is compared with travels in the checkpoint."""
    told = train_on_it()
    before = run.step_checkpoint((step_of(told) - 1) // 30 * 30)
    assert train_on_it(resume_from=before) == told


def test_the_largest_weight_is_found_also_if_it_is_no_number() -> None:
    """What the guard leaves to torch: the infinity norm keeps NaN and infinity."""
    for bad in (math.nan, math.inf, -math.inf):
        weights = [torch.ones(3), torch.tensor([[1.0, bad]])]
        assert not torch.nn.utils.get_total_norm(weights, norm_type=math.inf).isfinite()
