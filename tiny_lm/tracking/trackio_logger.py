"""Logging to trackio."""

import os
import sys
from argparse import Namespace
from contextlib import redirect_stdout
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_only
from pytorch_lightning.loggers.logger import Logger


class TrackioLogger(Logger):
    """Logs to trackio, locally unless trackio's environment variables name a Space or a server.

    The project is ``TRACKIO_PROJECT``, or ``tiny-lm``. Resumes a run of the same name.
    """

    def __init__(self, run_name: str) -> None:
        """Log to the run of this name; the first configs or metrics start it."""
        super().__init__()
        self._run_name = run_name
        self._run: Any = None

    @property
    def name(self) -> str:
        """Name of the logger."""
        return "trackio"

    @property
    def version(self) -> str:
        """Name of the run."""
        return self._run_name

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Start the run with the configs, a column per key."""
        sections = vars(params) if isinstance(params, Namespace) else params
        flat = {f"{section}.{key}": value for section, values in sections.items() for key, value in values.items()}
        self._open(flat)

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Log one event."""
        if self._run is None:
            self._open({})
        self._run.log(metrics, step=step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Flush the queue and finish the run."""
        if self._run is not None:
            import trackio

            with redirect_stdout(sys.stderr):
                trackio.finish()  # type: ignore[no-untyped-call]  # untyped in trackio

    def _open(self, config: dict[str, Any]) -> None:
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
        import trackio

        with redirect_stdout(sys.stderr):  # its greeting; standard output is for results
            self._run = trackio.init(
                os.environ.get("TRACKIO_PROJECT") or "tiny-lm",
                name=self._run_name,
                config=config,
                resume="allow",
                embed=False,
                auto_log_gpu=False,  # GpuStatsMonitor does
                auto_log_cpu=False,
            )
