"""Several processes: how many there are, which one this is, their share of a batch, and what they must agree on.

Processes are started in one of three ways: by torchrun, by SLURM's ``srun``, or by Lightning, which runs the command
of the first process again for the other devices of its machine; ``launch.py`` tells them apart.
"""

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import gcd
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning_fabric.utilities.rank_zero import rank_zero_only
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.strategies import DDPStrategy, FSDPStrategy, Strategy
from torch import nn

from tiny_lm.errors import UserError
from tiny_lm.hardware.device import Device
from tiny_lm.model.transformer import Block
from tiny_lm.training.config import TrainingConfig
from tiny_lm.training.launch import PARENT_KEY, Launch, find_launch


@dataclass(frozen=True)
class DistributedContext:
    """The processes of a run, and which of them this one is."""

    devices: int
    """On each node."""
    num_nodes: int
    strategy: Literal["single", "ddp", "fsdp"]
    rank: int
    environment: ClusterEnvironment
    """What started them, as Lightning sees it."""
    notice: str | None = None
    """What to say to the user about how they were started, if anything."""

    @property
    def world_size(self) -> int:
        """How many there are."""
        return self.devices * self.num_nodes

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes the run folder and speaks to the user."""
        return self.rank == 0


# --- how many, and which one -----------------------------------------------------------------------------------------


def get_distributed_context(config: TrainingConfig, device: Device) -> DistributedContext:
    """Read from config and environment how many processes train, and which of them this one is.

    Raises:
        UserError: the machine, the launcher and the config do not fit each other.
    """
    launch = find_launch(config.devices, config.num_nodes)
    devices = _count_devices(device) if config.devices == "auto" else config.devices
    if launch.started is not None:
        started = launch.started
        devices = started[0] if config.devices == "auto" else devices
        if (devices, config.num_nodes) != started:
            raise UserError(
                f"{launch.launcher} started devices {started[0]} x num_nodes {started[1]}, the config says devices "
                f"{devices} x num_nodes {config.num_nodes}: set training.devices={started[0]} and "
                f"training.num_nodes={started[1]}"
            )
    _check_devices(devices, device)
    strategy = _choose_strategy(config, device, devices * config.num_nodes)
    rank = launch.node_rank * devices + launch.local_rank
    # Lightning takes it from variables that may be left over, and only process 0 writes what it logs.
    rank_zero_only.rank = rank  # type: ignore[attr-defined]  # Lightning sets it, too
    return DistributedContext(devices, config.num_nodes, strategy, rank, _build_environment(launch), launch.notice)


class _OwnEnvironment(LightningEnvironment):
    """Numbers the processes of this command as ``launch.py`` found them, whatever else the variables say."""

    def __init__(self, launch: Launch) -> None:
        super().__init__()
        self._launch = launch

    @property
    def creates_processes_externally(self) -> bool:
        """Whether the other processes of this machine are there already."""
        return self._launch.launcher == "tiny-lm"

    def local_rank(self) -> int:
        """Return the number of this process on its machine."""
        return self._launch.local_rank

    def node_rank(self) -> int:
        """Return the number of this machine."""
        return self._launch.node_rank


def _build_environment(launch: Launch) -> ClusterEnvironment:
    """Return what started this process, as Lightning sees it."""
    if launch.launcher == "torchrun":
        return TorchElasticEnvironment()
    if launch.launcher == "srun":
        return SLURMEnvironment(auto_requeue=False)  # its way of resuming knows nothing of the run folder
    if launch.launcher == "user":
        os.environ[PARENT_KEY] = str(os.getpid())  # those that Lightning starts know by it that we did
    return _OwnEnvironment(launch)


def _count_devices(device: Device) -> int:
    return torch.cuda.device_count() if device == "cuda" else 1


def _check_devices(devices: int, device: Device) -> None:
    if devices == 1:
        return
    if device == "mps":
        raise UserError(f"devices {devices}: an Apple GPU trains in one process; set training.devices=1")
    if device == "cuda" and devices > torch.cuda.device_count():
        raise UserError(f"devices {devices}: this process sees {torch.cuda.device_count()} GPUs")
    cores = max(os.cpu_count() or 1, 2)  # two processes may share a core, to try things out
    if device == "cpu" and devices > cores:
        raise UserError(f"devices {devices}: this machine has {cores} cores, and a process needs at least one")


def _choose_strategy(config: TrainingConfig, device: Device, world_size: int) -> Literal["single", "ddp", "fsdp"]:
    if config.strategy != "fsdp":
        return "ddp" if world_size > 1 else "single"
    if device != "cuda":
        raise UserError("strategy fsdp: needs GPUs; on a CPU use ddp")
    if world_size == 1:
        raise UserError("strategy fsdp: has nothing to share on one device; set training.devices, or use auto")
    if config.optimizer == "muon":
        raise UserError("strategy fsdp: muon needs whole matrices, of which each process has a part; use ddp or adamw")
    if config.ema_decay is not None:
        raise UserError("strategy fsdp: ema_decay needs all weights in each process; use ddp or leave ema_decay out")
    if config.compile is True:
        raise UserError("strategy fsdp: is not compiled; set training.compile=false, or use ddp")
    return "fsdp"


def _build_strategy(processes: DistributedContext) -> Strategy | Literal["auto"]:
    if processes.strategy == "single":
        return "auto"
    if processes.strategy == "ddp":
        # The buffers are tables, the same everywhere; a view saves the copy of all gradients.
        return DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=True)
    from torch.distributed.fsdp import MixedPrecision

    # Autocast computes in 16 bits, as on one device; weights, gradients and RoPE's tables stay in float32.
    whole = MixedPrecision(param_dtype=torch.float32, reduce_dtype=torch.float32, buffer_dtype=torch.float32)
    return FSDPStrategy(auto_wrap_policy={Block}, mixed_precision=whole, state_dict_type="full")


# --- the share of a batch --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PerRankBatch:
    """What each process reads for one optimizer step."""

    micro_batch: int
    """Windows in a micro-batch."""
    accumulate_grad_batches: int


def split_global_batch(batch_size: int, accumulate_grad_batches: int, world_size: int) -> PerRankBatch:
    """Share the windows of an optimizer step equally, so that a step is the same step with any number of processes.

    Raises:
        UserError: they do not divide.
    """
    if accumulate_grad_batches % world_size == 0:
        return PerRankBatch(batch_size, accumulate_grad_batches // world_size)
    share, rest = divmod(batch_size * accumulate_grad_batches, world_size)
    if rest:
        unit = world_size // gcd(accumulate_grad_batches, world_size)
        below = batch_size // unit * unit
        fitting = " or ".join(str(size) for size in (below, below + unit) if size)
        raise UserError(
            f"batch_size {batch_size} x accumulate_grad_batches {accumulate_grad_batches} windows in a step do not "
            f"divide by {world_size} processes: set data.batch_size={fitting}"
        )
    micro_batch = next(size for size in range(min(batch_size, share), 0, -1) if share % size == 0)
    return PerRankBatch(micro_batch, share // micro_batch)


def describe_sharding(processes: DistributedContext, share: PerRankBatch) -> str | None:
    """Say in one line how several processes share a step."""
    if processes.world_size == 1:
        return None
    sequences = share.micro_batch * share.accumulate_grad_batches
    return (
        f"{processes.world_size} processes ({processes.strategy}), each with {sequences:,} of the "
        f"{sequences * processes.world_size:,} windows of a step, {share.micro_batch:,} at a time"
    )


def lightning_options(processes: DistributedContext, share: PerRankBatch) -> dict[str, Any]:
    """Return what Lightning's trainer must know of several processes."""
    return {
        "devices": processes.devices,
        "num_nodes": processes.num_nodes,
        "strategy": _build_strategy(processes),
        "accumulate_grad_batches": share.accumulate_grad_batches,
        "use_distributed_sampler": False,  # the order of the windows is shared already
    }


