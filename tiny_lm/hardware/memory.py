"""Free memory, peak memory, and out-of-memory errors."""

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
    """Return the free bytes of a device; on a CPU within the limits of the cgroup.

    MPS reports only its recommended maximum; on a CPU outside Linux, half of the memory is taken as free.

    Raises:
        UserError: this system does not report it.
    """
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    if device == "mps":
        return torch.mps.recommended_max_memory()
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 2**10
    except (OSError, KeyError, ValueError):  # not Linux
        try:
            free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
        except (AttributeError, OSError, ValueError):
            raise UserError("the free memory of this system is unknown: give it with --memory") from None
    return min([free, *_cgroup_headroom()])


def _cgroup_headroom() -> Iterator[int]:
    """Yield the bytes left within the limits of this process's cgroups (such as a container's)."""
    for folder, limit, used in (
        (Path("/sys/fs/cgroup"), "memory.max", "memory.current"),
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        with suppress(OSError, ValueError, KeyError):  # no such file, or the word "max"
            statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            taken = int((folder / used).read_text()) - int(statistics["inactive_file"])  # file cache can be reclaimed
            yield int((folder / limit).read_text()) - taken


def peak_memory() -> dict[str, float]:
    """Return the peak memory of this process, and of its tensors on a GPU, in MiB."""
    peaks: dict[str, float] = {}
    if sys.platform != "win32":  # not in the standard library there
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes on macOS, KiB elsewhere
        peaks["process_peak_memory_mb"] = peak / unit
    if torch.cuda.is_available():
        peaks["gpu_peak_memory_mb"] = torch.cuda.max_memory_allocated() / 2**20
    return peaks


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means out of memory; on a CPU and MPS torch has no class for it."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and re.search(r"out of memory|allocate memory", str(error)) is not None
    )
