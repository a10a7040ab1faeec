"""Where metrics go."""

import json
import math
import time
from argparse import Namespace
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_only
from pytorch_lightning.loggers.logger import Logger

from tiny_lm.files import atomic_path


class JsonlLogger(Logger):
    """Appends each logged event as one JSON object to a file: always with ``step`` and ``timestamp`` (Unix seconds)."""

    def __init__(self, path: Path) -> None:
        """Log to ``path``, which is created with its folder."""
        super().__init__()
        self._path = path

    @property
    def name(self) -> str:
        """Name of the tracker."""
        return "jsonl"

    @property
    def version(self) -> int:
        """A run has one log."""
        return 0

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append one event."""
        # JSON has no NaN or infinity.
        values = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values, "timestamp": round(time.time(), 3)}) + "\n")

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the run folder holds the resolved configs."""

    @rank_zero_only
    def drop_after(self, step: int) -> None:
        """Forget events after ``step``, which a resumed run is about to log again."""
        if not self._path.exists():
            return
        events = read_metrics(self._path)
        with atomic_path(self._path) as temporary:
            lines = [json.dumps(event) + "\n" for event in events if event["step"] <= step]
            temporary.write_text("".join(lines), encoding="utf-8")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the events of a ``metrics.jsonl``; a line that a killed run left half-written is passed over."""
    events = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with suppress(ValueError):
            event = json.loads(line)
            if isinstance(event, dict) and isinstance(event.get("step"), int):
                events.append(event)
    return events
