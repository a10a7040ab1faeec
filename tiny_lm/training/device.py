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
        if wanted == "bf16-mixed" and not computes_in_bf16(device):
            return "16-mixed", "this GPU has no bf16; fp16 has loss scaling"
        return wanted, None
    if wanted == "32-true":
        return wanted, None
    if device == "cpu" and computes_in_bf16(device):
        return "bf16-mixed", None if wanted == "bf16-mixed" else "16-mixed needs a GPU"
    return "32-true", f"{wanted} would not be faster there"


def computes_in_bf16(device: str) -> bool:
    """Return whether the hardware multiplies in bf16; elsewhere it is emulated."""
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return False


def tell_choice(device: Device, precision: Precision, reason: str | None) -> str:
    """Say in one line on what a run trains and in which precision, and why so."""
    others = {"cuda": "", "mps": " (no CUDA device was found)", "cpu": " (no GPU was found)"}
    return f"training on {describe_device(device)}{others[device]} in {precision}{f': {reason}' if reason else ''}"


def describe_device(device: Device) -> str:
    """Name the device for the record of a run."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return "Apple GPU (MPS)" if device == "mps" else f"CPU, {torch.get_num_threads()} threads"
