"""Trackers: the real libraries, offline, and what happens to a run when one of them fails."""

import io
import json
import os
import signal
import socket
import sqlite3
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from pytorch_lightning.loggers.logger import Logger
from rich.console import Console
from tiny_runs import model, training

from tiny_lm.data import BinDataConfig
from tiny_lm.errors import UserError
from tiny_lm.runs import Run, mean_over_time, read_metrics
from tiny_lm.tracking.loggers import FailSafeLogger, check_loggers
from tiny_lm.training import TrainingConfig
from tiny_lm.training.fit import train

Fit = Callable[..., str]


@pytest.fixture
def fit(data_config: Callable[..., BinDataConfig], run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Fit:
    """Train for four steps with these trackers, without a network; return what was printed for the user."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("TRACKIO_PROJECT", raising=False)
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "trackio")
    connect = socket.socket.connect

    def refuse(self: socket.socket, address: Any) -> Any:
        assert self.family == socket.AF_UNIX, f"a tracker connects to {address}"
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", refuse)

    def do(*trackers: str, resume_from: Path | None = None, **values: Any) -> str:
        config = training(
            **{"max_steps": 4, "trackers": list(trackers), "sample_tokens": 0, "save_every_n_steps": 2, **values}
        )
        output = io.StringIO()
        train(model(), config, data_config(), run, resume_from=resume_from, console=Console(file=output, width=1000))
        return output.getvalue()

    return do


def scalars(run: Run, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(run.folder / "tensorboard"))
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(tag)]


def test_tensorboard_has_the_curve_and_the_configs(fit: Fit, run: Run) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert "warning" not in fit("tensorboard")
    expected = {event["step"]: event["train_loss"] for event in read_metrics(run.metrics)}
    assert dict(scalars(run, "train_loss")) == pytest.approx(expected)
    accumulator = EventAccumulator(str(run.folder / "tensorboard"))
    accumulator.Reload()
    text = accumulator.Tensors("configs/text_summary")[0].tensor_proto.string_val[0].decode()
    assert '"learning_rate": 0.003' in text


def test_a_resumed_run_goes_on_in_tensorboard_without_doubles(fit: Fit, run: Run) -> None:
    fit("tensorboard")
    fit("tensorboard", resume_from=run.checkpoints / "step-00000002.ckpt")
    assert [step for step, _ in scalars(run, "train_loss")] == [1, 2, 3, 4]


def test_wandb_writes_a_run_offline(fit: Fit, run: Run) -> None:
    assert "warning" not in fit("wandb", "tensorboard")
    (file,) = (run.folder / "wandb").glob(f"offline-run-*-{run.name}/run-{run.name}.wandb")
    content = file.read_bytes()
    assert b"train_loss" in content
    assert b"tokens_per_sec" in content
    assert b"warmup_ratio" in content  # of the configs
    assert scalars(run, "train_loss")  # several trackers at once
    import wandb

    assert wandb.run is None  # it is ended, so that the next one in this process is another one


def test_trackio_has_the_curve_and_the_configs(
    fit: Fit, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRACKIO_PROJECT", "stories")
    assert "warning" not in fit("trackio")
    assert capfd.readouterr().out == ""  # standard output is for results
    database = sqlite3.connect(tmp_path / "trackio" / "stories.db")
    rows = database.execute(
        "select step, metrics from metrics where run_name = ? order by step", (run.name,)
    ).fetchall()
    configs = database.execute("select config from configs where run_name = ?", (run.name,)).fetchall()
    database.close()
    losses = {step: json.loads(metrics)["train_loss"] for step, metrics in rows}
    assert losses == pytest.approx({event["step"]: event["train_loss"] for event in read_metrics(run.metrics)})
    assert json.loads(configs[0][0])["training.learning_rate"] == 0.003


def test_a_tracker_that_cannot_start_costs_one_line_and_the_others_nothing(fit: Fit, run: Run, tmp_path: Path) -> None:
    """All that there are at once; of each name one, however often it stands there."""
    run.folder.mkdir(parents=True)
    (run.folder / "tensorboard").write_text("in the way")
    output = fit("tensorboard", "wandb", "jsonl", "trackio", "wandb")
    assert list((run.folder / "wandb").glob("offline-run-*"))
    with closing(sqlite3.connect(tmp_path / "trackio" / "tiny-lm.db")) as database:
        assert database.execute("select count(*) from metrics where run_name = ?", (run.name,)).fetchone() == (4,)
    assert output.count("warning: the logger tensorboard failed and is disabled") == 1
    assert json.loads(run.metadata_file.read_text())["status"] == "finished"
    assert len(read_metrics(run.metrics)) == 4


def test_wandb_that_dies_in_the_middle_does_not_cost_the_run(
    fit: Fit, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its service process is killed after the second step."""
    from tiny_lm.training.callbacks.metrics import MetricsWriter

    write = MetricsWriter.on_step_end

    def kill_and_write(self: MetricsWriter, trainer: Any, module: Any, step: int) -> None:
        if step == 3:
            (service,) = wandb_services()
            os.kill(service, signal.SIGKILL)
        write(self, trainer, module, step)

    monkeypatch.setattr(MetricsWriter, "on_step_end", kill_and_write)
    output = fit("wandb")
    assert output.count("warning: the logger wandb failed and is disabled") == 1
    assert json.loads(run.metadata_file.read_text())["status"] == "finished"
    assert len(read_metrics(run.metrics)) == 4


def wandb_services() -> list[int]:
    """The processes that wandb started for this one."""
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        with suppress(OSError):
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
            if fields["PPid"].strip() == str(os.getpid()) and "wandb" in fields["Name"]:
                found.append(int(fields["Pid"]))
    return found


class Failing(Logger):
    """A tracker that fails at one of its calls."""

    def __init__(self, at: str) -> None:
        super().__init__()
        self.at = at
        self.calls: list[str] = []

    @property
    def name(self) -> str:
        return "failing"

    @property
    def version(self) -> int:
        return 0

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if self.at == name:
            raise ConnectionError("no route to\nhost")

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self._call("log_hyperparams")

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self._call(f"log_metrics {step}")

    def finalize(self, status: str) -> None:
        self._call("finalize")


@pytest.mark.parametrize("at", ["log_hyperparams", "log_metrics 2", "finalize"])
def test_wherever_a_tracker_fails_the_run_goes_on(
    at: str, data_config: Callable[..., BinDataConfig], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing, output = Failing(at), io.StringIO()
    console = Console(file=output, width=1000)
    monkeypatch.setattr(
        "tiny_lm.training.fit.build_loggers",
        lambda names, run, step, console: [
            *build([], run, step, console),
            FailSafeLogger("wandb", lambda: failing, console),
        ],
    )
    from tiny_lm.tracking.loggers import build_loggers as build

    result = train(model(), training(max_steps=4, sample_tokens=0), data_config(), run, console=console)
    assert result.finished
    assert output.getvalue().count("warning") == 1
    assert "the logger wandb failed and is disabled (ConnectionError: no route to host)" in output.getvalue()
    calls = ["log_hyperparams", *(f"log_metrics {step}" for step in range(1, 5)), "finalize"]
    # Afterwards it is left alone, until the end.
    assert failing.calls == [*calls[: calls.index(at) + 1], *([] if at == "finalize" else ["finalize"])]
    assert len(read_metrics(run.metrics)) == 4


def test_a_missing_extra_is_named_before_anything_is_written(
    fit: Fit, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "wandb").mkdir()  # a folder of that name is no library
    monkeypatch.chdir(tmp_path)
    found = dict.fromkeys(("wandb", "trackio"))
    from importlib.util import find_spec

    monkeypatch.setattr("importlib.util.find_spec", lambda name: found[name] if name in found else find_spec(name))
    with pytest.raises(UserError, match=r"trackers: trackio is not installed; .*pip install 'tiny-lm\[trackio\]'"):
        fit("jsonl", "trackio")
    assert not run.folder.exists()
    with pytest.raises(UserError, match=r"pip install 'tiny-lm\[wandb\]'"):
        check_loggers(["wandb"])


def test_an_unknown_tracker_is_refused() -> None:
    with pytest.raises(UserError, match="trackers"):
        TrainingConfig.from_dict({"max_steps": 1, "learning_rate": 1e-3, "trackers": ["mlflow"]})


def test_mean_over_time_weights_windows_with_their_duration() -> None:
    events = [{"step": 1, "tokens": 100, "tokens_per_sec": 100.0}, {"step": 2, "val_loss": 1.0}]
    events += [{"step": 3, "tokens": 200, "tokens_per_sec": 50.0}]
    assert mean_over_time(events, "tokens_per_sec") == pytest.approx(200 / 3)


def test_processes_of_higher_rank_log_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_utilities.core.rank_zero import rank_zero_only

    failing = Failing("nowhere")
    guarded = FailSafeLogger("wandb", lambda: failing, Console(file=io.StringIO()))
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    guarded.log_hyperparams({})
    guarded.log_metrics({"train_loss": 1.0}, 1)
    guarded.finalize("success")
    assert failing.calls == []
