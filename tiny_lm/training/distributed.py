"""Distributed training: ranks, how they split a batch, and the check that all have the same configs.

Processes are started in one of three ways: by torchrun, by SLURM's ``srun``, or by Lightning, which runs the command
of rank 0 again for the other devices of its node; ``launch.py`` finds out which.
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
    """World size and rank of this process, and how it was launched."""

    devices: int
    """On each node."""
    num_nodes: int
    strategy: Literal["single", "ddp", "fsdp"]
    rank: int
    environment: ClusterEnvironment
    """The launcher, as Lightning represents it."""
    notice: str | None = None
    """A message for the user about the launch, if any."""

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.devices * self.num_nodes

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes the run folder and prints."""
        return self.rank == 0


# --- world size and rank -----------------------------------------------------------------------------------------


def get_distributed_context(config: TrainingConfig, device: Device) -> DistributedContext:
    """Determine world size and rank from config and environment.

    Raises:
        UserError: machine, launcher and config do not match.
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
    # Lightning would read it from variables that may be stale, and only rank 0 writes logs.
    rank_zero_only.rank = rank  # type: ignore[attr-defined]  # Lightning sets it, too
    return DistributedContext(devices, config.num_nodes, strategy, rank, _build_environment(launch), launch.notice)


class _LaunchEnvironment(LightningEnvironment):
    """Uses the ranks that ``launch.py`` found, whatever the environment variables say."""

    def __init__(self, launch: Launch) -> None:
        super().__init__()
        self._launch = launch

    @property
    def creates_processes_externally(self) -> bool:
        """Whether the other processes of this node run already."""
        return self._launch.launcher == "tiny-lm"

    def local_rank(self) -> int:
        """Return the rank within this node."""
        return self._launch.local_rank

    def node_rank(self) -> int:
        """Return the rank of this node."""
        return self._launch.node_rank


def _build_environment(launch: Launch) -> ClusterEnvironment:
    """Return the launcher as Lightning represents it."""
    if launch.launcher == "torchrun":
        return TorchElasticEnvironment()
    if launch.launcher == "srun":
        return SLURMEnvironment(auto_requeue=False)  # its requeue does not know the run folder
    if launch.launcher == "user":
        os.environ[PARENT_KEY] = str(os.getpid())  # lets the ranks that Lightning starts recognize their parent
    return _LaunchEnvironment(launch)


def _count_devices(device: Device) -> int:
    return torch.cuda.device_count() if device == "cuda" else 1


def _check_devices(devices: int, device: Device) -> None:
    if devices == 1:
        return
    if device == "mps":
        raise UserError(f"devices {devices}: an Apple GPU trains in one process; set training.devices=1")
    if device == "cuda" and devices > torch.cuda.device_count():
        raise UserError(f"devices {devices}: this process sees {torch.cuda.device_count()} GPUs")
    cores = max(os.cpu_count() or 1, 2)  # two processes may share a core, for tests
    if device == "cpu" and devices > cores:
        raise UserError(f"devices {devices}: this machine has {cores} cores, and each process needs one")


def _choose_strategy(config: TrainingConfig, device: Device, world_size: int) -> Literal["single", "ddp", "fsdp"]:
    if config.strategy != "fsdp":
        return "ddp" if world_size > 1 else "single"
    if device != "cuda":
        raise UserError("strategy fsdp: needs GPUs; on a CPU use ddp")
    if world_size == 1:
        raise UserError("strategy fsdp: needs more than one device; set training.devices, or use auto")
    if config.optimizer == "muon":
        raise UserError("strategy fsdp: muon needs whole matrices, but each rank holds a part; use ddp or adamw")
    if config.ema_decay is not None:
        raise UserError("strategy fsdp: ema_decay needs all weights on each rank; use ddp or remove ema_decay")
    if config.compile is True:
        raise UserError("strategy fsdp: cannot be compiled; set training.compile=false, or use ddp")
    return "fsdp"


def _build_strategy(context: DistributedContext) -> Strategy | Literal["auto"]:
    if context.strategy == "single":
        return "auto"
    if context.strategy == "ddp":
        # Buffers are constant tables; gradient views save a copy of all gradients.
        return DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=True)
    from torch.distributed.fsdp import MixedPrecision

    # Autocast computes in 16 bits, as on one device; weights, gradients and RoPE's tables stay in float32.
    whole = MixedPrecision(param_dtype=torch.float32, reduce_dtype=torch.float32, buffer_dtype=torch.float32)
    return FSDPStrategy(auto_wrap_policy={Block}, mixed_precision=whole, state_dict_type="full")


# --- splitting a batch --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PerRankBatch:
    """What each rank reads for one optimizer step."""

    micro_batch: int
    """Sequences in a micro-batch."""
    accumulate_grad_batches: int


def split_global_batch(batch_size: int, accumulate_grad_batches: int, world_size: int) -> PerRankBatch:
    """Split the sequences of an optimizer step equally, so that a step is the same for any world size.

    Raises:
        UserError: the world size does not divide them.
    """
    if accumulate_grad_batches % world_size == 0:
        return PerRankBatch(batch_size, accumulate_grad_batches // world_size)
    per_rank, rest = divmod(batch_size * accumulate_grad_batches, world_size)
    if rest:
        unit = world_size // gcd(accumulate_grad_batches, world_size)
        below = batch_size // unit * unit
        fitting = " or ".join(str(size) for size in (below, below + unit) if size)
        raise UserError(
            f"batch_size {batch_size} x accumulate_grad_batches {accumulate_grad_batches} sequences in a step do not "
            f"divide by {world_size} processes: set data.batch_size={fitting}"
        )
    micro_batch = next(size for size in range(min(batch_size, per_rank), 0, -1) if per_rank % size == 0)
    return PerRankBatch(micro_batch, per_rank // micro_batch)


def describe_sharding(context: DistributedContext, batch: PerRankBatch) -> str | None:
    """Describe in one line how ranks split a step."""
    if context.world_size == 1:
        return None
    sequences = batch.micro_batch * batch.accumulate_grad_batches
    return (
        f"{context.world_size} processes ({context.strategy}), each with {sequences:,} of the "
        f"{sequences * context.world_size:,} sequences of a step, {batch.micro_batch:,} at a time"
    )


def lightning_options(context: DistributedContext, batch: PerRankBatch) -> dict[str, Any]:
    """Return the trainer arguments for distributed training."""
    return {
        "devices": context.devices,
        "num_nodes": context.num_nodes,
        "strategy": _build_strategy(context),
        "accumulate_grad_batches": batch.accumulate_grad_batches,
        "use_distributed_sampler": False,  # our sampler splits between ranks
    }


# --- consistency -----------------------------------------------------------------------------------------------------


class ConfigConsistencyCheck(Callback):
    """Checks that all ranks train the same thing from the same step, and seeds dropout differently on each.

    Without it, a node that does not see the run folder would start from step 0 while the others resume.
    """

    def __init__(self, values: dict[str, Any], seed: int) -> None:
        """Compare ``values``, which must be equal on all ranks; ``seed`` is the run's."""
        self._values = values
        self._seed = seed

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Compare, and seed each rank differently (dropout).

        Raises:
            UserError: a rank has other values; all ranks raise it.
        """
        if trainer.world_size == 1:
            return
        gathered: list[Any] = [None] * trainer.world_size
        torch.distributed.all_gather_object(gathered, self._values)
        for rank, values in enumerate(gathered):
            for key, value in gathered[0].items():
                if values[key] != value:
                    raise UserError(
                        f"process {rank} has {key} {values[key]!r} where process 0 has {value!r}: all need the same "
                        "command and the same files (run folder, streams, configs)"
                    )
        if trainer.global_rank:
            torch.manual_seed(self._seed + trainer.global_rank)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Convert the count of past micro-batches to the current accumulation, which may depend on the world size.

        Lightning derives the end of a step from this count; a checkpoint is written at the end of a step.
        """
        count = checkpoint["global_step"] * trainer.accumulate_grad_batches
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for part in ("total", "current"):
            progress[part].update(ready=count, started=count, processed=count, completed=count - 1)


