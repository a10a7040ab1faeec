"""Peak floating-point operations per second of a device, which model FLOPs utilization (MFU) is relative to."""

import re
import time
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch

from tiny_lm.hardware.device import Precision

# Dense peaks in TFLOP/s from NVIDIA's data sheets and white papers, without sparsity and with accumulation in float32,
# as torch multiplies: in bf16 or fp16, and for float32 matrices (TF32 where the GPU has it). The names are
# exactly those of CUDA: a laptop's RTX 4090 or a slice of an H100 is a different device and is measured.
_DATA_SHEETS: dict[str, tuple[float, float]] = {
    r"NVIDIA B200": (2250.0, 1125.0),
    r"NVIDIA H200|NVIDIA H100 80GB HBM3|NVIDIA GH200 \d+GB": (989.4, 494.7),
    r"NVIDIA H[12]00 NVL": (835.5, 417.7),
    r"NVIDIA H100 PCIe": (756.0, 378.0),
    r"NVIDIA A100[- ](?!.*MIG).*": (312.0, 156.0),
    r"NVIDIA L40S": (362.0, 183.0),
    r"NVIDIA L40": (181.0, 90.5),
    r"NVIDIA L4": (121.0, 60.0),
    r"NVIDIA A10": (125.0, 62.5),
    r"NVIDIA GeForce RTX 5090": (209.5, 104.8),
    r"NVIDIA GeForce RTX 4090": (165.2, 82.6),
    r"NVIDIA GeForce RTX 4080": (97.5, 48.7),
    r"NVIDIA GeForce RTX 3090": (71.0, 35.6),
    r"Tesla V100-SXM2-\d+GB": (125.0, 15.7),
    r"Tesla T4": (65.0, 8.1),
}

_PROBE_SECONDS = 0.3


@dataclass(frozen=True)
class PeakFlops:
    """Peak floating-point operations per second of one device in matrix products."""

    value: float
    source: Literal["table", "measured"]
    """From the vendor's data sheet, or the fastest product of two large matrices on this machine."""


@cache
def peak_flops(device: str, precision: Precision) -> PeakFlops:
    """Return the peak of a device in ``precision``, from the table of GPUs or measured once per process.

    ``device`` is a name such as ``cuda`` or ``cpu``. The random state is not touched.
    """
    if device.startswith("cuda"):
        known = data_sheet_peak(torch.cuda.get_device_name(device), precision)
        if known is not None:
            return PeakFlops(known, "table")
    return PeakFlops(_measure(torch.device(device), _dtype(precision)), "measured")


def data_sheet_peak(name: str, precision: Precision) -> float | None:
    """Return the vendor's peak of the GPU that CUDA calls ``name``, or None if it is not in the table."""
    for pattern, (half, single) in _DATA_SHEETS.items():
        if re.fullmatch(pattern, name):
            return (single if precision == "32-true" else half) * 1e12
    return None


def _dtype(precision: Precision) -> torch.dtype:
    return {"32-true": torch.float32, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}[precision]


@torch.no_grad()
def _measure(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOPs per second of the fastest of several square matrix products."""
    size = 1024 if device.type == "cpu" else 4096
    a = torch.linspace(-1, 1, size * size, device=device).reshape(size, size).to(dtype)
    best = float("inf")
    deadline = time.perf_counter() + _PROBE_SECONDS
    while best == float("inf") or time.perf_counter() < deadline:
        started = time.perf_counter()
        a @ a
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best
