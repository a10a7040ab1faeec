"""Environment variables of launchers, real ones and those that are left over."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import model, training

from tiny_lm.data import BinDataConfig
from tiny_lm.errors import UserError
from tiny_lm.training.launch import PARENT_KEY, find_launch

SBATCH = {
    "SLURM_JOB_ID": "7",
    "SLURM_NTASKS": "4",
    "SLURM_NTASKS_PER_NODE": "4",
    "SLURM_NNODES": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}
TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "x",
    "RANK": "1",
    "LOCAL_RANK": "1",
    "GROUP_RANK": "0",
    "WORLD_SIZE": "2",
    "LOCAL_WORLD_SIZE": "2",
}
LEFT_OVER = {
    "node": {"NODE_RANK": "1"},
    "local": {"LOCAL_RANK": "1"},
    "group": {"GROUP_RANK": "3"},
    "rank": {"RANK": "2"},
    "world": {"WORLD_SIZE": "2"},
    "kubeflow": {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "head", "MASTER_PORT": "1"},
    "mpirun": {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"},
    "mpich": {"PMI_SIZE": "2", "PMI_RANK": "1"},
    "jsrun": {"JSM_NAMESPACE_SIZE": "2", "JSM_NAMESPACE_RANK": "1"},
    "flux": {"FLUX_JOB_SIZE": "4"},
    "pals": {"PALS_LOCAL_SIZE": "2"},
    "words": {"RANK": "first"},
    "empty": {"LOCAL_RANK": ""},
    "procid": {"SLURM_PROCID": "x"},
    "half of torchrun": {"TORCHELASTIC_RUN_ID": "x"},
    "torchrun of another size": {**TORCHRUN, "LOCAL_WORLD_SIZE": "0"},
    "defaults of Lightning": {"PL_TRAINER_FAST_DEV_RUN": "1"},
}


@pytest.fixture(autouse=True)
def no_training_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has trained marks itself as the parent of the ranks that it starts."""
    monkeypatch.delenv(PARENT_KEY, raising=False)


def apply(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in variables.items():
        monkeypatch.setenv(key, value)


@pytest.mark.parametrize("case", LEFT_OVER)
def test_a_variable_that_is_left_over_is_named_in_one_line(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    apply(LEFT_OVER[case], monkeypatch)
    with pytest.raises(UserError, match="unset ") as caught:
        find_launch(1, 1)
    assert "\n" not in str(caught.value)
    assert any(key in str(caught.value) for key in LEFT_OVER[case])


@pytest.mark.parametrize(
    "variables",
    [
        {"NODE_RANK": "0", "LOCAL_RANK": "0", "RANK": "0", "GROUP_RANK": "0", "WORLD_SIZE": "1"},
        SBATCH,
        {key: SBATCH[key] for key in ("SLURM_JOB_ID", "SLURM_NTASKS")},
        {**SBATCH, "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"},
        {**SBATCH, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1"},
        {"OMPI_COMM_WORLD_SIZE": "1", "PMI_SIZE": "1", "PMI_RANK": "0"},
        {PARENT_KEY: "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},
    ],
)
def test_variables_that_fit_one_process_let_it_train_alone(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    apply(variables, monkeypatch)
    launch = find_launch(1, 1)
    assert (launch.launcher, launch.started, launch.node_rank, launch.local_rank) == ("user", None, 0, 0)
    assert (launch.notice is not None) == (variables.get("SLURM_NTASKS", "1") == "4")


def test_srun_is_known_by_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    apply({**SBATCH, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4"}, monkeypatch)
    assert find_launch("auto", 1).started == (4, 1)
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE")
    with pytest.raises(UserError, match="use --ntasks-per-node instead of --ntasks"):
        find_launch("auto", 1)


def test_local_rank_without_its_parent_does_not_wait_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """To Lightning it means that others started the processes: it would wait for them forever."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(UserError, match="unset LOCAL_RANK to train"):
        find_launch(2, 1)
    monkeypatch.setenv(PARENT_KEY, str(os.getpid()))  # a notebook that trains once more
    assert find_launch(2, 1).launcher == "user"


def test_a_node_of_several_needs_to_know_where_the_others_are(monkeypatch: pytest.MonkeyPatch) -> None:
    apply({"MASTER_ADDR": "head", "NODE_RANK": "2"}, monkeypatch)
    with pytest.raises(UserError, match="MASTER_PORT is not set"):
        find_launch(1, 2)
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(UserError, match="NODE_RANK=2 is set, but num_nodes is 2"):
        find_launch(1, 2)
    monkeypatch.setenv("NODE_RANK", "1")
    assert find_launch(1, 2).node_rank == 1


@pytest.fixture
def configs(tmp_path: Path, stream_folder: Path) -> Path:
    model().save(tmp_path / "model.yaml")
    training(max_steps=2, run_name="r").save(tmp_path / "training.yaml")
    files = {f"{split}_path": str(stream_folder / f"{split}.bin") for split in ("train", "val")}
    BinDataConfig(**files, block_size=32, batch_size=4).save(tmp_path / "data.yaml")
    return tmp_path


@pytest.mark.parametrize(
    ("variables", "code"),
    [(SBATCH, 0), ({"RANK": "one"}, 2), ({"NODE_RANK": "1"}, 2)],
    ids=["sbatch", "no number", "node"],
)
def test_the_command_trains_with_a_record_or_refuses(variables: dict[str, str], code: int, configs: Path) -> None:
    options = [f"--{section}-config={section}.yaml" for section in ("model", "training", "data")]
    command = [sys.executable, "-c", "from tiny_lm.cli import main; main()", "train", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run(command, cwd=configs, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert (configs / "runs" / "r" / "run.json").exists() == (code == 0)
    assert ("it trains alone" if code == 0 else "error: ") in done.stderr
