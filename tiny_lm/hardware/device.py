"""Devices: which exist, which to use, and their names."""

from typing import Literal

import torch

from tiny_lm.errors import UserError

Device = Literal["cuda", "mps", "cpu"]
Precision = Literal["32-true", "bf16-mixed", "16-mixed"]


def fastest_device() -> Device:
    """Return the fastest kind of device of this machine."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def choose_device(name: str | None) -> torch.device:
    """Return the device of this name, or the fastest one.

    Raises:
        UserError: it is not available.
    """
    if name is None:
        return torch.device(fastest_device())
    try:
        chosen = torch.device(name)
        torch.empty(1, device=chosen).item()
    except (RuntimeError, AssertionError, NotImplementedError):  # raised for devices that this torch was built without
        others = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        found = ", ".join(["cpu", *(other for other, is_there in others.items() if is_there)])
        raise UserError(
            f"device {name!r}: not available on this machine or in this torch; available: {found}"
        ) from None
    return chosen


def computes_in_bf16(device: str) -> bool:
    """Return whether the hardware supports bf16; otherwise it is emulated."""
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return False


def describe_device(device: Device) -> str:
    """Return the device's name for ``run.json``."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return "Apple GPU (MPS)" if device == "mps" else f"CPU, {torch.get_num_threads()} threads"
