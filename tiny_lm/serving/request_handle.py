"""A request in the model loop, as the one sees it who asked."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from tiny_lm.inference import Completion
from tiny_lm.inference.decoding import Drawn
from tiny_lm.inference.request import FinishReason, GrowingText
from tiny_lm.inference.scoring import PromptScore, ReadToken

Waiter = asyncio.Future[None] | threading.Event


class RequestCancelledError(Exception):
    """The text was given up before its end."""


class SchedulerFailedError(Exception):
    """The model loop ended by an error, which is the cause of this one."""


@dataclass(frozen=True)
class StreamChunk:
    """What has been added to a text since the last piece.

    Attributes:
        text: whole characters; may be empty.
        drawn: the tokens, if log-probabilities were asked for.
        finish_reason: in the last piece, how the text ended; else None.
        end: in the last piece, the token that ended the text, if one did and log-probabilities were asked for.
        prompt: in the first piece, the tokens of the prompt, if their log-probabilities were asked for.
    """

    text: str
    drawn: tuple[Drawn, ...]
    finish_reason: FinishReason | None
    end: Drawn | None = None
    prompt: tuple[ReadToken, ...] = ()


class RequestHandle:
    """A text that the loop tells. It is read once: piece by piece, in a thread or in asyncio, or as a whole.

    Who reads slowly finds more in a piece. Where reading is broken off, the text is given up.

    Attributes:
        text: what the loop works on.
        score: the log-probabilities of the prompt, which the loop computes first, if they were asked for.
        prompt_tokens: tokens of the prompt.
    """

    def __init__(
        self, text: GrowingText, leave: Callable[["RequestHandle"], None], score: PromptScore | None = None
    ) -> None:
        """Wait for ``text``; ``leave`` is called when it is given up."""
        self.text, self.score = text, score
        self.prompt_tokens = len(text.wanted.prompt)
        self._leave = leave
        self._lock = threading.Lock()  # holds what follows
        self._shown = self._taken = 0  # steps of the text that may be read, and that were
        self._ended = self._cancelled = self._read = self._begun = False
        self._error: BaseException | None = None
        self._waiters: list[Waiter] = []

    @property
    def completion_tokens(self) -> int:
        """Tokens drawn so far, the one that ended the text included."""
        return self.text.tokens

    def cancel(self) -> None:
        """Give the text up; its slot is free within a step. Nothing happens to one that has ended."""
        with self._lock:
            if self._ended or self._cancelled:
                return
            self._cancelled = True
            waiters = self._woken()
        self._leave(self)
        wake(waiters)

    def __iter__(self) -> Iterator[StreamChunk]:
        """Yield piece after piece as they come; nothing more when the text is given up.

        Raises:
            SchedulerFailedError: the loop ended by an error.
        """
        try:
            while not self._read:
                arrived = threading.Event()
                if self._await(arrived):
                    arrived.wait()
                if piece := self._take():
                    yield piece
        finally:
            self.cancel()

    async def __aiter__(self) -> AsyncIterator[StreamChunk]:
        """Do in asyncio what iterating does in a thread."""
        try:
            while not self._read:
                arrived: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                if self._await(arrived):
                    await arrived
                if piece := self._take():
                    yield piece
        finally:
            self.cancel()

    def result(self) -> Completion:
        """Wait for the whole text, in a thread.

        Raises:
            RequestCancelledError: it was given up.
            SchedulerFailedError: the loop ended by an error.
        """
        for _ in self:
            pass
        if self._cancelled:
            raise RequestCancelledError("the text was given up before its end")
        return self.text.completion()

    def _await(self, waiter: Waiter) -> bool:
        """Let ``waiter`` be woken when there is something to take; return whether there is nothing yet."""
        with self._lock:
            nothing = not (self._shown > self._taken or self._ended or self._cancelled)
            if nothing:
                self._waiters.append(waiter)
            return nothing

    def _take(self) -> StreamChunk | None:
        """Return what is new to the reader; None once the text is given up."""
        with self._lock:
            self._read = self._ended or self._cancelled
            if self._error is not None:
                raise SchedulerFailedError("the model loop ended by an error") from self._error
            if self._cancelled:
                return None
            new = slice(self._taken, self._shown)
            self._taken = self._shown
            reason, end = (self.text.finish_reason, self.text.end) if self._ended else (None, None)
            prompt = tuple(self.score.tokens) if self.score and not self._begun else ()
            self._begun = True
        return StreamChunk("".join(self.text.pieces[new]), tuple(self.text.drawn[new]), reason, end, prompt)

    def _woken(self) -> list[Waiter]:
        waiters, self._waiters = self._waiters, []
        return waiters

    # --- called by the loop; who is to be woken is left to it, so that many are woken at once ------------------------

    def show(self, *, end: bool = False) -> list[Waiter]:
        """Let the text so far be read, to its ``end`` if this is it; return who waits for it."""
        with self._lock:
            self._shown = self.text.tokens
            self._ended = self._ended or (end and not self._cancelled)
            return self._woken()

    def fail(self, error: BaseException) -> list[Waiter]:
        """Tell who reads that the loop has ended; return who waits for it."""
        with self._lock:
            self._error, self._ended = error, True
            return self._woken()


def wake(waiters: Iterable[Waiter]) -> None:
    """Wake those who wait, each event loop once; any thread may."""
    loops: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
    for waiter in waiters:
        if isinstance(waiter, threading.Event):
            waiter.set()
        else:
            loops.setdefault(waiter.get_loop(), []).append(waiter)
    for loop, futures in loops.items():
        with suppress(RuntimeError):  # that loop is closed: nobody waits
            loop.call_soon_threadsafe(_resolve, futures)


def _resolve(futures: list[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)
