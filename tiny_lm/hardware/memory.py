"""How much memory there is to take."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

from tiny_lm.errors import UserError
from tiny_lm.hardware.device import Device


def free_memory(device: Device) -> int:
    """Return the bytes that can still be taken on a device, and on a CPU within the limits of its cgroup.

    Raises:
        UserError: this system does not tell.
    """
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    if device == "mps":
        return torch.mps.recommended_max_memory()
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 2**10
    except (OSError, KeyError, ValueError):  # no Linux
        try:
            free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
        except (AttributeError, OSError, ValueError):
            raise UserError("how much memory is free cannot be found out here: give it with --memory") from None
    return min([free, *_cgroup_headroom()])


def _cgroup_headroom() -> Iterator[int]:
    """Yield what the limits of this process's control groups leave (a container's memory limit is one)."""
    for folder, limit, used in (
        (Path("/sys/fs/cgroup"), "memory.max", "memory.current"),
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        with suppress(OSError, ValueError, KeyError):  # no such file, or the word "max"
            statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            taken = int((folder / used).read_text()) - int(statistics["inactive_file"])  # files give their cache back
            yield int((folder / limit).read_text()) - taken


def peak_memory() -> dict[str, float]:
    """Return the most memory that this process, and its tensors on a GPU, have taken so far, in MiB."""
    peaks: dict[str, float] = {}
    if sys.platform != "win32":  # the standard library does not tell there
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes on macOS, KiB elsewhere
        peaks["process_peak_memory_mb"] = peak / unit
    if torch.cuda.is_available():
        peaks["gpu_peak_memory_mb"] = torch.cuda.max_memory_allocated() / 2**20
    return peaks


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory did not suffice; on a CPU and on MPS torch has no class for it."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and re.search(r"out of memory|allocate memory", str(error)) is not None
    )
