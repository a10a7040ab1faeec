"""What makes a training step fast on this machine: compilation, the attention kernel, and memory reuse."""

import ctypes
import sys

from tiny_lm.hardware.compiler import missing_compiler
from tiny_lm.hardware.device import Device
from tiny_lm.model import ModelConfig, flops_per_token
from tiny_lm.training.config import TrainingConfig

# Compiling takes most of a minute and then saves a tenth (GPT-2) to a fifth (Qwen3) of the time on a CPU. Runs of
# this many floating-point operations take ten minutes on two fast cores, or a minute on a fast GPU.
_MIN_FLOPS_TO_COMPILE: dict[Device, float] = {"cpu": 3e14, "cuda": 3e15}

# Up to this length plain matrix products are faster than a CPU's fused attention kernels (dev/LOG.md).
_MAX_BLOCKED_TOKENS = 512


def choose_compile(
    config: TrainingConfig, model_config: ModelConfig, tokens_per_step: int, block_size: int, device: Device
) -> tuple[bool, str | None]:
    """Return whether to compile, and the reason if the config asks for it but it is not possible.

    ``auto`` compiles runs that are long enough to make up for the compile time. It considers the whole run as
    configured, so that a resumed run computes the same.
    """
    if config.compile is False:
        return False, None
    total = config.max_steps * tokens_per_step * flops_per_token(model_config, block_size)
    if config.compile == "auto" and total < _MIN_FLOPS_TO_COMPILE.get(device, float("inf")):
        return False, None
    missing = missing_compiler(device)
    return missing is None, missing and f"{missing}: training without compilation, which is somewhat slower"


def prefers_blocked_attention(device: Device, block_size: int) -> bool:
    """Return whether blocked attention in plain matrix products trains faster than the fused kernels."""
    return device == "cpu" and block_size <= _MAX_BLOCKED_TOKENS


def keep_freed_memory() -> None:
    """Make the C library reuse the memory of freed tensors, for the rest of the process (glibc only).

    Each step frees and allocates the same large buffers. By default glibc returns them to the kernel, which must then
    zero every page again; that took a sixth of the time of training the speed profile on two cores.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # musl does not have it
        never = 2**31 - 1
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, never)
        mallopt(_M_TOP_PAD, 64 * 2**20)


# From malloc.h of glibc.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