def gather_random_states(device: torch.device) -> list[dict[str, torch.Tensor]]:
    """Return the states of torch's random generators by rank; all ranks must call it."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return [state]
    states: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(states, state)
    return states


def clip_gradients(trainer: pl.Trainer, parameters: Any, limit: float) -> torch.Tensor:
    """Clip the global gradient norm, over all shards, and return the norm before clipping."""
    model: Any = trainer.strategy.model
    if isinstance(trainer.strategy, FSDPStrategy):
        norm: torch.Tensor = model.clip_grad_norm_(limit)
        return norm
    return nn.utils.clip_grad_norm_(parameters, limit)


def sum_over_ranks(trainer: pl.Trainer, values: list[float]) -> list[float]:
    """Sum numbers over all ranks, in float64."""
    if trainer.world_size == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64, device=trainer.strategy.root_device)
    return list(trainer.strategy.reduce(total, reduce_op="sum").tolist())


@contextmanager
def terminate_on_failure(trainer: pl.Trainer, context: DistributedContext) -> Iterator[None]:
    """Kill the workers that this process started when the block fails: they would hang.

    Other ranks delay so that rank 0 reports shared errors.

    Raises:
        UserError: the connection broke because another process ended.
    """
    try:
        yield
    except BaseException as error:
        launcher: Any = trainer.strategy.launcher
        if launcher is not None and context.world_size > 1:
            if context.is_main:
                kill_workers(launcher.procs)
            elif isinstance(context.environment, LightningEnvironment):
                time.sleep(3)
        # NCCL errors have their own class; gloo's are recognized by the source file in the message.
        if isinstance(error, torch.distributed.DistError) or "/gloo/transport/" in str(error):
            raise UserError("another process of this run ended; see its message above") from None
        raise


def kill_workers(processes: list[subprocess.Popen[bytes]]) -> None:
    """Kill workers without Lightning noticing; otherwise it would kill this process too."""
    children = list(processes)
    processes.clear()
    for child in children:
        child.kill()
    for child in children:
        child.wait()
