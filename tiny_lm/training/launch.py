"""How this process was launched, from environment variables: by torchrun, by srun, by us, or by the user.

Launchers describe their processes in environment variables, and schedulers, containers and earlier commands leave such
variables behind. So no single variable is proof: each launcher is recognized by all that it sets. Anything else is
refused with an error that names the variables, since a process that wrongly believes it is one of several waits for
the others forever, or trains to the end and writes nothing.

This module does not import Lightning, which reads some of these variables on import.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from tiny_lm.errors import UserError

PARENT_KEY = "TINY_LM_PARENT"
"""Variable with the id of the process that starts the other ranks of its node; they recognize their parent by it."""

_RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK")
_READ_BY_LIGHTNING = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")
_TORCHRUN = ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
_OTHER_LAUNCHERS = {
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpiexec",
    "MV2_COMM_WORLD_SIZE": "mpirun",
    "MPI_LOCALNRANKS": "mpiexec",
    "JSM_NAMESPACE_SIZE": "jsrun",
    "FLUX_JOB_SIZE": "flux run",
    "PALS_LOCAL_SIZE": "mpiexec",
    "WORLD_SIZE": "another launcher",
}
_OWN_STEPS = 2**32 - 16  # step ids from here on are SLURM's own (batch script, interactive shell)


@dataclass(frozen=True)
class Launch:
    """How this process was launched."""

    launcher: Literal["torchrun", "srun", "tiny-lm", "user"]
    """``tiny-lm``: by rank 0 of this node; ``user``: by no known launcher."""
    started: tuple[int, int] | None
    """Devices and nodes, if the launcher set them; None if Lightning launches them itself."""
    node_rank: int
    local_rank: int
    notice: str | None = None
    """A message for the user about it, if any."""


def check_variables() -> None:
    """Refuse environment variables that break or change Lightning; call it before importing Lightning.

    Raises:
        UserError: it names the variable to unset.
    """
    for key in _READ_BY_LIGHTNING:
        _read(os.environ, key)
    for key in os.environ:
        if key.startswith("PL_TRAINER_"):
            raise UserError(
                f"{key} is set in the environment and would change how a run trains; unset it, and use the training "
                "config instead"
            )


def find_launch(devices: int | Literal["auto"], num_nodes: int) -> Launch:
    """Determine how this process was launched.

    Args:
        devices: per node, from the training config.
        num_nodes: from the training config.

    Raises:
        UserError: variables are left over from another launcher, or the launcher is not supported.
    """
    check_variables()
    variables = os.environ
    if "TORCHELASTIC_RUN_ID" in variables:
        return _torchrun(variables)
    if (tasks := _srun_tasks(variables)) is not None:
        return _srun(variables, tasks)
    if (child := _child(variables)) is not None:
        return child
    _check_other_launchers(variables)
    if num_nodes > 1:
        return _node_of_several(variables, num_nodes)
    # Set by an earlier run in this process that launched other ranks (a notebook that trains twice).
    ours = variables.get(PARENT_KEY) == str(os.getpid())
    numbered = [key for key in _RANKS if _read(variables, key)]
    if devices != 1 and "LOCAL_RANK" in variables:
        numbered = numbered or ["LOCAL_RANK"]
    if numbered and not ours:
        raise _left_over(variables, numbered)
    return Launch("user", None, 0, 0, _describe_slurm(variables))


def _torchrun(variables: Mapping[str, str]) -> Launch:
    missing = [key for key in _TORCHRUN if _read(variables, key) is None]
    if missing:
        raise UserError(
            f"TORCHELASTIC_RUN_ID is set, as torchrun does, but {' and '.join(missing)} {_are(missing)} not: to train "
            "without torchrun, unset TORCHELASTIC_RUN_ID"
        )
    rank, local_rank, node_rank, world, here = (_read(variables, key) or 0 for key in _TORCHRUN)
    if not (here >= 1 and world >= here and world % here == 0 and local_rank < here and rank < world):
        shown = ", ".join(f"{key}={variables[key]}" for key in _TORCHRUN)
        raise UserError(
            f"the variables of torchrun are inconsistent ({shown}): start the same number of processes on each node "
            f"with torchrun, or unset TORCHELASTIC_RUN_ID and {', '.join(_TORCHRUN)} to train alone"
        )
    return Launch("torchrun", (here, world // here), node_rank, local_rank)


def _srun_tasks(variables: Mapping[str, str]) -> int | None:
    """Return the number of tasks of this process's srun step; None if srun did not start it.

    sbatch scripts and salloc shells have most of srun's variables too, as process 0 of all tasks.
    """
    if variables.get("SLURM_JOB_NAME") in ("bash", "interactive"):
        return None  # Lightning treats it as an interactive shell
    if any(key not in variables for key in ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID")):
        return None
    step = _read(variables, "SLURM_STEP_ID")
    if (step is None and _read(variables, "SLURM_PROCID") == 0) or (step is not None and step >= _OWN_STEPS):
        return None
    tasks = _read(variables, "SLURM_STEP_NUM_TASKS") or _read(variables, "SLURM_NTASKS")
    return tasks if tasks and tasks > 1 else None


def _srun(variables: Mapping[str, str], tasks: int) -> Launch:
    nodes = _read(variables, "SLURM_STEP_NUM_NODES") or _read(variables, "SLURM_NNODES") or 1
    if "SLURM_NTASKS_PER_NODE" not in variables:
        raise UserError(f"SLURM started {tasks} tasks: use --ntasks-per-node instead of --ntasks")
    for key in ("SLURM_NTASKS_PER_NODE", "SLURM_NNODES", "SLURM_NTASKS"):
        _read(variables, key)
    if tasks % nodes:
        raise UserError(
            f"SLURM started {tasks} tasks on {nodes} nodes: start the same number on each, with --ntasks-per-node"
        )
    node_rank, local_rank = _read(variables, "SLURM_NODEID") or 0, _read(variables, "SLURM_LOCALID") or 0
    return Launch("srun", (tasks // nodes, nodes), node_rank, local_rank)


def _child(variables: Mapping[str, str]) -> Launch | None:
    """Return the launch if rank 0 of this node started this process for another device, else None."""
    if variables.get(PARENT_KEY) != str(os.getppid()):
        return None
    local_rank = _read(variables, "LOCAL_RANK")
    if not local_rank:
        return None
    return Launch("tiny-lm", None, _read(variables, "NODE_RANK") or 0, local_rank)


def _check_other_launchers(variables: Mapping[str, str]) -> None:
    """Refuse unsupported launchers of several processes: each would train alone, into its own folder or the same."""
    for key, name in _OTHER_LAUNCHERS.items():
        size = _read(variables, key)
        if key == "WORLD_SIZE" and PARENT_KEY in variables and variables[PARENT_KEY] == str(os.getpid()):
            continue
        if size is not None and size > 1:
            raise UserError(
                f"{key}={size} is set, as by {name} for one of {size} processes: unset {key} to train in this process, "
                "or start the processes with torchrun or srun, as docs/scaling.md shows"
            )


def _node_of_several(variables: Mapping[str, str], num_nodes: int) -> Launch:
    """Return the launch of a command that the user started on each node with PyTorch's documented variables."""
    needed = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK")
    missing = [key for key in needed if not variables.get(key)]
    if missing:
        raise UserError(
            f"num_nodes {num_nodes}: start the command on each node with torchrun or srun, as docs/scaling.md "
            f"shows; the addresses of the other nodes are unknown ({' and '.join(missing)} {_are(missing)} not set)"
        )
    _read(variables, "MASTER_PORT")
    node_rank = _read(variables, "NODE_RANK") or 0
    if node_rank >= num_nodes:
        raise UserError(f"NODE_RANK={node_rank} is set, but num_nodes is {num_nodes}: nodes are numbered from 0")
    if _read(variables, "LOCAL_RANK") is not None and variables.get(PARENT_KEY) != str(os.getpid()):
        raise _left_over(variables, ["LOCAL_RANK"])
    return Launch("user", None, node_rank, 0)


def _left_over(variables: Mapping[str, str], keys: Iterable[str]) -> UserError:
    shown = " and ".join(f"{key}={variables[key]}" for key in keys)
    return UserError(
        f"{shown} {_are(list(keys))} set in the environment, as for one of several processes, but no known launcher "
        f"started this one: unset {' '.join(keys)} to train, or start with torchrun or srun (docs/scaling.md)"
    )


def _describe_slurm(variables: Mapping[str, str]) -> str | None:
    """Return a notice that the other tasks of an allocation stay idle, if srun did not start this process."""
    tasks = variables.get("SLURM_NTASKS", "1")
    if tasks == "1":
        return None
    return f"SLURM_NTASKS is {tasks}, but srun did not start this process: it trains alone; to use all tasks, use srun"


def _read(variables: Mapping[str, str], key: str) -> int | None:
    """Return a variable as a non-negative integer, None if unset; raise UserError if it is anything else."""
    text = variables.get(key)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= 10):
        raise UserError(f"{key}={text!r} in the environment is not a number; unset {key}")
    return int(text)


def _are(keys: list[str]) -> str:
    return "are" if len(keys) > 1 else "is"
