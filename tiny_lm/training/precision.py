"""The precision to train in."""

from tiny_lm.hardware.device import Device, Precision, computes_in_bf16, describe_device
from tiny_lm.training.config import TrainingConfig


def choose_precision(config: TrainingConfig, device: Device) -> tuple[Precision, str | None]:
    """Return the precision to train in, and the reason if it differs from the config's.

    fp16 needs loss scaling, which exists for CUDA only; bf16 without hardware support is emulated, slower than float32.
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


def describe_choice(device: Device, precision: Precision, reason: str | None) -> str:
    """Describe device and precision of a run, and the reason, in one line."""
    others = {"cuda": "", "mps": " (no CUDA device was found)", "cpu": " (no GPU was found)"}
    return f"training on {describe_device(device)}{others[device]} in {precision}{f': {reason}' if reason else ''}"
