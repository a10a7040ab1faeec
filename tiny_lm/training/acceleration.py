"""What makes a training step fast on the machine at hand: compiling, the kind of attention, and kept memory."""

import ctypes
import sys

from tiny_lm.hardware.compiler import missing_compiler
from tiny_lm.hardware.device import Device
from tiny_lm.model import ModelConfig, flops_per_token
from tiny_lm.training.config import TrainingConfig

# Compiling takes the better part of a minute and then saves a tenth (GPT-2) to a fifth (Qwen3) of the time on a CPU.
# A run of so many floating-point operations takes ten minutes on two fast cores, or a minute on a fast GPU.
_WORTH_COMPILING: dict[Device, float] = {"cpu": 3e14, "cuda": 3e15}

# Up to this many tokens plain matrix products beat the fused attention kernels of a CPU (dev/LOG.md).
_SHORT = 512


def choose_compile(
    config: TrainingConfig, model_config: ModelConfig, tokens_per_step: int, block_size: int, device: Device
) -> tuple[bool, str | None]:
    """Return whether to compile, and why not where the config asks for it.

    ``auto`` compiles runs that are long enough to earn the time that compiling takes. It looks at the whole run, as
    the configs describe it, so that a resumed run computes what the first one computed.
    """
    if config.compile is False:
        return False, None
    total = config.max_steps * tokens_per_step * flops_per_token(model_config, block_size)
    if config.compile == "auto" and total < _WORTH_COMPILING.get(device, float("inf")):
        return False, None
    missing = missing_compiler(device)
    return missing is None, missing and f"{missing}: training uncompiled, which is somewhat slower"


def prefers_blocked_attention(device: Device, block_size: int) -> bool:
    """Whether attention in plain matrix products, block by block, trains faster than the fused kernels."""
    return device == "cpu" and block_size <= _SHORT


def keep_freed_memory() -> None:
    """Let the C library keep the memory of freed tensors for the next ones, for the rest of the process (glibc only).

    Each step frees and takes the same large buffers. By default glibc gives them back to the kernel every time, which
    then clears every page anew; training the speed profile on two cores spent a sixth of its time on that.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # musl has none
        never = 2**31 - 1
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, never)
        mallopt(_M_TOP_PAD, 64 * 2**20)


# From malloc.h of glibc.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
