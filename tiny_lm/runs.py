"""Run folders: their layout, ``run.json``, and the paths that users give.

::

    runs/<name>/
      configs/{model,training,data}.yaml   resolved, as used
      tokenizer/                           a copy, so that a run needs nothing outside its folder
      checkpoints/                         step-*.ckpt, last.ckpt, best.ckpt
      metrics.jsonl                        one JSON object for each logged event
      batches/*.txt                        the text of batches with a loss spike
      samples.md                           samples at each validation
      plots/*.png
      evaluation.json                      the newest evaluation
      report.html                          the report page
      run.json                             git state, versions, device, sizes, times, final metrics
"""

import io
import json
import math
import os
import re
import stat
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import count
from pathlib import Path
from typing import Any

from tiny_lm.config import nearest
from tiny_lm.console import shell_command
from tiny_lm.errors import UserError
from tiny_lm.files import write_json
from tiny_lm.locks import lock_file, lock_folder
from tiny_lm.reading import read_bytes, read_text

RUNS_FOLDER = Path("runs")

_IN_TRAINING = "another process is training this run; wait until it has finished, or stop it first"
_IN_READING = "other processes are reading this run; try again later"
_LOCK_FILE = ".lock"  # locks out other machines
_READING_SECONDS = 20.0  # an export locks a run while it loads the model

_METADATA_LIMIT = 16 * 2**20  # bytes; a run.json has a few thousand
_METRICS_LIMIT = 384 * 2**20  # bytes; a million events take about 300 million
_MAX_EVENTS = 1_000_000  # one every ten steps of a run of ten million

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
        """The newest checkpoint, from which training resumes."""
        return self.checkpoints / "last.ckpt"

    @property
    def best_checkpoint(self) -> Path:
        """The checkpoint of the lowest validation loss."""
        return self.checkpoints / "best.ckpt"

    def step_checkpoint(self, step: int) -> Path:
        """Return the path of the checkpoint of an optimizer step."""
        return self.checkpoints / f"step-{step:08d}.ckpt"

    def saved_steps(self) -> list[tuple[int, Path]]:
        """Return the steps with a ``step-*.ckpt``, and its path, oldest first."""
        found = [(_STEP.fullmatch(path.name), path) for path in self.checkpoints.glob("step-*.ckpt")]
        return sorted((int(match[1]), path) for match, path in found if match)

    @property
    def metrics(self) -> Path:
        """Log of all metrics, one JSON object per line."""
        return self.folder / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """Samples at each validation."""
        return self.folder / "samples.md"

    @property
    def batches(self) -> Path:
        """Folder of the text of batches with a loss spike."""
        return self.folder / "batches"

    @property
    def plots(self) -> Path:
        """Folder of the plots."""
        return self.folder / "plots"

    @property
    def evaluation(self) -> Path:
        """Metrics of the newest evaluation."""
        return self.folder / "evaluation.json"

    @property
    def report(self) -> Path:
        """The report page."""
        return self.folder / "report.html"

    @property
    def metadata_file(self) -> Path:
        """``run.json``: versions, git state, device, sizes, times, final metrics."""
        return self.folder / "run.json"

    def read_metadata(self) -> dict[str, Any]:
        """Return ``run.json``, or an empty dict if there is none yet."""
        if not os.path.lexists(self.metadata_file):
            return {}
        try:
            record = parse_finite_json(read_text(self.metadata_file, limit=_METADATA_LIMIT))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.metadata_file}: is not valid JSON ({error})") from None
        if not isinstance(record, dict):
            raise UserError(f"{self.metadata_file}: is not the metadata of a run")
        return record

    def update_metadata(self, **values: Any) -> None:
        """Set ``values`` in ``run.json`` and keep the rest."""
        write_json(self.metadata_file, {**self.read_metadata(), **values})

    @contextmanager
    def claim(self) -> Iterator[None]:
        """Lock the folder for training while the block runs; the lock ends with the process.

        Raises:
            UserError: another process is training there, or has been reading the run for too long.
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
                        pass  # not being trained, only read
                    if time.monotonic() > end:
                        raise UserError(f"{self.folder}: {_IN_READING}") from None
                    time.sleep(0.05)
            stack.enter_context(lock_file(self.folder / _LOCK_FILE, _IN_TRAINING))
            yield

    @contextmanager
    def claim_to_read(self) -> Iterator[None]:
        """Lock the folder for reading while the block runs: shared, and without write permission.

        Raises:
            UserError: another process is training there.
        """
        with (
            lock_folder(self.folder, _IN_TRAINING, shared=True),
            lock_file(self.folder / _LOCK_FILE, _IN_TRAINING, shared=True),
        ):
            yield

    def model_checkpoint(self) -> Path:
        """Return the checkpoint to generate from: the best one, or the newest if none was validated.

        Raises:
            UserError: the run has none yet.
        """
        for checkpoint in (self.best_checkpoint, self.last_checkpoint):
            if checkpoint.is_file():
                return checkpoint
        raise UserError(f"{self.folder}: has no checkpoint yet; train it first or wait for its first save")


def is_checkpoint(path: Path) -> bool:
    """Return whether a path that the user gave names a checkpoint file."""
    return path.suffix == ".ckpt"


def is_huggingface_folder(path: Path) -> bool:
    """Return whether a path is a model folder in Hugging Face's layout."""
    return (path / "config.json").is_file()


