"""Many requests in one model loop: they join and leave between its steps (continuous batching, Orca: Yu et al. 2022).

The loop is a thread that owns the batch and its cache. It never waits for those who read what it makes, and wakes them
at most every few hundredths of a second, so that they do not take its time.

A thread that has computed keeps a pool of OpenMP threads as long as it lives, and where all pools together have more
threads than the machine has cores, the threads of GNU's OpenMP sleep between two products instead of spinning: half as
many tokens a second. So a loop without work gives its thread up, and :func:`run_in_thread` computes for others.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from tiny_lm.inference import GenerationConfig, TextGenerator
from tiny_lm.inference.batch import TextBatch
from tiny_lm.inference.request import GrowingText
from tiny_lm.inference.scoring import PromptScore
from tiny_lm.serving.request_handle import (
    RequestCancelledError,
    RequestHandle,
    SchedulerFailedError,
    StreamChunk,
    Waiter,
    wake,
)

__all__ = [
    "QueueFull",
    "RequestCancelledError",
    "RequestHandle",
    "Scheduler",
    "SchedulerFailedError",
    "SchedulerStats",
    "SchedulerStoppedError",
    "StreamChunk",
    "run_in_thread",
]

_T = TypeVar("_T")

_LOG = logging.getLogger(__name__)

_PROMPT_TOKENS = 256
"""So many tokens of prompts are read in a step: running texts go on while a long prompt is read."""

_REFRESH_SECONDS = 0.05
"""Readers are woken so often: text flows at that rate, and 32 readers take little of the processor's time."""

_IDLE_SECONDS = 2.0
"""After so long without work the thread of a loop ends, until there is work again."""


class QueueFull(Exception):  # noqa: N818  # the name of the condition, as in the standard library's queue.Full
    """There are as many requests waiting as may."""


class SchedulerStoppedError(Exception):
    """The loop takes no more requests."""


@dataclass(frozen=True)
class SchedulerStats:
    """What a loop does, and what it has done.

    Attributes:
        running: texts that are being told.
        waiting: texts that wait for a slot.
        tokens: tokens told so far, of all requests.
        prompt_tokens: tokens of the prompts of all requests that were begun.
        steps: steps of the model.
        finished: texts that were told to their end.
        cancelled: texts that were given up.
    """

    running: int = 0
    waiting: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    steps: int = 0
    finished: int = 0
    cancelled: int = 0


def run_in_thread(function: Callable[..., _T], /, *arguments: Any, **options: Any) -> _T:
    """Call a function that computes, such as one that loads a model, in a thread that ends with it (see above)."""
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(function, *arguments, **options).result()