# --- agreeing --------------------------------------------------------------------------------------------------------


class ConfigConsistencyCheck(Callback):
    """Makes sure that all processes train the same thing from the same step, and lets them differ where they should.

    Without it, a node that does not see the run folder would begin anew while the others go on.
    """

    def __init__(self, plan: dict[str, Any], seed: int) -> None:
        """Compare ``plan``, plain values that must be equal in all processes; ``seed`` is the run's."""
        self._plan = plan
        self._seed = seed

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Compare, and draw other random numbers (dropout) in each process.

        Raises:
            UserError: a process has another plan; all processes raise it.
        """
        if trainer.world_size == 1:
            return
        plans: list[Any] = [None] * trainer.world_size
        torch.distributed.all_gather_object(plans, self._plan)
        for rank, plan in enumerate(plans):
            for key, value in plans[0].items():
                if plan[key] != value:
                    raise UserError(
                        f"process {rank} has {key} {plan[key]!r} where process 0 has {value!r}: give all the same "
                        "command and the same files (run folder, streams, configs)"
                    )
        if trainer.global_rank:
            torch.manual_seed(self._seed + trainer.global_rank)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Count the micro-batches of the past in those of today, which another number of processes may have changed.

        Lightning ends a step at every so many micro-batches of its count, and a checkpoint stands at the end of one.
        """
        count = checkpoint["global_step"] * trainer.accumulate_grad_batches
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for part in ("total", "current"):
            progress[part].update(ready=count, started=count, processed=count, completed=count - 1)


def gather_random_states(device: torch.device) -> list[dict[str, torch.Tensor]]:
    """Return the states of torch's random generators in every process, by rank; all processes must call it."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return [state]
    states: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(states, state)
    return states


def clip_gradients(trainer: pl.Trainer, parameters: Any, limit: float) -> torch.Tensor:
    """Clip the global norm of the gradients and return what it was; where they are sharded, over all shards."""
    model: Any = trainer.strategy.model
    if isinstance(trainer.strategy, FSDPStrategy):
        norm: torch.Tensor = model.clip_grad_norm_(limit)
        return norm
    return nn.utils.clip_grad_norm_(parameters, limit)


def sum_over_ranks(trainer: pl.Trainer, values: list[float]) -> list[float]:
    """Add up numbers over all processes, in float64."""
    if trainer.world_size == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64, device=trainer.strategy.root_device)
    return list(trainer.strategy.reduce(total, reduce_op="sum").tolist())


@contextmanager
def terminate_on_failure(trainer: pl.Trainer, processes: DistributedContext) -> Iterator[None]:
    """End the processes that this one started when the block fails, since they would wait for it in vain.

    The others, when they fail, let the first one speak: an error that all have is then told once.

    Raises:
        UserError: the connection broke because another process ended.
    """
    try:
        yield
    except BaseException as error:
        launcher: Any = trainer.strategy.launcher
        if launcher is not None and processes.world_size > 1:
            if processes.is_main:
                kill_workers(launcher.procs)
            elif isinstance(processes.environment, LightningEnvironment):
                time.sleep(3)
        # NCCL has an error class of its own, gloo's is known by the file that raised it.
        if isinstance(error, torch.distributed.DistError) or "/gloo/transport/" in str(error):
            raise UserError("another process of this run ended; what it said stands above") from None
        raise


def kill_workers(watched: list[subprocess.Popen[bytes]]) -> None:
    """End processes that Lightning watches: it must not see their end, or it would kill this process, too."""
    children = list(watched)
    watched.clear()
    for child in children:
        child.kill()
    for child in children:
        child.wait()
