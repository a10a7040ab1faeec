"""Memory and load of the process and of the GPU."""

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from tiny_lm.hardware.memory import peak_memory
from tiny_lm.training.callbacks.base import StepCallback, StepMetrics


class GpuStatsMonitor(StepCallback):
    """Logs memory and load of the process and of the GPU; values that cannot be read are omitted."""

    def __init__(self, every_n_steps: int, metrics: StepMetrics) -> None:
        """Log every ``every_n_steps`` optimizer steps."""
        self._every_n_steps = every_n_steps
        self._metrics = metrics
        self._clocks = (0.0, 0.0)

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Start measuring CPU time."""
        self._clocks = _clocks()

    def on_step_end(self, trainer: pl.Trainer, module: Any, step: int) -> None:
        """Record current metrics, and the load since the last time."""
        if step % self._every_n_steps:
            return
        before, self._clocks = self._clocks, _clocks()
        busy, passed = (now - then for now, then in zip(self._clocks, before, strict=True))
        self._metrics["process_cpu_percent"] = 100 * busy / max(passed, 1e-9)  # of one core, as `top` counts
        self._metrics.update(peak_memory())
        with suppress(OSError, ValueError):  # /proc is Linux's
            pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
            self._metrics["process_memory_mb"] = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
        if torch.cuda.is_available():
            self._metrics["gpu_memory_mb"] = torch.cuda.memory_allocated() / 2**20
            with suppress(Exception):  # needs nvidia-ml-py (the extra gpu), and a driver that supports it
                self._metrics["gpu_utilization_percent"] = torch.cuda.utilization()
                self._metrics["gpu_temperature_c"] = torch.cuda.temperature()


def _clocks() -> tuple[float, float]:
    """Return CPU seconds of this process, and wall-clock seconds."""
    return time.process_time(), time.perf_counter()
