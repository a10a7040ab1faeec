"""Benchmarks of the Language Model Evaluation Harness (lm-eval) on a run or an export."""

import importlib.util
import logging
import warnings
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from tiny_lm.errors import UserError


def run_harness(
    run: str | Path,
    tasks: Sequence[str],
    *,
    include_path: Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 16,
) -> dict[str, Any]:
    """Run tasks of the harness on a run and return its results, as ``lm_eval.simple_evaluate`` does.

    Args:
        run: a run folder, a checkpoint inside one, or a folder that ``tiny-lm export huggingface`` wrote.
        tasks: their names.
        include_path: a folder of further tasks; the harness's own ones are not searched then.
        num_fewshot: examples before each question; None: as the task says.
        limit: only so many questions of each task.
        batch_size: texts that are scored at a time.

    Raises:
        UserError: lm-eval is not installed, a task is unknown, its questions are not to be had, or the run cannot be
            loaded.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("the harness needs lm-eval: pip install 'tiny-lm[eval]'")
    if include_path and not include_path.is_dir():
        raise UserError(f"--include-path {include_path}: no such folder")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries among themselves: nothing that the user could mend
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        from tiny_lm.evaluation.harness_model import HarnessModel

        manager = TaskManager(include_path=include_path, include_defaults=include_path is None)
        for task in tasks:
            if not manager.match_tasks([task]):
                close = get_close_matches(task, manager.all_tasks, n=1)  # of many thousands
                raise UserError(f"--tasks {task}: no such task{f'; did you mean {close[0]!r}?' if close else ''}")
        model = HarnessModel(str(run), batch_size=batch_size)
        try:
            found: dict[str, Any] = simple_evaluate(
                model=model,
                tasks=list(tasks),
                num_fewshot=num_fewshot,
                limit=limit,
                task_manager=manager,
                bootstrap_iters=1000,
            )
        except OSError as error:  # no network, no such data set, no such file
            told = " ".join(str(error).split())[:300]
            raise UserError(f"--tasks {','.join(tasks)}: their questions could not be read ({told})") from error
    return found