class Scheduler:
    """Continues the texts of all requests, in a thread of its own that owns model and cache."""

    def __init__(
        self,
        generator: TextGenerator,
        *,
        slots: int = 32,
        queue: int = 256,
        refresh: float = _REFRESH_SECONDS,
        prompt_tokens: int = _PROMPT_TOKENS,
    ) -> None:
        """Prepare; nothing is told before :meth:`start`.

        Args:
            generator: whose model and tokenizer are used; others may use them meanwhile.
            slots: most texts at once; the others wait.
            queue: most texts that wait.
            refresh: seconds between two pieces for the reader of a text; first and last piece come at once.
            prompt_tokens: most tokens of prompts that are read in a step.
        """
        self._generator = generator
        self._slots, self._queue, self._refresh, self._prompt_tokens = slots, queue, refresh, prompt_tokens
        self._lock = threading.Condition()  # holds what threads share: the next few
        self._waiting: deque[RequestHandle] = deque()
        self._left: list[RequestHandle] = []  # cancelled, and not yet taken out
        self._deadline: float | None = None  # set when stopping
        self._error: BaseException | None = None
        self._started = False
        self._thread: threading.Thread | None = None
        # Only the loop's thread writes these.
        self._batch: TextBatch | None = None
        self._running: dict[GrowingText, RequestHandle] = {}
        self._scoring: deque[RequestHandle] = deque()  # those of them whose prompt is still to be scored
        self._tokens = self._read = self._steps = self._finished = self._cancelled = 0

    def start(self) -> None:
        """Begin to work."""
        with self._lock:
            self._started = True
            self._see_to_thread()

    @property
    def stats(self) -> SchedulerStats:
        """The figures of this moment."""
        return SchedulerStats(
            running=len(self._running),
            waiting=len(self._waiting),
            tokens=self._tokens,
            prompt_tokens=self._read,
            steps=self._steps,
            finished=self._finished,
            cancelled=self._cancelled,
        )

    @property
    def failed(self) -> bool:
        """Whether the loop ended by an error."""
        return self._error is not None

    def submit(
        self,
        prompt: str | Sequence[int],
        request: GenerationConfig,
        *,
        seed: int | None = None,
        score: PromptScore | None = None,
    ) -> RequestHandle:
        """Hand in a text to continue; any thread may.

        Args:
            prompt: text, or ids, which are taken as they are.
            request: how to go on.
            seed: the same seed gives the same text, whoever else is there; None for another one each time.
            score: of the prompt; it is computed before the text is begun, unless it is there.

        Raises:
            UserError: as :meth:`TextGenerator.new_sequence`.
            QueueFull: as many requests wait as may.
            SchedulerStoppedError: the loop stops, or has stopped.
            SchedulerFailedError: the loop ended by an error.
        """
        text = self._generator.new_sequence(prompt, request, seed=seed)
        ticket = RequestHandle(text, self._leave, score)
        if text.finish_reason is not None and score is None:
            ticket.show(end=True)
            return ticket
        with self._lock:
            if self._error is not None:
                raise SchedulerFailedError("the model loop ended by an error") from self._error
            if self._deadline is not None:
                raise SchedulerStoppedError("the model loop takes no more requests")
            if len(self._waiting) >= self._queue + self._slots - len(self._running):
                raise QueueFull(f"{self._queue} requests wait already")
            self._waiting.append(ticket)
            self._see_to_thread()
        return ticket

    def stop(self, *, grace: float) -> None:
        """Refuse new requests, let those that were taken end within ``grace`` seconds, cancel the rest, and return."""
        with self._lock:
            if self._deadline is None:
                self._deadline = time.monotonic() + grace
            self._lock.notify()
            thread = self._thread
            unheard = [] if thread else list(self._waiting)
        for ticket in unheard:  # it was never started
            ticket.cancel()
        if thread:
            thread.join()

    def _leave(self, ticket: RequestHandle) -> None:
        with self._lock:
            self._left.append(ticket)
            self._lock.notify()

    def _see_to_thread(self) -> None:
        """Wake the thread, or start one where there is work and none to do it."""
        self._lock.notify()
        if self._started and self._waiting and self._thread is None:
            self._thread = threading.Thread(target=self._work, name="model-loop", daemon=True)
            self._thread.start()

    # --- the loop's thread -----------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            if self._batch is None:
                self._batch = self._generator.new_batch(self._slots, prompt_tokens=self._prompt_tokens)
            shown = 0.0
            while self._admit(self._batch):
                self._score(self._batch)
                now = time.monotonic()
                everyone = now - shown >= self._refresh
                self._advance(self._batch, everyone=everyone)
                shown = now if everyone else shown
        except BaseException as error:
            _LOG.exception("the loop of a model ended by an error; the model answers no more")
            with self._lock:
                self._error = error
                tickets = [*self._running.values(), *self._waiting]
                self._running.clear()
                self._scoring.clear()
                self._waiting.clear()
            wake([waiter for ticket in tickets for waiter in ticket.fail(error)])

    def _admit(self, batch: TextBatch) -> bool:
        """Let texts leave and join; return whether there is a step to make, and wait a while for one."""
        idle = False
        with self._lock:
            while True:
                late = self._deadline is not None and time.monotonic() >= self._deadline
                for ticket in [*self._waiting, *self._running.values()] if late else []:
                    ticket.cancel()
                self._take_out(batch)
                while self._waiting and len(self._running) < self._slots:
                    ticket = self._waiting.popleft()
                    self._running[ticket.text] = ticket
                    self._read += ticket.prompt_tokens
                    if ticket.score is None:
                        batch.join(ticket.text)
                    else:
                        self._scoring.append(ticket)
                if self._running:
                    return True
                if self._deadline is not None or idle:
                    self._thread = None
                    return False
                idle = not self._lock.wait(_IDLE_SECONDS)

    def _take_out(self, batch: TextBatch) -> None:
        """Give the places of cancelled texts back."""
        for ticket in self._left:
            if self._running.pop(ticket.text, None):
                if ticket in self._scoring:
                    self._scoring.remove(ticket)
                else:
                    batch.leave(ticket.text)
            elif ticket in self._waiting:
                self._waiting.remove(ticket)
            else:
                continue
            self._cancelled += 1
        self._left.clear()

    def _score(self, batch: TextBatch) -> None:
        """Read a part of the prompt whose turn it is to be scored; behind its last part its text is begun."""
        if not self._scoring:
            return
        ticket = self._scoring[0]
        assert ticket.score is not None
        ticket.score.advance(self._prompt_tokens)
        if not ticket.score.done:
            return
        self._scoring.popleft()
        if ticket.text.finish_reason is None:
            batch.join(ticket.text)
        else:  # no token was asked for
            del self._running[ticket.text]
            self._finished += 1
            wake(ticket.show(end=True))

    def _advance(self, batch: TextBatch, *, everyone: bool) -> None:
        """Make a step; show the readers of all texts what is new, or only of those that begin or end."""
        told = batch.step()
        self._steps += 1
        self._tokens += len(told)
        waiters: list[Waiter] = []
        for text, _ in told:
            ticket = self._running[text]
            if text.finish_reason is not None:
                del self._running[text]
                self._finished += 1
                waiters += ticket.show(end=True)
            elif everyone or text.tokens == 1:
                waiters += ticket.show()
        wake(waiters)
