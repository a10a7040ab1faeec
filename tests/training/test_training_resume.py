"""Going on from a checkpoint: exactly, from one that can be read, and with a changed config knowingly."""

import io
import os
import random
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny_runs import losses, model, training

from tiny_lm.data import BinDataConfig
from tiny_lm.errors import UserError
from tiny_lm.model.checkpoint import load_checkpoint_model, read_checkpoint
from tiny_lm.runs import Run, read_metrics
from tiny_lm.training import TrainingConfig
from tiny_lm.training.checkpoint_io import AtomicCheckpointIO, link
from tiny_lm.training.fit import TrainingResult, train
from tiny_lm.training.optim import learning_rate_at, weight_decay_share
from tiny_lm.training.resume import find_checkpoint, truncate_run

Fit = Callable[..., TrainingResult]


def names(run: Run) -> list[str]:
    return sorted(path.name for path in run.checkpoints.iterdir())


def find(run: Run) -> tuple[str | None, str]:
    """Return the name of the checkpoint that a run goes on from, and what is told about it."""
    output = io.StringIO()
    found = find_checkpoint(run, Console(file=output, width=2000, soft_wrap=True))
    return found and found.name, output.getvalue()


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "adamw", "ema_decay": 0.9},
        {"optimizer": "muon", "weight_decay_schedule": "linear", "scheduler": "wsd"},
    ],
    ids=lambda options: options["optimizer"],
)
def test_a_resumed_run_repeats_the_unbroken_one_bit_for_bit(options: dict[str, Any], fit: Fit, tmp_path: Path) -> None:
    whole, broken = Run(tmp_path / "whole"), Run(tmp_path / "broken")
    options = {"accumulate_grad_batches": 2, "keep_checkpoints": 9, **options}
    fit(run=whole, **options)
    fit(run=broken, **options)
    fit(run=broken, resume_from=broken.checkpoints / "step-00000004.ckpt", **options)
    assert losses(broken) == losses(whole)  # exactly: dropout, batches, rates and optimizer state are all the same
    rates = {event["step"]: event["lr"] for event in read_metrics(broken.metrics) if "lr" in event}
    assert rates == {event["step"]: event["lr"] for event in read_metrics(whole.metrics) if "lr" in event}
    assert [event["step"] for event in read_metrics(broken.metrics)] == list(range(1, 13))  # nothing stands twice
    final = [load_checkpoint_model(run.last_checkpoint).model.state_dict() for run in (whole, broken)]
    assert all(torch.equal(final[0][key], final[1][key]) for key in final[0])
    groups = [read_checkpoint(run.last_checkpoint)["optimizer_states"][0]["param_groups"] for run in (whole, broken)]
    assert groups[0] == groups[1]


def test_a_checkpoint_inside_a_log_window_keeps_the_mean(fit: Fit, tmp_path: Path) -> None:
    whole, broken = Run(tmp_path / "whole"), Run(tmp_path / "broken")
    fit(run=whole, log_every_n_steps=6)
    fit(run=broken, log_every_n_steps=6, keep_checkpoints=9)
    fit(run=broken, log_every_n_steps=6, resume_from=broken.checkpoints / "step-00000004.ckpt")
    assert losses(broken) == losses(whole)
    assert [event["tokens"] for event in read_metrics(broken.metrics) if "tokens" in event] == [6 * 128, 12 * 128]


def test_going_back_drops_what_came_after(fit: Fit, run: Run) -> None:
    fit(keep_checkpoints=9)
    fit(resume_from=run.checkpoints / "step-00000004.ckpt", max_steps=7, val_every_n_steps=100)
    assert names(run) == ["best.ckpt", "last.ckpt", "step-00000004.ckpt", "step-00000007.ckpt"]
    assert load_checkpoint_model(run.best_checkpoint).step == 7


def test_going_back_holds_from_the_first_moment(fit: Fit, run: Run) -> None:
    """A process that is killed right after it was sent back does not go on from the future."""
    fit(keep_checkpoints=9)
    truncate_run(run, run.step_checkpoint(4), 4)
    assert names(run) == ["last.ckpt", "step-00000004.ckpt"]
    assert read_checkpoint(run.last_checkpoint)["global_step"] == 4
    assert max(losses(run)) == 4
    assert find(run) == ("last.ckpt", "")


# --- what a killed process leaves ------------------------------------------------------------------------------------


