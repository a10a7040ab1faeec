"""Continuous batching (Orca: Yu et al. 2022): sequences of many requests share the steps of one model.

The scheduler's thread owns the batch and its cache. It never waits for readers, and notifies them at most every few
hundredths of a second, so that they do not slow it down.

A thread that has run torch code keeps a pool of OpenMP threads as long as it lives. If all pools together have more
threads than the machine has cores, the threads of GNU's OpenMP sleep between two products instead of spinning, which
halves the throughput. So an idle scheduler ends its thread, and :func:`run_in_thread` computes for other threads.
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
from tiny_lm.inference.batch import BatchDecoder
from tiny_lm.inference.scoring import PromptScorer
from tiny_lm.inference.sequence import SequenceState
from tiny_lm.serving.request_handle import RequestHandle, SchedulerFailedError, Waiter, notify

_T = TypeVar("_T")

_LOG = logging.getLogger(__name__)

_MAX_PREFILL_TOKENS = 256
"""Maximum prompt tokens per step: running sequences are not stalled while a long prompt is prefilled."""

_PUBLISH_SECONDS = 0.05
"""Interval at which readers are notified: text flows at that rate, and 32 readers take little processor time."""

_IDLE_SECONDS = 2.0
"""The thread ends after this time without work, and is started again for the next request."""


class QueueFull(Exception):  # noqa: N818  # as the standard library's queue.Full
    """The maximum number of requests is waiting already."""


class SchedulerStoppedError(Exception):
    """The scheduler accepts no more requests."""


@dataclass(frozen=True)
class SchedulerStats:
    """Gauges and counters of a scheduler.

    Attributes:
        running: sequences that have a slot.
        waiting: sequences that wait for one.
        tokens: tokens generated so far.
        prompt_tokens: tokens of all prompts that got a slot.
        steps: steps of the model.
        finished: sequences that were generated to their end.
        cancelled: sequences that were cancelled.
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
    """Moves waiting sequences into free slots and decodes them, in a thread that owns model and cache."""

    def __init__(
        self,
        generator: TextGenerator,
        *,
        slots: int = 32,
        queue: int = 256,
        publish_seconds: float = _PUBLISH_SECONDS,
        max_prefill_tokens: int = _MAX_PREFILL_TOKENS,
    ) -> None:
        """Store the arguments; requests wait until :meth:`start`.

        Args:
            generator: other threads may use its model and tokenizer, too.
            slots: maximum number of running sequences.
            queue: maximum number of waiting ones.
            publish_seconds: interval between two chunks of a stream; the first and the last one are sent at once.
            max_prefill_tokens: maximum number of prompt tokens processed in a step.
        """
        self._generator = generator
        self._slots, self._queue = slots, queue
        self._publish_seconds, self._max_prefill_tokens = publish_seconds, max_prefill_tokens
        self._lock = threading.Condition()  # protects what threads share, which is the following:
        self._waiting: deque[RequestHandle] = deque()
        self._to_remove: list[RequestHandle] = []  # cancelled, and still in the queue or the batch
        self._deadline: float | None = None  # set when stopping
        self._error: BaseException | None = None
        self._started = False
        self._thread: threading.Thread | None = None
        # Written by the scheduler's thread only:
        self._batch: BatchDecoder | None = None
        self._running: dict[SequenceState, RequestHandle] = {}
        self._scoring: deque[RequestHandle] = deque()  # the running ones whose prompt has yet to be scored
        self._tokens = self._prompt_tokens = self._steps = self._num_finished = self._num_cancelled = 0

    def start(self) -> None:
        """Start processing requests."""
        with self._lock:
            self._started = True
            self._ensure_thread()

    @property
    def stats(self) -> SchedulerStats:
        """The current gauges and counters."""
        return SchedulerStats(
            running=len(self._running),
            waiting=len(self._waiting),
            tokens=self._tokens,
            prompt_tokens=self._prompt_tokens,
            steps=self._steps,
            finished=self._num_finished,
            cancelled=self._num_cancelled,
        )

    @property
    def failed(self) -> bool:
        """Whether the thread ended with an error."""
        return self._error is not None

    def submit(
        self,
        prompt: str | Sequence[int],
        config: GenerationConfig,
        *,
        seed: int | None = None,
        prompt_scorer: PromptScorer | None = None,
    ) -> RequestHandle:
        """Queue a prompt, from any thread.

        Args:
            prompt: text, or ids, which are used as they are.
            config: how to generate.
            seed: the same seed gives the same text, whatever else is running; None for a different one each time.
            prompt_scorer: of the prompt; it is run before the prompt is prefilled, unless it is done.

        Raises:
            UserError: as :meth:`TextGenerator.new_sequence`.
            QueueFull: the maximum number of requests is waiting.
            SchedulerStoppedError: the scheduler stops or has stopped.
            SchedulerFailedError: the scheduler ended with an error.
        """
        sequence = self._generator.new_sequence(prompt, config, seed=seed)
        handle = RequestHandle(sequence, self._on_cancel, prompt_scorer)
        if sequence.finish_reason is not None and prompt_scorer is None:
            handle.publish(end=True)
            return handle
        with self._lock:
            if self._error is not None:
                raise SchedulerFailedError("the scheduler ended with an error") from self._error
            if self._deadline is not None:
                raise SchedulerStoppedError("the scheduler accepts no more requests")
            if len(self._waiting) >= self._queue + self._slots - len(self._running):
                raise QueueFull(f"{self._queue} requests are waiting already")
            self._waiting.append(handle)
            self._ensure_thread()
        return handle

    def stop(self, *, grace: float) -> None:
        """Refuse new requests, cancel those that have not ended within ``grace`` seconds, and wait for the thread."""
        with self._lock:
            if self._deadline is None:
                self._deadline = time.monotonic() + grace
            self._lock.notify()
            thread = self._thread
            never_started = [] if thread else list(self._waiting)
        for handle in never_started:
            handle.cancel()
        if thread:
            thread.join()

    def _on_cancel(self, handle: RequestHandle) -> None:
        with self._lock:
            self._to_remove.append(handle)
            self._lock.notify()

    def _ensure_thread(self) -> None:
        """Wake the thread, or start one if there is work for it."""
        self._lock.notify()
        if self._started and self._waiting and self._thread is None:
            self._thread = threading.Thread(target=self._work, name="scheduler", daemon=True)
            self._thread.start()

    # --- the scheduler's thread --------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            if self._batch is None:
                self._batch = self._generator.new_batch(self._slots, max_prefill_tokens=self._max_prefill_tokens)
            last_published = 0.0
            while self._schedule(self._batch):
                self._score_prompt(self._batch)
                now = time.monotonic()
                publish_all = now - last_published >= self._publish_seconds
                self._step(self._batch, publish_all=publish_all)
                last_published = now if publish_all else last_published
        except BaseException as error:
            _LOG.exception("the scheduler of a model ended with an error; the model accepts no more requests")
            with self._lock:
                self._error = error
                handles = [*self._running.values(), *self._waiting]
                self._running.clear()
                self._scoring.clear()
                self._waiting.clear()
            notify([waiter for handle in handles for waiter in handle.fail(error)])

    def _schedule(self, batch: BatchDecoder) -> bool:
        """Remove cancelled sequences and fill free slots; wait for work, and return False if there is none."""
        idle = False
        with self._lock:
            while True:
                expired = self._deadline is not None and time.monotonic() >= self._deadline
                for handle in [*self._waiting, *self._running.values()] if expired else []:
                    handle.cancel()
                self._remove_cancelled(batch)
                while self._waiting and len(self._running) < self._slots:
                    handle = self._waiting.popleft()
                    self._running[handle.sequence] = handle
                    self._prompt_tokens += handle.prompt_tokens
                    if handle.prompt_scorer is None:
                        batch.add(handle.sequence)
                    else:
                        self._scoring.append(handle)
                if self._running:
                    return True
                if self._deadline is not None or idle:
                    self._thread = None
                    return False
                idle = not self._lock.wait(_IDLE_SECONDS)

    def _remove_cancelled(self, batch: BatchDecoder) -> None:
        for handle in self._to_remove:
            if self._running.pop(handle.sequence, None):
                if handle in self._scoring:
                    self._scoring.remove(handle)
                else:
                    batch.remove(handle.sequence)
            elif handle in self._waiting:
                self._waiting.remove(handle)
            else:
                continue
            self._num_cancelled += 1
        self._to_remove.clear()

    def _score_prompt(self, batch: BatchDecoder) -> None:
        """Score a part of the first prompt that needs it; add its sequence to the batch after the last part."""
        if not self._scoring:
            return
        handle = self._scoring[0]
        assert handle.prompt_scorer is not None
        handle.prompt_scorer.advance(self._max_prefill_tokens)
        if not handle.prompt_scorer.done:
            return
        self._scoring.popleft()
        if handle.sequence.finish_reason is None:
            batch.add(handle.sequence)
        else:  # max_new_tokens is 0
            waiters: list[Waiter] = []
            self._finish(handle, waiters)
            notify(waiters)

    def _step(self, batch: BatchDecoder, *, publish_all: bool) -> None:
        """Decode one token for each sequence; publish all sequences, or only those that start or end."""
        updated = batch.step()
        self._steps += 1
        self._tokens += len(updated)
        waiters: list[Waiter] = []
        for sequence in updated:
            handle = self._running[sequence]
            if sequence.finish_reason is not None:
                self._finish(handle, waiters)
            elif publish_all or sequence.num_generated == 1:
                waiters += handle.publish()
        notify(waiters)

    def _finish(self, handle: RequestHandle, waiters: list[Waiter]) -> None:
        del self._running[handle.sequence]
        self._num_finished += 1
        waiters += handle.publish(end=True)
