from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import model, training

from tiny_lm.data import BinDataConfig
from tiny_lm.model import ModelConfig
from tiny_lm.runs import Run
from tiny_lm.training.fit import TrainingResult, train


@pytest.fixture
def fit(data_config: Callable[..., BinDataConfig], run: Run) -> Callable[..., TrainingResult]:
    def do(
        run: Run = run, resume_from: Path | None = None, config: ModelConfig | None = None, **values: Any
    ) -> TrainingResult:
        return train(config or model(), training(**values), data_config(), run, resume_from=resume_from)

    return do
