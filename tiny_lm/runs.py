"""Where things live in a run folder, and what is written down about the run itself.

::

    runs/<name>/
      configs/{model,training,data}.yaml   resolved: what was really used
      tokenizer/                           a copy, so that a run needs nothing outside its folder
      checkpoints/                         step-*.ckpt, last.ckpt, best.ckpt
      metrics.jsonl                        one JSON object for each logged event
      plots/*.png
      run.json                             git state, versions, device, sizes, times, final metrics
"""

import platform
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from tiny_lm.config import nearest
from tiny_lm.errors import UserError
from tiny_lm.files import read_json, write_json

RUNS_FOLDER = Path("runs")


@dataclass(frozen=True)
class Run:
    """The paths inside one run folder."""

    folder: Path

    @property
    def name(self) -> str:
        """The run's name, which is its folder's."""
        return self.folder.name

    @property
    def configs(self) -> Path:
        """Folder of the resolved configs."""
        return self.folder / "configs"

    @property
    def tokenizer(self) -> Path:
        """Folder of the tokenizer that wrote the run's token streams."""
        return self.folder / "tokenizer"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.folder / "checkpoints"

    @property
    def last_checkpoint(self) -> Path:
        """The newest checkpoint: where training goes on."""
        return self.checkpoints / "last.ckpt"

    @property
    def best_checkpoint(self) -> Path:
        """The checkpoint of the lowest validation loss."""
        return self.checkpoints / "best.ckpt"

    @property
    def metrics(self) -> Path:
        """Log of all metrics, one JSON object a line."""
        return self.folder / "metrics.jsonl"

    @property
    def plots(self) -> Path:
        """Folder of the pictures."""
        return self.folder / "plots"

    @property
    def record(self) -> Path:
        """What is written down about the run itself."""
        return self.folder / "run.json"

    def read_record(self) -> dict[str, Any]:
        """Return ``run.json``, or nothing where there is none yet."""
        if not self.record.exists():
            return {}
        record = read_json(self.record)
        if not isinstance(record, dict):
            raise UserError(f"{self.record}: is no record of a run")
        return record

    def update_record(self, **values: Any) -> None:
        """Set ``values`` in ``run.json`` and leave the rest."""
        write_json(self.record, {**self.read_record(), **values})

    def model_checkpoint(self) -> Path:
        """Return the checkpoint to generate from: the best one, or the newest where none was validated.

        Raises:
            UserError: the run has none yet.
        """
        for checkpoint in (self.best_checkpoint, self.last_checkpoint):
            if checkpoint.is_file():
                return checkpoint
        raise UserError(f"{self.folder}: has no checkpoint yet; train it first or wait for its first save")


def open_run(path: str | Path) -> Run:
    """Return the run of a folder.

    Raises:
        UserError: there is no such folder, or it is no run.
    """
    folder = Path(path)
    if not folder.is_dir():
        known = [str(record.parent) for record in RUNS_FOLDER.glob("*/run.json")]
        raise UserError(f"{folder}: no such run folder{nearest(str(folder), known)}")
    run = Run(folder)
    if not run.record.is_file():
        raise UserError(f"{folder}: is no run folder (it has no run.json)")
    return run


def new_run_name(model: str, data: str) -> str:
    """Name a run after what is trained on what, and when (UTC)."""
    return f"{model}-{data}-{datetime.now(timezone.utc):%Y%m%d-%H%M%S}"


def find_newest_run(names: Sequence[str]) -> Run | None:
    """Return the newest run of the model, training and data configs of these names that has a checkpoint."""
    candidates = [Run(checkpoint.parent.parent) for checkpoint in RUNS_FOLDER.glob("*/checkpoints/last.ckpt")]
    ours = []
    for run in candidates:
        with suppress(UserError):  # a damaged record belongs to some other run
            if run.read_record().get("configs") == list(names):
                ours.append(run)
    return max(ours, key=lambda run: run.last_checkpoint.stat().st_mtime, default=None)


def environment() -> dict[str, Any]:
    """Return what a result depends on besides configs and data: command, machine, versions and git state."""
    packages = ["tiny-lm", "torch", "pytorch-lightning", "numpy", "tiktoken", "rustbpe", "sentencepiece"]
    return {
        "command": sys.argv,
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
        "git": _git_state(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_state() -> dict[str, Any] | None:
    """Return commit and cleanliness of the checkout that the package runs from; None where it is installed."""
    here = Path(__file__).parent
    try:
        if Path(_git("rev-parse", "--show-toplevel", cwd=here)) != here.parent.resolve():
            return None  # installed somewhere inside another project
        commit = _git("rev-parse", "HEAD", cwd=here)
        changed = _git("status", "--porcelain", "--untracked-files=no", cwd=here)
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "changed_files": len(changed.splitlines())}


def _git(*arguments: str, cwd: Path) -> str:
    result = subprocess.run(["git", *arguments], cwd=cwd, capture_output=True, text=True, timeout=10, check=True)
    return result.stdout.strip()
