"""What two processes do in the tests: torchrun starts this script twice, and each process tells how its runs ended.

torchrun --nproc-per-node 2 ... two_ranks.py STREAM_FOLDER FOLDER
"""

import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from tiny_runs import model, training

from tiny_lm.data import BinDataConfig
from tiny_lm.errors import UserError
from tiny_lm.runs import Run
from tiny_lm.training.fit import train

STREAM, FOLDER = map(Path, sys.argv[1:3])
RANK = int(os.environ["RANK"])


def fit(name: str, *, dropout: float = 0.0, batch_size: int = 4, resume_step: int | None = None, **values: Any) -> Any:
    """Train into the run folder of that name; return whether the run finished and its steps, or the error line."""
    run = Run(FOLDER / name)
    data = BinDataConfig(
        train_path=str(STREAM / "train.bin"), val_path=str(STREAM / "val.bin"), block_size=32, batch_size=batch_size
    )
    config = training(devices=2, keep_checkpoints=9, **values)
    checkpoint = None if resume_step is None else run.checkpoints / f"step-{resume_step:08d}.ckpt"
    try:
        result = train(model(dropout=dropout), config, data, run, resume_from=checkpoint)
    except UserError as error:
        return str(error)
    return [result.finished, result.steps]


def stop_when_under_way(name: str) -> None:
    """Send a signal to this process, and only to this one, when the run has made some steps."""
    metrics = Run(FOLDER / name).metrics
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 3:
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGTERM)


results = {
    "accumulated": fit("accumulated", accumulate_grad_batches=2, save_every_n_steps=3),
    "split": fit("split", batch_size=6),
    "whole": fit("whole", dropout=0.1, accumulate_grad_batches=2, log_every_n_steps=3),
}
if RANK == 0:
    shutil.copytree(FOLDER / "whole", FOLDER / "broken")
torch.distributed.barrier()
results["broken"] = fit("broken", dropout=0.1, accumulate_grad_batches=2, log_every_n_steps=3, resume_step=4)
results["disagreeing"] = fit("disagreeing", seed=RANK)
if RANK == 1:
    threading.Thread(target=stop_when_under_way, args=["stopped"], daemon=True).start()
results["stopped"] = fit("stopped", max_steps=10**6, val_every_n_steps=10**6, save_every_n_steps=10**6)
(FOLDER / f"rank{RANK}.json").write_text(json.dumps(results))
