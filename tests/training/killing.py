"""Runs `tiny-lm train --resume auto` again and again, each time in a new process that may be killed; not a test itself.

Called with a JSON file of jobs. It loads the libraries once and forks, which saves each process four seconds.
A job has a ``folder`` (with the configs, in which the command runs) and ``kills``: for each process the point at which
it kills itself, or the seconds after which it is killed from outside, or null to let it be. A process that ends by
itself is the last one.

A point is a number of things that have happened: optimizer steps, micro-batches (by their number in a step), batches of
a validation (by their number in it), tokens of a sample story, and whatever changes a file of the run folder. The
process dies before that thing is done. What happened is written beside the folder, to points-<n>.txt and
batches-<n>.txt, where n counts the processes of the job.
"""

import json
import os
import re
import signal
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

import tiny_lm.cli
import tiny_lm.evaluation.plots
import tiny_lm.training.fit
from tiny_lm.hardware.flops import peak_flops
from tiny_lm.model import Transformer

COMMAND = ["train", "--model-config", "model.yaml", "--training-config", "training.yaml", "--data-config", "data.yaml"]
CHANGES = {"os.rename": "rename to", "os.link": "link", "os.remove": "remove", "open": "open"}


class Witness:
    """Writes down what happens, and kills the process at its point."""

    def __init__(self, folder: Path, number: int, point: int | None) -> None:
        self._run = f"{folder}{os.sep}runs{os.sep}"
        self._left = point
        self._micro_batches = 0  # of the step at hand
        self._validated = 0  # batches of the validation at hand
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        self._points = os.open(folder.with_name(f"{folder.name}-points-{number}.txt"), flags)
        self._batches = os.open(folder.with_name(f"{folder.name}-batches-{number}.txt"), flags)
        sys.addaudithook(self._on_audit)
        register_optimizer_step_post_hook(self._on_step)
        register_module_forward_pre_hook(self._on_forward)

    def note(self, what: str, file: Path | None = None) -> None:
        os.write(self._points, (what + "\n").encode())
        if self._left is not None:
            self._left -= 1
            if self._left < 0:
                if file is not None:
                    _tear(what, file)
                os.kill(os.getpid(), signal.SIGKILL)

    def _on_step(self, *_: Any) -> None:
        self.note("optimizer step")
        self._micro_batches = 0

    def _on_forward(self, module: Any, inputs: Any) -> None:
        if not isinstance(module, Transformer):
            return
        if module.training:
            self._micro_batches, self._validated = self._micro_batches + 1, 0
            self.note(f"micro-batch {self._micro_batches}")
            os.write(self._batches, b"%d\n" % zlib.crc32(inputs[0].numpy().tobytes()))
        elif inputs[0].shape[1] == module.config.context_length:  # whole windows, as only a validation reads
            self._validated += 1
            self.note(f"validation {self._validated}")
        else:
            self.note("story")

    def _on_audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in CHANGES:
            return
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        path = arguments[1] if event in ("os.rename", "os.link") else arguments[0]
        file = Path(os.path.abspath(os.fsdecode(path))) if isinstance(path, (str, bytes, Path)) else None  # noqa: PTH100
        if file is None or not str(file).startswith(self._run) or file.name == ".lock":
            return
        name = re.sub(r"\d+", "#", file.name)
        whole = Path(os.fsdecode(arguments[0])) if event == "os.rename" else file
        self.note(f"{CHANGES[event]} {name}", whole)


def _tear(what: str, file: Path) -> None:
    """Leave behind what a process leaves that dies in the middle of writing."""
    if what == "open metrics.jsonl":
        with file.open("ab") as log:
            log.write(b'{"step": 7, "train_lo')
    elif what.startswith("rename to") and what.endswith(".ckpt") and file.stat().st_nlink == 1:
        os.truncate(file, file.stat().st_size * 2 // 3)


def run_once(folder: Path, number: int, kill: int | float | None) -> int:
    """Run the command in a process of its own; return its exit code, negative for the signal that ended it."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            log = os.open(folder.with_name(f"{folder.name}-log-{number}.txt"), os.O_WRONLY | os.O_CREAT)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.chdir(folder)
            Witness(folder, number, kill if isinstance(kill, int) else None)
            sys.argv = ["tiny-lm", *COMMAND, "--resume", "auto"]
            tiny_lm.cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    if isinstance(kill, float):
        time.sleep(kill)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    """Run the jobs, two at a time; write the exit codes of their processes beside their folders."""
    torch.set_num_threads(1)  # a pool of threads would not survive the fork
    Figure().savefig(os.devnull, format="png")  # loads what drawing needs
    peak_flops("cpu", "32-true")  # measured once for all
    jobs = json.loads(Path(sys.argv[1]).read_text())
    workers = []
    for share in (jobs[::2], jobs[1::2]):
        worker = os.fork()
        if worker == 0:
            for job in share:
                folder = Path(job["folder"])
                codes: list[int] = []
                while all(code == -signal.SIGKILL for code in codes):
                    codes.append(run_once(folder, len(codes), job["kills"][len(codes)]))
                folder.with_name(f"{folder.name}-codes.json").write_text(json.dumps(codes))
            os._exit(0)
        workers.append(worker)
    for worker in workers:
        os.waitpid(worker, 0)


if __name__ == "__main__":
    main()