def run_folder_of(path: Path) -> Path:
    """Return the run folder of a checkpoint, or the path itself if it is not a checkpoint."""
    return path.parent.parent if is_checkpoint(path) else path


def open_run(path: str | Path) -> Run:
    """Return the run of a folder.

    Raises:
        UserError: it does not exist or is not a run folder.
    """
    folder = Path(path)
    try:
        mode = folder.stat().st_mode
        (folder / "run.json").exists()
    except FileNotFoundError:
        mode = 0
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise UserError(f"{folder}: could not be read ({getattr(error, 'strerror', None) or error})") from None
    if stat.S_ISREG(mode):
        raise UserError(f"{folder}: is a file, not a run folder")
    if not stat.S_ISDIR(mode):
        known = [str(record.parent) for record in RUNS_FOLDER.glob("*/run.json")]
        raise UserError(f"{folder}: no such run folder{nearest(str(folder), known)}")
    run = Run(folder)
    if not run.metadata_file.is_file():
        if is_huggingface_folder(folder):
            command = shell_command("tiny-lm", "import", folder)
            raise UserError(f"{folder}: is a model in Hugging Face layout; import it as a run first: {command}")
        raise UserError(f"{folder}: is not a run folder (it has no run.json)")
    return run


def new_run_name(model: str, data: str) -> str:
    """Return a run name from model, data and time (UTC); bytes that are not UTF-8 become ``_``."""
    return re.sub("[\ud800-\udfff]", "_", f"{model}-{data}-{datetime.now(timezone.utc):%Y%m%d-%H%M%S}")


def create_run(name: str) -> Run:
    """Create the folder of a new run, atomically; if the name is taken, append a number.

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


def list_runs() -> list[Run]:
    """Return all runs with a readable ``run.json``, by name."""
    found = []
    for record in sorted(RUNS_FOLDER.glob("*/run.json")):
        with suppress(UserError):
            Run(record.parent).read_metadata()
            found.append(Run(record.parent))
    return found


def find_newest_run() -> Run | None:
    """Return the run that was saved last; runs with checkpoints are preferred over runs that never saved one."""
    return max(list_runs(), key=last_saved, default=None)


def last_saved(run: Run) -> tuple[bool, float]:
    """Return whether a run has a checkpoint, and when its checkpoints, or else its ``run.json``, last changed."""
    with suppress(OSError):
        if any(run.checkpoints.glob("*.ckpt")):
            return True, run.checkpoints.stat().st_mtime
    with suppress(OSError):
        return False, run.metadata_file.stat().st_mtime
    return False, 0.0


def parse_finite_json(text: str) -> Any:
    """Parse JSON; numbers that are not finite floats (NaN, infinity, 10^400) become None.

    Raises:
        ValueError: it is not JSON.
        RecursionError: it is nested too deeply.
    """
    return json.loads(text, parse_int=_parse_int, parse_float=_parse_float, parse_constant=lambda _: None)


def _parse_int(text: str) -> int | float | None:
    return int(text) if len(text) < 19 else _parse_float(text)


def _parse_float(text: str) -> float | None:
    value = float(text)
    return value if math.isfinite(value) else None


def number_in(record: Any, *keys: str) -> float | None:
    """Return a number of a ``run.json`` by its nested keys; None if missing."""
    for key in keys:
        record = record.get(key) if isinstance(record, dict) else None
    if isinstance(record, bool) or not isinstance(record, (int, float)) or abs(record) > sys.float_info.max:
        return None
    return float(record)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the events of a ``metrics.jsonl``: step, and metrics that are finite numbers or None.

    Invalid lines are skipped: a killed run leaves a partial one, and people edit files.

    Raises:
        UserError: the file cannot be read, or is too large.
    """
    events = []
    for line in io.BytesIO(read_bytes(path, limit=_METRICS_LIMIT)):
        event = parse_event(line)
        if event is not None:
            events.append({key: value for key, value in event.items() if _is_metric(value)})
        if len(events) > _MAX_EVENTS:
            raise UserError(f"{path}: has more than {_MAX_EVENTS:,} events; raise log_every_n_steps in long runs")
    return events


def parse_event(line: bytes) -> dict[str, Any] | None:
    """Return the event of a line of ``metrics.jsonl``; None if it is not one."""
    with suppress(ValueError, RecursionError):
        event = parse_finite_json(line.decode("utf-8-sig", errors="replace"))
        if isinstance(event, dict) and type(event.get("step")) is int and 0 <= event["step"] < 2**53:
            return event
    return None


def _is_metric(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))


def mean_over_time(events: Sequence[dict[str, Any]], key: str) -> float:
    """Return the mean of a metric, weighted by the time that the tokens of each event took; NaN without values."""
    total = seconds = tokens = 0.0
    for event in events:
        if event.get(key) is not None and event.get("tokens_per_sec") and event.get("tokens") is not None:
            passed = (event["tokens"] - tokens) / event["tokens_per_sec"]
            total, seconds, tokens = total + event[key] * passed, seconds + passed, event["tokens"]
    return total / seconds if seconds else math.nan
