"""The loggers of a run: ``metrics.jsonl`` always, and those that the config names as ``trackers``."""

import importlib.util
import json
import os
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_only
from pytorch_lightning.loggers import TensorBoardLogger, WandbLogger
from pytorch_lightning.loggers.logger import Logger
from rich.console import Console

from tiny_lm.errors import UserError
from tiny_lm.runs import Run
from tiny_lm.tracking.jsonl_logger import JsonlLogger
from tiny_lm.tracking.trackio_logger import TrackioLogger


def check_loggers(names: Sequence[str]) -> None:
    """Check that the library of each logger is installed.

    Raises:
        UserError: one is not.
    """
    for name in names:
        spec = None if name == "jsonl" else importlib.util.find_spec(name)
        # A folder of that name in the working directory (wandb leaves one) is a module without an origin.
        if name != "jsonl" and (spec is None or spec.origin is None):
            raise UserError(f"trackers: {name} is not installed; install it with: pip install 'tiny-lm[{name}]'")


def build_loggers(names: Sequence[str], run: Run, resumed_step: int, console: Console) -> list[Logger]:
    """Build the loggers of a run: ``metrics.jsonl`` first, then the named ones, each of which may fail.

    Args:
        names: ``trackers`` of the training config.
        run: the run folder.
        resumed_step: the step to resume from; 0 for a new run.
        console: prints a warning when a logger fails.
    """
    makers: dict[str, Callable[[], Logger]] = {
        "trackio": partial(TrackioLogger, run.name),
        "wandb": partial(_start_wandb, run),
        "tensorboard": partial(_start_tensorboard, run, resumed_step),
    }
    chosen = [name for name in dict.fromkeys(names) if name != "jsonl"]
    return [JsonlLogger(run.metrics), *(FailSafeLogger(name, makers[name], console) for name in chosen)]


class FailSafeLogger(Logger):
    """Forwards to a logger until it fails; then prints one warning, and the run continues without it.

    The first call starts the logger, on rank 0 only.
    """

    def __init__(self, name: str, start: Callable[[], Logger], console: Console) -> None:
        """Forward to the logger that ``start`` returns; ``name`` appears in the warning."""
        super().__init__()
        self._name = name
        self._start = start
        self._console = console
        self._logger: Logger | None = None
        self._failed = False

    @property
    def name(self) -> str:
        """Name of the logger."""
        return self._name

    @property
    def version(self) -> int:
        """Always 0: a run has one log."""
        return 0

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Forward the resolved configs; call it once, first."""
        self._try(lambda logger: logger.log_hyperparams(params))

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Forward one event."""
        self._try(lambda logger: logger.log_metrics(metrics, step))

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Finish the logger's run, if it was started; errors of a failed one are ignored."""
        if self._logger is not None and self._failed:
            with suppress(Exception):
                self._logger.finalize("failed")
        elif self._logger is not None:
            self._try(lambda logger: logger.finalize(status))
        self._logger = None

    def _try(self, call: Callable[[Logger], None]) -> None:
        if self._failed:
            return
        try:
            if self._logger is None:
                self._logger = self._start()
            call(self._logger)
        except Exception as error:  # no error of a library may stop the run
            self._failed = True
            message = " ".join(str(error).split())[:300]
            self._console.print(
                f"warning: the logger {self._name} failed and is disabled ({type(error).__name__}: {message})",
                markup=False,
            )


class _Wandb(WandbLogger):
    """Finishes the run in ``finalize``; Lightning's does so at exit, where failures cannot be caught."""

    @rank_zero_only
    def finalize(self, status: str) -> None:
        super().finalize(status)
        try:
            self.experiment.finish(exit_code=0 if status == "success" else 1)
        except Exception:
            import wandb

            wandb.teardown(exit_code=1)  # otherwise it retries at exit, and complains
            raise


def _start_wandb(run: Run) -> Logger:
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # read when wandb is imported
    import wandb

    experiment = wandb.init(
        project=os.environ.get("WANDB_PROJECT") or "tiny-lm",
        name=run.name,
        id=run.name,
        resume="allow",
        dir=run.folder,
        settings=wandb.Settings(console="off"),  # otherwise it records every update of the progress bar
    )
    experiment.define_metric("trainer/global_step")
    experiment.define_metric("*", step_metric="trainer/global_step")
    return _Wandb(experiment=experiment)


class _TensorBoard(TensorBoardLogger):
    """Also logs the configs as text."""

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        super().log_hyperparams(params)
        self.experiment.add_text("configs", f"```json\n{json.dumps(params, indent=2)}\n```")


def _start_tensorboard(run: Run, resumed_step: int) -> Logger:
    # A resumed run logs the events after its checkpoint again.
    purge_step = resumed_step + 1 if resumed_step else None
    return _TensorBoard(run.folder, name="tensorboard", version="", default_hp_metric=False, purge_step=purge_step)