def test_a_checkpoint_that_has_no_second_name_yet_counts(fit: Fit, run: Run, tmp_path: Path) -> None:
    """Killed between step-00000012.ckpt and last.ckpt, then between last.ckpt and best.ckpt."""
    fit(keep_checkpoints=9, val_every_n_steps=4)
    best = read_checkpoint(run.best_checkpoint)["global_step"]
    assert best == 12
    for path in (run.last_checkpoint, run.best_checkpoint):
        path.unlink()
        link(run.step_checkpoint(4), path)
    assert find(run) == ("step-00000012.ckpt", "")
    fit(resume_from=run.step_checkpoint(12), max_steps=13, val_every_n_steps=100)
    record = load_checkpoint_model(run.best_checkpoint)
    assert record.step in (12, 13)  # whichever is better, but not the one before


def test_best_is_a_checkpoint_to_go_on_from(fit: Fit, run: Run) -> None:
    """A validation that was better than all before, with no other checkpoint since."""
    fit(max_steps=12, save_every_n_steps=100, val_every_n_steps=4)
    for path in (run.last_checkpoint, run.step_checkpoint(12)):
        path.unlink()
    assert find(run) == ("best.ckpt", "")


def test_a_best_model_that_is_lost_is_forgotten(fit: Fit, run: Run) -> None:
    """Its loss would keep later ones, which are worse, from being kept."""
    fit(val_every_n_steps=4, save_every_n_steps=2, keep_checkpoints=9)
    run.step_checkpoint(8).unlink()  # the best one as far as step 10 knows; best.ckpt is that of step 12
    result = fit(resume_from=run.step_checkpoint(10), val_every_n_steps=4, learning_rate=3.0, scheduler="none")
    curve = [event["val_loss"] for event in read_metrics(run.metrics) if "val_loss" in event]
    assert curve[-1] > curve[-2]  # of steps 12 and 8
    assert read_checkpoint(run.best_checkpoint)["global_step"] == 12
    assert result.metrics["best_val_loss"] == curve[-1]


def test_leftovers_of_killed_processes_are_removed(fit: Fit, run: Run) -> None:
    """Also of one that had our process number, and died between a link and its rename."""
    fit(max_steps=4)
    before = (run.step_checkpoint(4)).read_bytes()
    torn = run.checkpoints / ".step-00000008.ckpt.4711.tmp"
    torn.write_bytes(before[:1000])
    os.link(run.step_checkpoint(4), run.checkpoints / f".last.ckpt.{os.getpid()}.tmp")
    (run.folder / f".run.json.{os.getpid()}.tmp").write_text("{")
    (run.folder / ".mine.tmp").write_text("not ours")
    assert find(run) == ("last.ckpt", "")
    fit(resume_from=run.last_checkpoint, max_steps=8, val_every_n_steps=8)
    assert not [path.name for path in run.folder.rglob(".*.tmp") if path.name != ".mine.tmp"]
    assert (run.step_checkpoint(4)).read_bytes() == before


def test_a_second_name_never_writes_into_the_first_file(tmp_path: Path) -> None:
    """A leftover of this process number is a name of the older file: copying into it would change that one."""
    for name in ("old", "new"):
        (tmp_path / name).write_text(name)
    os.link(tmp_path / "old", tmp_path / f".last.{os.getpid()}.tmp")
    link(tmp_path / "new", tmp_path / "last")
    assert [(tmp_path / name).read_text() for name in ("old", "new", "last")] == ["old", "new", "new"]


