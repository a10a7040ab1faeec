"""Rendering chat templates in a child process with time and memory limits."""

import asyncio
import json
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tiny_lm.errors import UserError
from tiny_lm.serving.template_worker import RENDER_SECONDS

_COMMAND = "from tiny_lm.serving.template_worker import main; main()"
_PACKAGE_PARENT = Path(__file__).parents[2]

_START_SECONDS = 60.0
"""Timeout for starting Python and Jinja, on a busy machine."""


class TemplateFailedError(Exception):
    """A chat template exceeded its time or memory limit, so its process was killed."""


class TemplateProcess:
    """Renders one template in a child process, which is restarted after it had to be killed."""

    def __init__(self, source: str) -> None:
        """Start the process and compile ``source``.

        Raises:
            UserError: it does not compile.
            TemplateFailedError: compiling exceeds the time or memory limit.
        """
        self._source = source
        self._lock = threading.Lock()  # held while a request is handled
        self._children: list[subprocess.Popen[str]] = []  # one or none
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="chat-template")
        self._close = weakref.finalize(self, _end, self._children, self._executor)
        with self._lock:
            self._start()

    def close(self) -> None:
        """Kill the process."""
        self._close()

    def render(self, **values: Any) -> str:
        """Render the template, in the calling thread.

        Raises:
            UserError: the template refuses ``values``.
            TemplateFailedError: it exceeds its time or memory limit.
        """
        return self._render(values, threading.Event())

    async def render_async(self, **values: Any) -> str:
        """Render in a thread of this template; kill the process if the caller is cancelled.

        Raises:
            UserError, TemplateFailedError: as :meth:`render`.
        """
        cancelled = threading.Event()
        job = self._executor.submit(self._render, values, cancelled)
        try:
            return await asyncio.wrap_future(job)
        except asyncio.CancelledError:
            cancelled.set()
            if job.running():
                _kill(self._children)
            raise

    def _render(self, values: dict[str, Any], cancelled: threading.Event) -> str:
        with self._lock:
            if cancelled.is_set():
                raise TemplateFailedError("the request was cancelled")
            if not self._children or self._children[0].poll() is not None:
                self._start()
            return self._exchange(values, RENDER_SECONDS)

    def _start(self) -> None:
        _reap(self._children)
        child = subprocess.Popen(
            [sys.executable, "-c", _COMMAND],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="ascii",
            cwd=_PACKAGE_PARENT,
            start_new_session=True,  # signals of the terminal are for the server
        )
        self._children.append(child)
        self._exchange({"source": self._source}, _START_SECONDS)

    def _exchange(self, request: dict[str, Any], seconds: float) -> str:
        """Send one request, and kill the process if the response does not come in time."""
        [child] = self._children
        assert child.stdin is not None and child.stdout is not None
        timed_out = threading.Event()

        def kill() -> None:
            timed_out.set()
            child.kill()

        # The child's own timer fires first, on systems that have one.
        timer = threading.Timer(seconds + 1, kill)
        timer.daemon = True
        timer.start()
        line = ""
        try:
            child.stdin.write(json.dumps(request) + "\n")
            child.stdin.flush()
            line = child.stdout.readline()
        except (OSError, ValueError):  # it died, or was closed by another thread
            pass
        finally:
            timer.cancel()
        if line.endswith("\n"):
            response: dict[str, str] = json.loads(line)
            if "error" in response:
                raise UserError(response["error"])
            return response["text"]
        child.kill()
        exit_code = child.wait()
        took_too_long = timed_out.is_set() or exit_code == -_SIGALRM
        limit = f"took longer than {RENDER_SECONDS:g} seconds" if took_too_long else "crashed or ran out of memory"
        raise TemplateFailedError(f"the chat template of this model {limit}, so it was stopped")


_SIGALRM = 14


def _kill(children: list["subprocess.Popen[str]"]) -> None:
    for child in children:
        child.kill()


def _reap(children: list["subprocess.Popen[str]"]) -> None:
    """Kill processes and close their pipes."""
    _kill(children)
    for child in children:
        child.communicate()
    children.clear()


def _end(children: list["subprocess.Popen[str]"], executor: ThreadPoolExecutor) -> None:
    executor.shutdown(wait=False, cancel_futures=True)
    _reap(children)
