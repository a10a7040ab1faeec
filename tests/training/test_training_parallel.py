"""Several processes train what one would: they share each step's windows and agree on everything else."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning_fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from tiny_runs import losses, model, training
from two_processes import TORCHRUN, assert_same_run, environment, free_port, start_two_processes

from tiny_lm.data import BinDataConfig
from tiny_lm.errors import UserError
from tiny_lm.model.checkpoint import load_checkpoint_model
from tiny_lm.runs import Run, read_metrics
from tiny_lm.training.distributed import get_distributed_context, kill_workers, split_global_batch
from tiny_lm.training.fit import train
from tiny_lm.training.launch import PARENT_KEY

SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "training" / "train_gpt2.py"


# --- splitting a batch --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch_size", "accumulate", "world_size", "micro_batch", "accumulated"),
    [(16, 1, 1, 16, 1), (16, 4, 2, 16, 2), (16, 1, 2, 8, 1), (16, 3, 2, 12, 2), (16, 3, 4, 12, 1), (6, 5, 3, 5, 2)],
)
def test_each_process_takes_its_share_of_a_step(
    batch_size: int, accumulate: int, world_size: int, micro_batch: int, accumulated: int
) -> None:
    share = split_global_batch(batch_size, accumulate, world_size)
    assert (share.micro_batch, share.accumulate_grad_batches) == (micro_batch, accumulated)


@given(st.integers(1, 300), st.integers(1, 64), st.integers(1, 64))
def test_shares_make_the_step_that_the_config_says(batch_size: int, accumulate: int, world_size: int) -> None:
    try:
        share = split_global_batch(batch_size, accumulate, world_size)
    except UserError as error:
        assert batch_size * accumulate % world_size
        fitting = str(error).partition("data.batch_size=")[2].split(" or ")
        assert all(int(size) * accumulate % world_size == 0 for size in fitting)
    else:
        assert share.micro_batch * share.accumulate_grad_batches * world_size == batch_size * accumulate
        assert share.micro_batch <= batch_size


def test_what_does_not_divide_is_refused_with_sizes_that_do() -> None:
    with pytest.raises(UserError) as caught:
        split_global_batch(15, 3, 4)
    assert str(caught.value) == (
        "batch_size 15 x accumulate_grad_batches 3 sequences in a step do not divide by 4 processes: "
        "set data.batch_size=12 or 16"
    )


# --- who started the processes ---------------------------------------------------------------------------------------

TORCH_ENVIRONMENT = {
    "TORCHELASTIC_RUN_ID": "none",
    "RANK": "3",
    "LOCAL_RANK": "1",
    "GROUP_RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "2",
}
SLURM_ENVIRONMENT = {
    "SLURM_JOB_NAME": "train",
    "SLURM_NTASKS": "4",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_NNODES": "2",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_ID": "0",
}


@pytest.fixture(params=["torchrun", "srun"])
def launched(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The environment of the last of two processes on the second of two nodes."""
    for key, value in (TORCH_ENVIRONMENT if request.param == "torchrun" else SLURM_ENVIRONMENT).items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    return str(request.param)


def test_a_launcher_says_which_process_this_is(launched: str) -> None:
    processes = get_distributed_context(training(devices=2, num_nodes=2), "cpu")
    assert (processes.world_size, processes.rank, processes.is_main) == (4, 3, False)
    assert processes.strategy == "ddp"
    assert get_distributed_context(training(devices="auto", num_nodes=2), "cpu").devices == 2


def test_a_launcher_and_a_config_that_disagree(launched: str) -> None:
    message = f"{launched} started devices 2 x num_nodes 2, the config says devices 1 x num_nodes 1: set training"
    with pytest.raises(UserError, match=message):
        get_distributed_context(training(), "cpu")


def test_lightning_numbers_the_processes_that_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert get_distributed_context(training(devices=2), "cpu").is_main
    monkeypatch.setenv(PARENT_KEY, str(os.getppid()))
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert get_distributed_context(training(devices=2), "cpu").rank == 1
    monkeypatch.setenv("NODE_RANK", "1")
    assert get_distributed_context(training(devices=2, num_nodes=2), "cpu").rank == 3


