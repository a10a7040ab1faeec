"""Answers that are sent while they are made, and clients that go away."""

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from starlette.requests import Request as HttpRequest
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from tiny_lm.serving.generation import ClientDisconnectedError, Generation, RequestTimeoutError
from tiny_lm.serving.limits import Limits

_T = TypeVar("_T")

_SLOW_READER_SECONDS = 5
"""So long after its time a request is dropped whose client does not even read that its time is up."""


class TextStream(StreamingResponse):
    """Sends what is made of a generation, which ends with the response, whatever ends that."""

    def __init__(self, lines: AsyncIterator[str], generation: Generation, media_type: str) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(lines, media_type=media_type, headers=headers)
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until all is said, the client is gone, or its time is up."""
        try:
            with suppress(asyncio.TimeoutError):
                seconds = self._generation.seconds + _SLOW_READER_SECONDS
                await asyncio.wait_for(super().__call__(scope, receive, send), seconds)
        finally:
            self._generation.cancel()


async def while_connected(request: HttpRequest, generation: Generation, work: Coroutine[Any, Any, _T]) -> _T:
    """Wait for ``work`` on ``generation``, but no longer than the client of ``request`` does.

    Raises:
        ClientDisconnectedError: it went away.
    """
    try:
        return await _wait(request, work, None)
    finally:
        generation.cancel()


async def prepare(request: HttpRequest, limits: Limits, work: Coroutine[Any, Any, _T]) -> _T:
    """Wait for ``work`` that comes before the generation, as long as the client does and the time of a request lasts.

    Raises:
        ClientDisconnectedError: the client went away.
        RequestTimeoutError: the time of the request has passed.
    """
    return await _wait(request, work, seconds_left(request, limits))


def seconds_left(request: HttpRequest, limits: Limits) -> float:
    """Return the time that a request has left, counted from the arrival of its headers."""
    arrived: float = request.state.arrived
    return max(arrived + limits.seconds - time.monotonic(), 0.0)


async def _wait(request: HttpRequest, work: Coroutine[Any, Any, _T], seconds: float | None) -> _T:
    answer, gone = asyncio.ensure_future(work), asyncio.ensure_future(_until_gone(request))
    try:
        await asyncio.wait((answer, gone), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            return answer.result()
        raise ClientDisconnectedError if gone.done() else RequestTimeoutError
    finally:
        answer.cancel()
        gone.cancel()


async def _until_gone(request: HttpRequest) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
