"""Runs commands of `tiny-lm` in forked processes, which saves each the seconds of its imports; not a test itself.

Reads one JSON object a line from standard input and answers each with one on standard output, a list of what became of
its processes. A job has ``commands``, each a list of words, which run at once in ``folder``, and may have

* ``signal``: the name of one that each process sends to itself before it gives a file its name;
* ``temporary``: the system's folder for temporary files;
* ``read_only``: a folder on a read-only disk, for these processes alone;
* ``read_all_write_own``: whether root may read everything, but write only what it owns.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_NEW_MOUNTS = 0x20000  # CLONE_NEWNS
_CAPABILITIES_VERSION = 0x20080522
_READ_ALL = 1 << 2  # CAP_DAC_READ_SEARCH


@dataclass
class Ended:
    """What became of a command."""

    code: int
    """Negative for the signal that ended it."""
    stdout: str
    stderr: str

    @property
    def error(self) -> str:
        """Its last line on standard error; it must have printed no traceback."""
        assert "Traceback" not in self.stderr, self.stderr
        return self.stderr.rstrip().rpartition("\n")[2]


class Commands:
    """Runs commands in a process that has loaded the libraries."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def run(self, *commands: list[str], folder: Path, **options: Any) -> list[Ended]:
        """Run commands at once; the options are those of a job."""
        assert self._process.stdin and self._process.stdout
        job = {"commands": [list(map(str, words)) for words in commands], "folder": str(folder), **options}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return [Ended(**ended) for ended in json.loads(self._process.stdout.readline())]


@contextmanager
def forked_commands() -> Iterator[Commands]:
    """Start the process, and end it with the block."""
    with subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield Commands(process)


def _end_before_rename(number: int) -> None:
    def on_audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "os.rename" and os.fsdecode(arguments[0]).endswith(".tmp"):
            os.kill(os.getpid(), number)

    sys.addaudithook(on_audit)


def _make_read_only(folder: str) -> None:
    assert ctypes.CDLL(None).unshare(_NEW_MOUNTS) == 0
    for words in (["--make-rprivate", "/"], ["--bind", folder, folder], ["-o", "remount,ro,bind", folder]):
        subprocess.run(["mount", *words], check=True)


def _give_up_writing() -> None:
    header = (ctypes.c_uint32 * 2)(_CAPABILITIES_VERSION, 0)
    sets = (ctypes.c_uint32 * 6)(_READ_ALL, _READ_ALL, 0, 0, 0, 0)  # effective, permitted, inheritable; low words first
    assert ctypes.CDLL(None).capset(header, sets) == 0


def _start(words: list[str], job: dict[str, Any], log: Path) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(log.with_suffix(f".{name}"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        if job.get("temporary"):
            tempfile.tempdir = job["temporary"]
        if job.get("read_only"):
            _make_read_only(job["read_only"])
        if job.get("read_all_write_own"):
            _give_up_writing()
        os.chdir(job["folder"])  # not before: the disk is another one by now
        if job.get("signal"):
            _end_before_rename(getattr(signal, job["signal"]))
        sys.argv = ["tiny-lm", *words]
        from tiny_lm.cli import main

        main()
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _serve() -> None:
    import gguf  # noqa: F401
    import torch
    from matplotlib.figure import Figure

    import tiny_lm.cli.export
    import tiny_lm.evaluation.evaluate
    import tiny_lm.evaluation.plots
    import tiny_lm.evaluation.report
    import tiny_lm.export.huggingface
    import tiny_lm.export.importing
    import tiny_lm.export.transformers_engine
    import tiny_lm.inference
    import tiny_lm.tokenizer.train
    import tiny_lm.training.fit  # noqa: F401
    from tiny_lm.hardware.flops import peak_flops

    torch.set_num_threads(1)  # a pool of threads would not survive the fork
    Figure().savefig(os.devnull, format="png")  # loads what drawing needs
    peak_flops("cpu", "32-true")  # measured once for all
    assert threading.active_count() == 1
    with tempfile.TemporaryDirectory() as logs:
        for line in sys.stdin:
            job = json.loads(line)
            started = [_start(words, job, Path(logs) / str(number)) for number, words in enumerate(job["commands"])]
            ended = []
            for number, child in enumerate(started):
                code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
                streams = {
                    name: (Path(logs) / f"{number}.{name}").read_text(errors="replace") for name in ("stdout", "stderr")
                }
                ended.append({"code": code, **streams})
            print(json.dumps(ended), flush=True)


if __name__ == "__main__":
    _serve()