@pytest.mark.parametrize(
    ("device", "values", "message"),
    [
        ("cuda", {"devices": 3}, "devices 3: this process sees 2 GPUs"),
        ("mps", {"devices": 2}, "devices 2: an Apple GPU trains in one process; set training.devices=1"),
        ("cpu", {"devices": 1000}, "devices 1000: this machine has 4 cores, and each process needs one"),
        ("cpu", {"num_nodes": 2}, "num_nodes 2: start the command on each node with torchrun or srun"),
        ("cpu", {"devices": 2, "strategy": "fsdp"}, "strategy fsdp: needs GPUs; on a CPU use ddp"),
        ("cuda", {"strategy": "fsdp"}, "strategy fsdp: needs more than one device"),
        ("cuda", {"devices": 2, "strategy": "fsdp", "optimizer": "muon"}, "strategy fsdp: muon needs whole matrices"),
        ("cuda", {"devices": 2, "strategy": "fsdp", "ema_decay": 0.9}, "strategy fsdp: ema_decay needs all weights"),
        ("cuda", {"devices": 2, "strategy": "fsdp", "compile": True}, "strategy fsdp: cannot be compiled"),
    ],
)
def test_what_does_not_fit_the_machine_is_one_line(
    device: Any, values: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    with pytest.raises(UserError, match=message) as caught:
        get_distributed_context(training(**values), device)
    assert "\n" not in str(caught.value)


def test_auto_means_all_gpus_or_one_cpu_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert get_distributed_context(training(devices="auto"), "cuda").world_size == 3
    assert get_distributed_context(training(devices="auto"), "cpu").strategy == "single"


@pytest.mark.parametrize("devices", [0, -1, 10**6])
def test_impossible_numbers_of_devices(devices: int) -> None:
    with pytest.raises(UserError, match=rf"devices {devices} must be auto or lie in \[1, 1024\]"):
        training(devices=devices)


# --- two processes ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory, stream_folder: Path) -> Path:
    """The folder in which two processes have trained several runs; see two_ranks.py."""
    return start_two_processes("two_ranks.py", stream_folder, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def told(ranks: Path) -> list[dict[str, Any]]:
    """How the runs ended, by rank."""
    return [json.loads((ranks / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize(
    ("name", "batch_size", "accumulate"), [("accumulated", 4, 2), ("split", 6, 1)], ids=["accumulated", "split"]
)
def test_two_processes_give_the_curve_of_one(
    name: str, batch_size: int, accumulate: int, ranks: Path, data_config: Callable[..., BinDataConfig], run: Run
) -> None:
    config = training(accumulate_grad_batches=accumulate)
    train(model(dropout=0.0), config, data_config(batch_size=batch_size), run)
    assert_same_run(Run(ranks / name), run)
    assert len(losses(run)) == 12
    record = json.loads(Run(ranks / name).metadata_file.read_text())
    assert record["status"] == "finished"
    assert record["processes"] == 2
    assert record["tokens"] == 12 * batch_size * accumulate * 32


def test_dropout_differs_between_processes_and_resumes_bit_for_bit(ranks: Path, told: list[dict[str, Any]]) -> None:
    """The random state of each process is in the checkpoint, which stands inside a log window."""
    assert told[0]["broken"] == told[1]["broken"] == [True, 12]
    whole, broken = Run(ranks / "whole"), Run(ranks / "broken")
    assert list(losses(whole)) == [3, 6, 9, 12]
    assert losses(broken) == losses(whole)
    states = torch.load(whole.last_checkpoint, weights_only=True)["rng"]
    assert len(states) == 2
    assert not torch.equal(states[0]["cpu"], states[1]["cpu"])


@pytest.mark.parametrize(
    ("name", "batch_size", "accumulate", "step"),
    [("accumulated", 4, 2, 3), ("split", 6, 1, 4)],
    ids=["accumulated", "split"],
)
def test_a_run_of_two_processes_goes_on_in_one(
    name: str,
    batch_size: int,
    accumulate: int,
    step: int,
    ranks: Path,
    data_config: Callable[..., BinDataConfig],
    run: Run,
    tmp_path: Path,
) -> None:
    """The checkpoint counts windows: one process has twice as many micro-batches in a step, or twice as large ones."""
    quiet, config, data = (
        model(dropout=0.0),
        training(accumulate_grad_batches=accumulate),
        data_config(batch_size=batch_size),
    )
    train(quiet, config, data, run)
    other = Run(tmp_path / "other")
    train(quiet, config, data, other, resume_from=ranks / name / "checkpoints" / f"step-{step:08d}.ckpt")
    expected = losses(run)
    assert losses(other) == pytest.approx({step: expected[step] for step in range(step + 1, 13)}, abs=1e-4)


def test_a_signal_to_one_process_stops_both_at_one_step(ranks: Path, told: list[dict[str, Any]]) -> None:
    finished, steps = told[1]["stopped"]
    assert told[0]["stopped"] == [finished, steps]
    assert not finished
    run = Run(ranks / "stopped")
    assert load_checkpoint_model(run.last_checkpoint).step == steps
    assert json.loads(run.metadata_file.read_text())["status"] == "stopped"


def test_processes_with_other_plans_refuse_to_train(ranks: Path, told: list[dict[str, Any]]) -> None:
    for rank in (0, 1):
        assert told[rank]["disagreeing"] == (
            "process 1 has seed 1 where process 0 has 0: all need the same command and the same files (run folder, "
            "streams, configs)"
        )
    assert not Run(ranks / "disagreeing").last_checkpoint.exists()


# --- as a user starts them -------------------------------------------------------------------------------------------


@pytest.fixture
def workplace(tmp_path: Path, stream_folder: Path) -> Path:
    """A working directory with three configs; a step has 2 micro-batches of 4 windows."""
    (tmp_path / "model.yaml").write_text(json.dumps(model(dropout=0.0).to_dict()))
    (tmp_path / "training.yaml").write_text(json.dumps(training(accumulate_grad_batches=2).to_dict()))
    paths = {f"{split}_path": str(stream_folder / f"{split}.bin") for split in ("train", "val")}
    (tmp_path / "data.yaml").write_text(json.dumps({**paths, "block_size": 32, "batch_size": 4}))
    return tmp_path


def words(*settings: str) -> list[str]:
    options = [f"--{section}-config={section}.yaml" for section in ("model", "training", "data")]
    return [*options, *(f"--set={setting}" for setting in settings)]


def test_the_command_starts_the_other_processes(
    workplace: Path, data_config: Callable[..., BinDataConfig], run: Run
) -> None:
    command = [str(Path(sys.executable).with_name("tiny-lm")), "train", *words("training.devices=2")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=workplace, env=environment())
    assert result.returncode == 0, result.stderr
    (folder,) = (workplace / "runs").iterdir()  # the name has the time in it, and yet they share one
    train(model(dropout=0.0), training(accumulate_grad_batches=2), data_config(), run)
    assert_same_run(Run(folder), run)
    assert "2 processes (ddp), each with 4 of the 8 sequences of a step, 4 at a time" in result.stderr
    assert result.stderr.count("val loss") == 2  # one process speaks
    assert result.stdout.count("val perplexity") == 1
    assert len(read_metrics(Run(folder).metrics)) == 12


@pytest.mark.deep
def test_an_error_of_all_processes_is_told_once(workplace: Path) -> None:
    settings = ["scheduler=none", "learning_rate=10.0", "grad_clip_norm=0", "weight_decay=3.0e+38", "devices=2"]
    command = [sys.executable, str(SCRIPT), *words(*(f"training.{setting}" for setting in settings))]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=workplace, env=environment())
    assert result.returncode == 2
    assert [line[:18] for line in result.stderr.splitlines() if "error" in line.lower()] == ["error: the loss is"]
    (folder,) = (workplace / "runs").iterdir()
    assert Run(folder).read_metadata()["status"] == "failed"


def test_lightning_lets_a_process_live_that_ends_those_it_started() -> None:
    """Lightning looks after them every five seconds: a report that takes longer to write must not be cut short."""
    sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    main, *children = (subprocess.Popen(sleep) for _ in range(3))
    ended = list(children)
    try:
        observer = _ChildProcessObserver(main.pid, children)
        kill_workers(children)
        assert observer._run()  # nothing is left to observe
        assert [child.returncode for child in ended] == [-signal.SIGKILL] * 2
        with pytest.raises(subprocess.TimeoutExpired):  # it lives
            main.wait(1)
    finally:
        main.kill()
        main.wait()


@pytest.mark.deep
def test_two_nodes(workplace: Path, data_config: Callable[..., BinDataConfig], run: Run) -> None:
    """Two agents of torchrun, which know of each other by an address only."""
    settings = words("training.num_nodes=2")
    meeting = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", free_port()]
    agents = [
        subprocess.Popen(
            [*TORCHRUN, *meeting, "--node-rank", str(rank), str(SCRIPT), *settings],
            cwd=workplace,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    output = [agent.communicate(timeout=600)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], output
    assert output[1] == ""
    (folder,) = (workplace / "runs").iterdir()
    train(model(dropout=0.0), training(accumulate_grad_batches=2), data_config(), run)
    assert_same_run(Run(folder), run)
