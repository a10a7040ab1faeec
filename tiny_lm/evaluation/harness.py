"""Run benchmarks of the Language Model Evaluation Harness (lm-eval) on a run or an export."""

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
    """Run harness tasks on a run and return the results of ``lm_eval.simple_evaluate``.

    Args:
        run: a run folder, a checkpoint inside one, or a folder written by ``tiny-lm export huggingface``.
        tasks: task names.
        include_path: folder of your own tasks; the harness's own are then not searched.
        num_fewshot: examples before each question; None: the task's default.
        limit: maximum number of questions per task.
        batch_size: texts scored together.

    Raises:
        UserError: lm-eval is not installed, a task is unknown, or its questions or the run cannot be read.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("the harness needs lm-eval: pip install 'tiny-lm[eval]'")
    if include_path and not include_path.is_dir():
        raise UserError(f"--include-path {include_path}: no such folder")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # between libraries: nothing the user could fix
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        from tiny_lm.evaluation.harness_model import HarnessModel

        manager = TaskManager(include_path=include_path, include_defaults=include_path is None)
        for task in tasks:
            if not manager.match_tasks([task]):
                close = get_close_matches(task, manager.all_tasks, n=1)  # among thousands of names
                raise UserError(f"--tasks {task}: no such task{f'; did you mean {close[0]!r}?' if close else ''}")
        model = HarnessModel(str(run), batch_size=batch_size)
        try:
            results: dict[str, Any] = simple_evaluate(
                model=model,
                tasks=list(tasks),
                num_fewshot=num_fewshot,
                limit=limit,
                task_manager=manager,
                bootstrap_iters=1000,
            )
        except OSError as error:  # no network, data set or file
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"--tasks {','.join(tasks)}: their questions could not be read ({reason})") from error
    return results
