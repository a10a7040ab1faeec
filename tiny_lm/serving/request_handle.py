"""Client-side handle of a sequence queued in the scheduler."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from tiny_lm.inference.request import Completion, FinishReason, TokenLogprobs
from tiny_lm.inference.scoring import PromptScorer
from tiny_lm.inference.sequence import SequenceState

Waiter = asyncio.Future[None] | threading.Event


class RequestCancelledError(Exception):
    """The request was cancelled before its end."""


class SchedulerFailedError(Exception):
    """The scheduler ended with an error, which is the cause of this one."""


@dataclass(frozen=True)
class StreamChunk:
    """What was generated since the last chunk; a whole response is one merged chunk.

    Attributes:
        text: whole characters; may be empty.
        logprobs: of the tokens, if requested.
        finish_reason: in the last chunk, why generation ended; else None.
        stop_logprobs: in the last chunk, those of the token that ended the text, if one did and they were requested.
        prompt_logprobs: in the first chunk, those of the prompt's tokens, if requested.
    """

    text: str = ""
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop_logprobs: TokenLogprobs | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()

    def __add__(self, other: "StreamChunk") -> "StreamChunk":
        return StreamChunk(
            self.text + other.text,
            self.logprobs + other.logprobs,
            other.finish_reason or self.finish_reason,
            other.stop_logprobs or self.stop_logprobs,
            self.prompt_logprobs + other.prompt_logprobs,
        )


class RequestHandle:
    """A future that streams one sequence. It is read once: chunk by chunk, in a thread or in asyncio, or as a whole.

    A slow reader gets larger chunks. Abandoning the iteration cancels the request.

    Attributes:
        sequence: what the scheduler decodes.
        prompt_scorer: computes the prompt's log-probabilities before decoding, if they were requested.
        prompt_tokens: number of tokens of the prompt.
    """

    def __init__(
        self,
        sequence: SequenceState,
        on_cancel: Callable[["RequestHandle"], None],
        prompt_scorer: PromptScorer | None = None,
    ) -> None:
        """Wait for ``sequence``; ``on_cancel`` is called when the request is cancelled."""
        self.sequence, self.prompt_scorer = sequence, prompt_scorer
        self.prompt_tokens = len(sequence.prompt_ids)
        self._on_cancel = on_cancel
        self._lock = threading.Lock()  # protects the following
        self._num_published = self._num_read = 0  # sampled tokens that may be read, and that were
        self._ended = self._cancelled = self._done_reading = self._started_reading = False
        self._error: BaseException | None = None
        self._waiters: list[Waiter] = []

    @property
    def completion_tokens(self) -> int:
        """Number of tokens sampled so far, the one that ended the text included."""
        return self.sequence.num_generated

    def cancel(self) -> None:
        """Cancel the request; its slot is free within a step. Does nothing if it has ended."""
        with self._lock:
            if self._ended or self._cancelled:
                return
            self._cancelled = True
            waiters = self._pop_waiters()
        self._on_cancel(self)
        notify(waiters)

    def __iter__(self) -> Iterator[StreamChunk]:
        """Yield chunks as they arrive; stop early if the request is cancelled.

        Raises:
            SchedulerFailedError: the scheduler ended with an error.
        """
        try:
            while not self._done_reading:
                arrived = threading.Event()
                if self._add_waiter(arrived):
                    arrived.wait()
                if chunk := self._next_chunk():
                    yield chunk
        finally:
            self.cancel()

    async def __aiter__(self) -> AsyncIterator[StreamChunk]:
        """Yield chunks as they arrive, as :meth:`__iter__` does."""
        try:
            while not self._done_reading:
                arrived: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                if self._add_waiter(arrived):
                    await arrived
                if chunk := self._next_chunk():
                    yield chunk
        finally:
            self.cancel()

    def result(self) -> Completion:
        """Block until generation has ended and return the completion.

        Raises:
            RequestCancelledError: the request was cancelled.
            SchedulerFailedError: the scheduler ended with an error.
        """
        for _ in self:
            pass
        if self._cancelled:
            raise RequestCancelledError("the request was cancelled before its end")
        return self.sequence.completion()

    def _add_waiter(self, waiter: Waiter) -> bool:
        """Notify ``waiter`` of the next chunk; return False if there is one already."""
        with self._lock:
            empty = not (self._num_published > self._num_read or self._ended or self._cancelled)
            if empty:
                self._waiters.append(waiter)
            return empty

    def _next_chunk(self) -> StreamChunk | None:
        """Return what is new to the reader; None if the request was cancelled."""
        with self._lock:
            self._done_reading = self._ended or self._cancelled
            if self._error is not None:
                raise SchedulerFailedError("the scheduler ended with an error") from self._error
            if self._cancelled:
                return None
            new = slice(self._num_read, self._num_published)
            self._num_read = self._num_published
            sequence = self.sequence
            reason, stop_logprobs = (sequence.finish_reason, sequence.stop_logprobs) if self._ended else (None, None)
            scored = tuple(self.prompt_scorer.tokens) if self.prompt_scorer and not self._started_reading else ()
            self._started_reading = True
        return StreamChunk("".join(sequence.chunks[new]), tuple(sequence.logprobs[new]), reason, stop_logprobs, scored)

    def _pop_waiters(self) -> list[Waiter]:
        waiters, self._waiters = self._waiters, []
        return waiters

    # --- called by the scheduler, which notifies the returned waiters of many requests at once ------------------------

    def publish(self, *, end: bool = False) -> list[Waiter]:
        """Let readers see the sequence so far; ``end`` if it has ended. Return the waiters to notify."""
        with self._lock:
            self._num_published = self.sequence.num_generated
            self._ended = self._ended or (end and not self._cancelled)
            return self._pop_waiters()

    def fail(self, error: BaseException) -> list[Waiter]:
        """Let readers raise :class:`SchedulerFailedError`; return the waiters to notify."""
        with self._lock:
            self._error, self._ended = error, True
            return self._pop_waiters()


def notify(waiters: Iterable[Waiter]) -> None:
    """Wake waiters from any thread, with one call for each event loop."""
    loops: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
    for waiter in waiters:
        if isinstance(waiter, threading.Event):
            waiter.set()
        else:
            loops.setdefault(waiter.get_loop(), []).append(waiter)
    for loop, futures in loops.items():
        with suppress(RuntimeError):  # the event loop is closed: nobody waits
            loop.call_soon_threadsafe(_resolve, futures)


def _resolve(futures: list[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)
