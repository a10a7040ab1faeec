"""Where metrics go: always into the run folder's ``metrics.jsonl``, and to the trackers that the config names."""

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

# --- trackers of other projects --------------------------------------------------------------------------------------


def check_loggers(names: Sequence[str]) -> None:
    """Check that the library of each tracker is installed.

    Raises:
        UserError: one is not.
    """
    for name in names:
        spec = None if name == "jsonl" else importlib.util.find_spec(name)
        # A folder of that name in the working directory (wandb leaves one) is a module without an origin.
        if name != "jsonl" and (spec is None or spec.origin is None):
            raise UserError(f"trackers: {name} is not installed; install it with: pip install 'tiny-lm[{name}]'")


def build_loggers(names: Sequence[str], run: Run, resumed_step: int, console: Console) -> list[Logger]:
    """Build what logs a run: ``metrics.jsonl`` first, then the trackers of these names, each of which may fail.

    Args:
        names: of trackers, as the training config has them.
        run: the run folder.
        resumed_step: the run goes on after this step; 0 for a new one.
        console: where a failing tracker is reported.
    """
    makers: dict[str, Callable[[], Logger]] = {
        "trackio": partial(TrackioLogger, run.name),
        "wandb": partial(_start_wandb, run),
        "tensorboard": partial(_start_tensorboard, run, resumed_step),
    }
    chosen = [name for name in dict.fromkeys(names) if name != "jsonl"]
    return [JsonlLogger(run.metrics), *(FailSafeLogger(name, makers[name], console) for name in chosen)]


class FailSafeLogger(Logger):
    """Passes everything on to a tracker until that fails; then says so in one line, and the run goes on without it.

    The tracker is started by the first call, in the process of rank 0 only.
    """

    def __init__(self, name: str, start: Callable[[], Logger], console: Console) -> None:
        """Pass on to what ``start`` returns; report a failure of it on ``console`` under ``name``."""
        super().__init__()
        self._name = name
        self._start = start
        self._console = console
        self._tracker: Logger | None = None
        self._failed = False

    @property
    def name(self) -> str:
        """Name of the tracker."""
        return self._name

    @property
    def version(self) -> int:
        """A run has one log."""
        return 0

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Hand over the resolved configs; call it once, before anything else."""
        self._try(lambda tracker: tracker.log_hyperparams(params))

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Hand over one event."""
        self._try(lambda tracker: tracker.log_metrics(metrics, step))

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """End the tracker's run, if it was started; one that failed is told so, and not heard."""
        if self._tracker is not None and self._failed:
            with suppress(Exception):
                self._tracker.finalize("failed")
        elif self._tracker is not None:
            self._try(lambda tracker: tracker.finalize(status))
        self._tracker = None

    def _try(self, call: Callable[[Logger], None]) -> None:
        if self._failed:
            return
        try:
            if self._tracker is None:
                self._tracker = self._start()
            call(self._tracker)
        except Exception as error:  # whatever a foreign library raises, it must not cost the run
            self._failed = True
            message = " ".join(str(error).split())[:300]
            self._console.print(
                f"warning: the tracker {self._name} failed and is left out from now on "
                f"({type(error).__name__}: {message})",
                markup=False,
            )


class _Wandb(WandbLogger):
    """Lightning's logger leaves the end of the run to the end of the process, where its failure could not be caught."""

    @rank_zero_only
    def finalize(self, status: str) -> None:
        super().finalize(status)
        try:
            self.experiment.finish(exit_code=0 if status == "success" else 1)
        except Exception:
            import wandb

            wandb.teardown(exit_code=1)  # or it would try again when the process ends, and complain
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
        settings=wandb.Settings(console="off"),  # or it would record every redrawing of the progress bar
    )
    experiment.define_metric("trainer/global_step")
    experiment.define_metric("*", step_metric="trainer/global_step")
    return _Wandb(experiment=experiment)


class _TensorBoard(TensorBoardLogger):
    """Lightning's logger, with the configs as text that TensorBoard shows."""

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        super().log_hyperparams(params)
        self.experiment.add_text("configs", f"```json\n{json.dumps(params, indent=2)}\n```")


def _start_tensorboard(run: Run, resumed_step: int) -> Logger:
    # Events after the checkpoint that the run goes on from are about to come again.
    purge_step = resumed_step + 1 if resumed_step else None
    return _TensorBoard(run.folder, name="tensorboard", version="", default_hp_metric=False, purge_step=purge_step)