@pytest.mark.parametrize("disk_has_links", [True, False])
def test_old_checkpoints_go_and_the_best_one_stays(
    disk_has_links: bool, fit: Fit, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(95, "Operation not supported")

    if not disk_has_links:
        monkeypatch.setattr(os, "link", refuse)
    fit(keep_checkpoints=2, val_every_n_steps=4, save_every_n_steps=2)
    fit(resume_from=run.last_checkpoint, keep_checkpoints=2, max_steps=20, learning_rate=1.0, val_every_n_steps=4)
    assert names(run) == ["best.ckpt", "last.ckpt", "step-00000016.ckpt", "step-00000020.ckpt"]
    best = load_checkpoint_model(run.best_checkpoint)
    curve = {event["step"]: event["val_loss"] for event in read_metrics(run.metrics) if "val_loss" in event}
    assert best.step == min(curve, key=lambda step: curve[step]) <= 12


def test_steps_are_counted_as_numbers(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.checkpoints.mkdir()
    for step in (100_000_000, 99_999_999, 7):
        run.step_checkpoint(step).touch()
    (run.checkpoints / "step-best.ckpt").touch()
    assert [step for step, _ in run.saved_steps()] == [7, 99_999_999, 100_000_000]


def test_two_processes_do_not_train_in_one_folder(fit: Fit, run: Run) -> None:
    """And one that is killed holds nothing back."""
    fit(max_steps=1)
    code = f"""
import time
from pathlib import Path
from tiny_lm.runs import Run
with Run(Path({str(run.folder)!r})).claim():
    print("claimed", flush=True)
    time.sleep(1000)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "claimed\n"
        with pytest.raises(UserError, match="another process is training this run"):
            fit(resume_from=run.last_checkpoint, max_steps=2)
        other.kill()
    assert fit(resume_from=run.last_checkpoint, max_steps=2).steps == 2


# --- damaged checkpoints ---------------------------------------------------------------------------------------------


def spoil(path: Path, how: str) -> None:
    """Damage a file under a name of its own: other names of it stay whole."""
    content = bytearray(path.read_bytes())
    if how == "bit-flipped":
        content[len(content) // 2] ^= 1
    whole = {"truncated": content[: len(content) * 2 // 3], "empty": b"", "bit-flipped": content}[how]
    path.unlink()
    path.write_bytes(whole)


@pytest.mark.parametrize("how", ["truncated", "empty", "bit-flipped"])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(how: str, fit: Fit, run: Run) -> None:
    fit()
    assert find(run) == ("last.ckpt", "")
    spoil(run.last_checkpoint, how)
    name, told = find(run)
    assert name == "step-00000012.ckpt"
    assert told.count("\n") == 1
    spoil(run.step_checkpoint(12), how)
    spoil(run.best_checkpoint, how)
    name, told = find(run)
    assert name == "step-00000008.ckpt"
    (line,) = told.splitlines()
    assert line.startswith(f"warning: {run.last_checkpoint}: is damaged")
    assert f"{run.step_checkpoint(12)}: is damaged" in line
    assert line.endswith(f"; resuming from {run.step_checkpoint(8)} of step 8")
    whole = losses(run)
    fit(resume_from=run.step_checkpoint(8))
    assert losses(run) == whole
    assert read_checkpoint(run.best_checkpoint, whole=True)["global_step"] == 12
    assert find(run) == ("last.ckpt", "")


def test_where_all_are_damaged_nothing_is_gone_on_from(fit: Fit, run: Run) -> None:
    fit(max_steps=4)
    for path in run.checkpoints.iterdir():
        spoil(path, "truncated")
    with pytest.raises(UserError, match=r"none of its checkpoints can be read \(.*last.ckpt: is damaged") as error:
        find(run)
    assert "\n" not in str(error.value)


def test_a_damaged_checkpoint_that_is_named_is_an_error(fit: Fit, run: Run) -> None:
    fit(max_steps=4)
    spoil(run.step_checkpoint(4), "bit-flipped")
    with pytest.raises(UserError, match=r"step-00000004.ckpt: is damaged \(wrong checksum of its part .*\)"):
        fit(resume_from=run.step_checkpoint(4), max_steps=8)


def test_any_flipped_bit_is_found_or_means_nothing(fit: Fit, run: Run, tmp_path: Path) -> None:
    """200 places all over the file, and each of its last 200 bytes, where a zip file has its table."""
    fit(max_steps=1, val_every_n_steps=9)
    content = run.last_checkpoint.read_bytes()
    whole = read_checkpoint(run.last_checkpoint)
    spoilt, random_places = tmp_path / "spoilt.ckpt", random.Random(0).sample(range(len(content)), 200)
    found = 0
    for place in [*random_places, *range(len(content) - 200, len(content))]:
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        spoilt.write_bytes(changed)
        try:
            checkpoint = read_checkpoint(spoilt, whole=True)
        except UserError as error:
            assert "\n" not in str(error)
            found += 1
        else:
            assert all(
                torch.equal(whole["state_dict"][key], checkpoint["state_dict"][key]) for key in whole["state_dict"]
            )
            assert str(whole["optimizer_states"]) == str(checkpoint["optimizer_states"])
    assert found > 250


def test_a_write_that_goes_wrong_is_noticed_and_leaves_the_good_one(
    fit: Fit, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk says that it wrote, and did not: the file is read back before it gets its name."""
    fit(max_steps=4)
    good = run.last_checkpoint.read_bytes()
    save = torch.save

    def save_badly(checkpoint: Any, file: Any) -> None:
        save(checkpoint, file)
        file.seek(30_000)
        file.write(b"\0" * 512)

    monkeypatch.setattr(torch, "save", save_badly)
    with pytest.raises(UserError, match=r"/best.ckpt: could not be read back.*; the last good checkpoint is \S+4.ckpt"):
        fit(resume_from=run.last_checkpoint)
    assert run.last_checkpoint.read_bytes() == good
    assert names(run) == ["best.ckpt", "last.ckpt", "step-00000004.ckpt"]


@pytest.mark.parametrize("limit", [1_000, 50_000, 100_000, 150_000, 450_000, 1_100_000, 1_200_000])
def test_wherever_the_disk_is_full_the_error_says_so(limit: int, tmp_path: Path) -> None:
    """At some places torch raises an error of its own over that of the disk; the limit stands for a full disk."""
    path = tmp_path / "step.ckpt"
    path.write_text("the one before")
    weights = {str(number): torch.zeros(25_000) for number in range(12)}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        with pytest.raises(UserError, match=r"^\S+/step.ckpt: could not be written \(File too large\)$"):
            AtomicCheckpointIO().save_checkpoint(weights, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("step.ckpt", "the one before")]


def test_a_disk_that_is_full_for_metrics_ends_the_run_in_one_line(fit: Fit, run: Run, tmp_path: Path) -> None:
    """The limit on the size of a file stands for the end of the disk; it falls into the middle of a line."""
    whole = Run(tmp_path / "whole")
    fit(run=whole, keep_checkpoints=9)
    fit(keep_checkpoints=9)
    with run.metrics.open("a") as file:
        file.writelines(f'{{"step": 4, "padding": "{"x" * 1000}"}}\n' for _ in range(1000))
    truncate_run(run, run.step_checkpoint(4), 4)
    good = run.last_checkpoint.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (run.metrics.stat().st_size + 50, limits[1]))
    try:
        with pytest.raises(UserError, match=r"metrics.jsonl: could not be written \(File too large\)"):
            fit(resume_from=run.last_checkpoint, keep_checkpoints=9)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not run.metrics.read_text().endswith("\n")  # a torn line
    assert run.read_metadata()["status"] == "failed"
    assert run.last_checkpoint.read_bytes() == good
    fit(resume_from=run.last_checkpoint, keep_checkpoints=9)
    assert losses(run) == losses(whole)


# --- another config --------------------------------------------------------------------------------------------------


def test_what_must_not_change(fit: Fit, run: Run) -> None:
    fit()
    with pytest.raises(UserError, match=r"holds another model than the model config \(d_model 32 and not 64\); resume"):
        fit(resume_from=run.last_checkpoint, config=model(d_model=64))
    with pytest.raises(
        UserError, match="is at step 12 of max_steps 12, so nothing is left to train; to continue, raise"
    ):
        fit(resume_from=run.last_checkpoint)
    with pytest.raises(UserError, match="trained with optimizer adamw and not muon: the checkpoint holds the state"):
        fit(resume_from=run.last_checkpoint, optimizer="muon", max_steps=20)
    with pytest.raises(UserError, match="trained with seed 0 and not 1: the order of batches would change"):
        fit(resume_from=run.last_checkpoint, seed=1, max_steps=20)


@pytest.fixture
def go_on(run: Run, data_config: Callable[..., BinDataConfig]) -> Callable[..., list[str]]:
    """Go on from step 4 with some values changed; return what is told about them."""

    def do(step: int = 4, data: dict[str, Any] | None = None, **values: Any) -> list[str]:
        output = io.StringIO()
        train(
            model(),
            training(**{"keep_checkpoints": 9, **values}),
            data_config(**(data or {})),
            run,
            resume_from=run.step_checkpoint(step),
            console=Console(file=output, width=2000),
        )
        return [line for line in output.getvalue().splitlines() if line.startswith("changed ")]

    return do


def test_what_changes_is_told_with_its_meaning(fit: Fit, run: Run, go_on: Callable[..., list[str]]) -> None:
    fit(keep_checkpoints=9)
    assert go_on(run_name="x") == []
    old, new = (learning_rate_at(4, training(max_steps=steps)) for steps in (12, 14))
    assert go_on(max_steps=14, save_every_n_steps=2, weight_decay=0.0, ema_decay=0.5) == [
        f"changed training.max_steps: 12 -> 14: rates follow the new schedule; step 5 has {new:.3g}, by the old one "
        f"{old:.3g}",
        "changed training.weight_decay: 0.1 -> 0.0: used from step 5 on",
        "changed training.ema_decay: null -> 0.5: the average starts from the weights of the checkpoint",
        "changed training.save_every_n_steps: 4 -> 2: the weights are not affected",
    ]
    assert go_on(step=8, weight_decay=0.0, accumulate_grad_batches=3, data={"num_workers": 2})[1:] == [
        "changed training.ema_decay: 0.5 -> null: the average is dropped: the weights themselves are "
        "validated and saved",
        "changed training.accumulate_grad_batches: 1 -> 3: a step is 384 tokens from here on; it was 128",
        "changed training.save_every_n_steps: 2 -> 4: the weights are not affected",
        "changed data.num_workers: 0 -> 2: the weights are not affected",
    ]


def test_a_changed_config_prevails_over_the_checkpoints(fit: Fit, run: Run, go_on: Callable[..., Any]) -> None:
    """The rates, decays and options that the optimizer really uses, as later checkpoints show them."""
    fit(keep_checkpoints=9)
    changes = {
        "max_steps": 10,
        "learning_rate": 1e-3,
        "scheduler": "linear",
        "weight_decay": 0.05,
        "weight_decay_schedule": "linear",
        "embedding_learning_rate": 4e-3,
        "embedding_weight_decay": 0.01,
        "betas": [0.8, 0.9],
        "eps": 1e-7,
        "save_every_n_steps": 1,
    }
    go_on(**changes)
    config = TrainingConfig.from_dict({**training().to_dict(), **changes})
    for step in range(5, 10):
        matrices, embeddings, vectors = read_checkpoint(run.step_checkpoint(step))["optimizer_states"][0][
            "param_groups"
        ]
        assert matrices["lr"] == pytest.approx(learning_rate_at(step, config), rel=1e-12)
        assert vectors["lr"] == matrices["lr"]
        assert embeddings["lr"] == pytest.approx(4 * matrices["lr"], rel=1e-12)
        share = weight_decay_share(step, config)
        assert matrices["weight_decay"] == pytest.approx(0.05 * share, rel=1e-12)
        assert embeddings["weight_decay"] == pytest.approx(0.01 * share, rel=1e-12)
        assert vectors["weight_decay"] == 0
        assert (matrices["betas"], matrices["eps"]) == ((0.8, 0.9), 1e-7)
    rates = {event["step"]: event["lr"] for event in read_metrics(run.metrics)}
    assert rates[5] == learning_rate_at(4, config)


def test_the_first_step_after_a_change_already_has_the_new_rate(fit: Fit, run: Run, go_on: Callable[..., Any]) -> None:
    """With a rate of almost nothing the weights stay almost where they are."""
    fit(keep_checkpoints=9)
    before = load_checkpoint_model(run.step_checkpoint(4)).model.state_dict()
    go_on(learning_rate=1e-12, max_steps=5)
    after = load_checkpoint_model(run.step_checkpoint(5)).model.state_dict()
    assert max(float((before[key] - after[key]).abs().max()) for key in before) < 1e-9


def test_another_accumulation_takes_whole_steps(fit: Fit, run: Run, go_on: Callable[..., Any]) -> None:
    """Four steps of one micro-batch, then steps of three: all the windows that were to come, three times as fast."""
    fit(keep_checkpoints=9)
    go_on(accumulate_grad_batches=3, max_steps=6)
    tokens = {event["step"]: event["tokens"] for event in read_metrics(run.metrics) if "tokens" in event}
    assert tokens == {1: 128, 2: 256, 3: 384, 4: 512, 5: 896, 6: 1280}
    assert read_checkpoint(run.last_checkpoint)["BinTokenDataModule"]["windows_seen"] == 4 * 4 + 2 * 12
    assert losses(run)[6] == pytest.approx(6.1, abs=0.3)
