"""Strategy fsdp: each process holds a part of every weight, and nothing else changes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny_runs import losses, model, training
from two_processes import assert_same_run, start_two_processes, values_of

from tiny_lm.data import BinDataConfig
from tiny_lm.errors import UserError
from tiny_lm.model.checkpoint import CHECKPOINT_KEY, load_checkpoint_model
from tiny_lm.runs import Run
from tiny_lm.training.fit import train
from tiny_lm.training.resume import check_resume

pytestmark = pytest.mark.deep


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, stream_folder: Path) -> Path:
    """The folder in which two processes have trained sharded models; see sharded_ranks.py."""
    return start_two_processes("sharded_ranks.py", stream_folder, tmp_path_factory.mktemp("shards"))


def test_a_sharded_model_learns_what_a_whole_one_does(
    shards: Path, data_config: Callable[..., BinDataConfig], run: Run
) -> None:
    """Also where gradients are clipped: by their norm over all shards."""
    quiet, config = model("qwen3", dropout=0.0), training(accumulate_grad_batches=2, grad_clip_norm=0.5)
    train(quiet, config, data_config(), run)
    assert min(values_of(run, "grad_norm")) > 0.5  # every step was clipped
    assert_same_run(Run(shards / "whole"), run)
    frugal = losses(Run(shards / "frugal"))
    assert len(frugal) == 3
    assert frugal[1] == pytest.approx(losses(run)[1], abs=1e-4)


def test_a_sharded_run_leaves_ordinary_checkpoints(shards: Path, run: Run, tmp_path: Path) -> None:
    whole, resumed = Run(shards / "whole"), Run(shards / "resumed")
    final = [load_checkpoint_model(run.last_checkpoint).model.state_dict() for run in (whole, resumed)]
    assert final[0]["lm_head.weight"].data_ptr() == final[0]["token_emb.weight"].data_ptr()
    assert all(torch.allclose(final[0][key], final[1][key], atol=1e-5) for key in final[0])
    expected = losses(whole)
    assert losses(resumed) == pytest.approx({step: expected[step] for step in range(5, 13)}, abs=1e-4)


def test_one_process_goes_on_with_a_sharded_run_but_not_the_other_way(
    shards: Path, data_config: Callable[..., BinDataConfig], run: Run, tmp_path: Path
) -> None:
    checkpoint = shards / "whole" / "checkpoints" / "step-00000004.ckpt"
    quiet, config = model("qwen3", dropout=0.0), training(accumulate_grad_batches=2, grad_clip_norm=0.5)
    train(quiet, config, data_config(), run, resume_from=checkpoint)
    expected = losses(Run(shards / "whole"))
    assert losses(run) == pytest.approx({step: expected[step] for step in range(5, 13)}, abs=1e-4)
    identity = torch.load(run.last_checkpoint, weights_only=True)[CHECKPOINT_KEY]
    sharded = {**identity, "training": {**identity["training"], "strategy": "fsdp", "max_steps": 20}}
    with pytest.raises(UserError, match=r"last.ckpt: was not written by strategy fsdp"):
        check_resume(run.last_checkpoint, sharded, Console(quiet=True))
    check_resume(checkpoint, sharded, Console(quiet=True))
