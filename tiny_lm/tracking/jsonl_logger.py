"""``metrics.jsonl``: the metrics of a run, in its folder."""

import json
import math
import os
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_only
from pytorch_lightning.loggers.logger import Logger

from tiny_lm.errors import UserError
from tiny_lm.files import atomic_path
from tiny_lm.locks import open_append
from tiny_lm.reading import open_regular
from tiny_lm.runs import parse_event


class JsonlLogger(Logger):
    """Appends each event as one JSON object to a file, with ``step`` and ``timestamp`` (Unix seconds)."""

    def __init__(self, path: Path) -> None:
        """Log to ``path``; it is created with its folder."""
        super().__init__()
        self._path = path

    @property
    def name(self) -> str:
        """Name of the logger."""
        return "jsonl"

    @property
    def version(self) -> int:
        """Always 0: a run has one log."""
        return 0

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append one event.

        Raises:
            UserError: the disk is full.
        """
        # JSON has no NaN or infinity.
        values = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with os.fdopen(open_append(self._path), "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values, "timestamp": round(time.time(), 3)}) + "\n")
        except OSError as error:
            raise UserError(f"{self._path}: could not be written ({error.strerror or error})") from error

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the run folder holds the resolved configs."""

    @rank_zero_only
    def truncate(self, step: int) -> None:
        """Remove events after ``step``, which a resumed run will log again."""
        if not self._path.exists():
            return
        with (
            atomic_path(self._path) as temporary,
            open_regular(self._path) as before,
            temporary.open("wb") as after,
        ):
            for line in before:
                event = parse_event(line)
                if event is not None and event["step"] <= step:
                    after.write(line.rstrip(b"\n") + b"\n")
