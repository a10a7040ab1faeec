"""Sharded training (strategy fsdp) on two CPU processes, which torchrun starts with this script.

torchrun --nproc-per-node 2 ... sharded_ranks.py STREAM_FOLDER FOLDER

Lightning and torch shard on GPUs only. What is changed here lets them take CPUs for GPUs; sharding, gathering, clipping
and saving are theirs.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.accelerators import AcceleratorRegistry, CUDAAccelerator
from tiny_runs import model, training
from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel
from torch.distributed.fsdp.api import FullOptimStateDictConfig

import tiny_lm.training.fit
from tiny_lm.data import BinDataConfig
from tiny_lm.hardware.flops import PeakFlops
from tiny_lm.runs import Run
from tiny_lm.training.fit import train

STREAM, FOLDER = map(Path, sys.argv[1:3])


class CpusAsGpus(CUDAAccelerator):
    def setup_device(self, device: torch.device) -> None:
        pass

    def setup(self, trainer: Any) -> None:
        pass

    def teardown(self) -> None:
        pass

    @staticmethod
    def parse_devices(devices: Any) -> list[int]:
        return list(range(devices))

    @staticmethod
    def get_parallel_devices(devices: list[int]) -> list[torch.device]:
        return [torch.device("cpu")] * len(devices)

    @staticmethod
    def is_available() -> bool:
        return True


def preset(kind: type, **preset_values: Any) -> None:
    """Let every new object of a class have these values for some of its constructor's arguments."""
    construct: Any = kind.__init__

    def constructor(self: Any, *arguments: Any, **values: Any) -> None:
        construct(self, *arguments, **{**values, **preset_values})

    kind.__init__ = constructor


AcceleratorRegistry.register("cuda", CpusAsGpus, override=True)
preset(FullyShardedDataParallel, device_id=torch.device("cpu"))
# To move what was gathered to the CPU copies nothing where it is there already, and then it is freed under our hands.
preset(FullStateDictConfig, offload_to_cpu=False)
preset(FullOptimStateDictConfig, offload_to_cpu=False)
torch.cuda.device_count = lambda: 2
torch.cuda.get_device_name = lambda device=None: "a CPU"
tiny_lm.training.fit.fastest_device = lambda: "cuda"
tiny_lm.training.fit.peak_flops = lambda device, precision: PeakFlops(1e12, "table")


def fit(name: str, *, resume_step: int | None = None, **values: Any) -> None:
    run = Run(FOLDER / name)
    data = BinDataConfig(
        train_path=str(STREAM / "train.bin"), val_path=str(STREAM / "val.bin"), block_size=32, batch_size=4
    )
    config = training(devices=2, strategy="fsdp", keep_checkpoints=9, accumulate_grad_batches=2, **values)
    checkpoint = None if resume_step is None else FOLDER / "whole" / "checkpoints" / f"step-{resume_step:08d}.ckpt"
    train(model("qwen3", dropout=0.0), config, data, run, resume_from=checkpoint)


fit("whole", grad_clip_norm=0.5)
fit("resumed", grad_clip_norm=0.5, resume_step=4)
fit("frugal", max_steps=3, gradient_checkpointing=True)
