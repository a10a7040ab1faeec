"""Which device to train on, and in which precision it should be done there."""

from typing import Literal

import torch

from tiny_lm.training.config import TrainingConfig

Device = Literal["cuda", "mps", "cpu"]
Precision = Literal["32-true", "bf16-mixed", "16-mixed"]


def choose_device() -> Device:
    """Return the fastest kind of device that is here."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def choose_precision(config: TrainingConfig, device: Device) -> tuple[Precision, str | None]:
    """Return the precision to train in, and why it is another one than the config names, if it is.

    fp16 needs the loss scaling that there is for CUDA only; bf16 is worth its name only where the hardware computes in
    it, and elsewhere it is emulated and slower than float32.
    """
    wanted = config.precision
    if device == "cuda":
        if wanted == "bf16-mixed" and not torch.cuda.is_bf16_supported(including_emulation=False):
            return "16-mixed", "this GPU does not compute in bf16: training in fp16 with loss scaling"
        return wanted, None
    if wanted == "32-true":
        return wanted, None
    if device == "cpu" and _cpu_computes_in_bf16():
        return "bf16-mixed", None if wanted == "bf16-mixed" else "16-mixed needs a GPU: training in bf16-mixed"
    return "32-true", f"{wanted} would not be faster on this {device.upper()}: training in float32"


def _cpu_computes_in_bf16() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def describe_device(device: Device) -> str:
    """Name the device for the record of a run."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return "Apple GPU (MPS)" if device == "mps" else f"CPU, {torch.get_num_threads()} threads"
