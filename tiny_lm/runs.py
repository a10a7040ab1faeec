"""Where things live in a run folder, and what is written down about the run itself.

::

    runs/<name>/
      configs/{model,training,data}.yaml   resolved: what was really used
      tokenizer/                           a copy, so that a run needs nothing outside its folder
      checkpoints/                         step-*.ckpt, last.ckpt, best.ckpt
      metrics.jsonl                        one JSON object for each logged event
      batches/*.txt                        the text of batches whose loss stood out
      samples.md                           a story told at each validation
      plots/*.png
      evaluation.json                      what the newest evaluation measured
      report.html                          one page that shows it all
      run.json                             git state, versions, device, sizes, times, final metrics
"""

import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from itertools import count
from pathlib import Path
from typing import Any

from tiny_lm.config import nearest
from tiny_lm.errors import UserError
from tiny_lm.files import read_json, write_json
from tiny_lm.locks import lock_file, lock_folder

RUNS_FOLDER = Path("runs")

_IN_TRAINING = "another process is training this run; wait for its end, or stop it first"
_IN_READING = "other processes are reading this run; try again when they are done"
_LOCK_FILE = ".lock"  # keeps other machines away
_READING_SECONDS = 20.0  # an export holds a run while it loads the model

_STEP = re.compile(r"step-(\d+)\.ckpt")


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

    def step_checkpoint(self, step: int) -> Path:
        """Return the path of the checkpoint of an optimizer step."""
        return self.checkpoints / f"step-{step:08d}.ckpt"

    def saved_steps(self) -> list[tuple[int, Path]]:
        """Return the steps that have a checkpoint under their own number, oldest first."""
        found = [(_STEP.fullmatch(path.name), path) for path in self.checkpoints.glob("step-*.ckpt")]
        return sorted((int(match[1]), path) for match, path in found if match)

    @property
    def metrics(self) -> Path:
        """Log of all metrics, one JSON object a line."""
        return self.folder / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """Stories told at each validation."""
        return self.folder / "samples.md"

    @property
    def batches(self) -> Path:
        """Folder of the text of batches whose loss stood out."""
        return self.folder / "batches"

    @property
    def plots(self) -> Path:
        """Folder of the pictures."""
        return self.folder / "plots"

    @property
    def evaluation(self) -> Path:
        """The figures of the newest evaluation, where one was made."""
        return self.folder / "evaluation.json"

    @property
    def report(self) -> Path:
        """The page that shows the run."""
        return self.folder / "report.html"

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

    @contextmanager
    def claim(self) -> Iterator[None]:
        """Keep other processes from training in this folder while the block runs; a killed one frees it by itself.

        Raises:
            UserError: another process is training there, or has been reading the run for long.
        """
        end = time.monotonic() + _READING_SECONDS
        with ExitStack() as stack:
            while True:
                try:
                    stack.enter_context(lock_folder(self.folder, _IN_TRAINING, create=True))
                    break
                except UserError:
                    if not self.folder.is_dir():
                        raise
                    with lock_folder(self.folder, _IN_TRAINING, shared=True):
                        pass  # nobody trains it; others only read it
                    if time.monotonic() > end:
                        raise UserError(f"{self.folder}: {_IN_READING}") from None
                    time.sleep(0.05)
            stack.enter_context(lock_file(self.folder / _LOCK_FILE, _IN_TRAINING))
            yield

    @contextmanager
    def claim_to_read(self) -> Iterator[None]:
        """Keep others from training in this folder while the block runs; many may read, without a right to write.

        Raises:
            UserError: another process is training there.
        """
        with (
            lock_folder(self.folder, _IN_TRAINING, shared=True),
            lock_file(self.folder / _LOCK_FILE, _IN_TRAINING, shared=True),
        ):
            yield

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
    if folder.is_file():
        raise UserError(f"{folder}: is a file, and no run folder")
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


def create_run(name: str) -> Run:
    """Create the folder of a new run, which no other process gets; where the name is taken, one with a number.

    Raises:
        UserError: it could not be created.
    """
    for number in count(1):
        run = Run(RUNS_FOLDER / (name if number == 1 else f"{name}-{number}"))
        try:
            run.folder.parent.mkdir(parents=True, exist_ok=True)
            run.folder.mkdir()
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"{run.folder}: could not be written ({error.strerror or error})") from error
        return run
    raise AssertionError


def find_newest_run(names: Sequence[str] | None = None) -> Run | None:
    """Return the newest run, or that of the model, training and data configs of these names.

    One that has a checkpoint comes before any that has none, since it was stopped before its first save.
    """
    ours = []
    for record in RUNS_FOLDER.glob("*/run.json"):
        with suppress(UserError):  # a damaged record belongs to some other run
            configs = Run(record.parent).read_record().get("configs")
            if names is None or configs == list(names):
                ours.append(Run(record.parent))
    return max(ours, key=_last_saved, default=None)


def _last_saved(run: Run) -> tuple[bool, float]:
    """Return whether a run has a checkpoint, and when its checkpoints or else its record last changed."""
    has_checkpoint = any(run.checkpoints.glob("*.ckpt"))
    return has_checkpoint, (run.checkpoints if has_checkpoint else run.record).stat().st_mtime


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the events of a ``metrics.jsonl``; a line that a killed run left half-written is passed over."""
    events = []
    for line in path.read_text(encoding="utf-8-sig", errors="replace").split("\n"):
        with suppress(ValueError):
            event = json.loads(line)
            if isinstance(event, dict) and isinstance(event.get("step"), int):
                events.append(event)
    return events


def mean_over_time(events: Sequence[dict[str, Any]], key: str) -> float:
    """Return the mean of a figure of log windows, each weighted with the time that its tokens took; NaN without one."""
    total = seconds = tokens = 0.0
    for event in events:
        if event.get(key) is not None and event.get("tokens_per_sec"):
            passed = (event["tokens"] - tokens) / event["tokens_per_sec"]
            total, seconds, tokens = total + event[key] * passed, seconds + passed, event["tokens"]
    return total / seconds if seconds else math.nan


def environment() -> dict[str, Any]:
    """Return what a result depends on besides configs and data: command, machine, versions and git state."""
    packages = ["tiny-lm", "torch", "pytorch-lightning", "numpy", "tiktoken", "rustbpe", "sentencepiece"]
    return {
        "command": sys.argv,
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "platform": platform.platform(),
        "processor": processor(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
        "git": _git_state(),
    }


def processor() -> str:
    """Return name and cores of the processor; family and model too on Linux, where clouds call several kinds alike."""
    name = platform.processor() or platform.machine()
    with suppress(OSError):  # no Linux
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0].splitlines()
        facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        if "model name" in facts:
            kind = (("family", "cpu family"), ("model", "model"))
            name = ", ".join([facts["model name"], *(f"{told} {facts[key]}" for told, key in kind if key in facts)])
    return f"{name}, {os.cpu_count()} cores"


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
