"""Streamed responses, and clients that disconnect."""

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
"""Seconds after its timeout when a request is dropped because its client does not even read the error."""


class TextStream(StreamingResponse):
    """Streams a generation, which is cancelled when the response ends, for whatever reason."""

    def __init__(self, lines: AsyncIterator[str], generation: Generation, media_type: str) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(lines, media_type=media_type, headers=headers)
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the generation has ended, the client disconnects, or the request times out."""
        try:
            with suppress(asyncio.TimeoutError):
                seconds = self._generation.seconds + _SLOW_READER_SECONDS
                await asyncio.wait_for(super().__call__(scope, receive, send), seconds)
        finally:
            self._generation.cancel()


async def while_connected(request: HttpRequest, generation: Generation, work: Coroutine[Any, Any, _T]) -> _T:
    """Wait for ``work`` on ``generation`` as long as the client is connected.

    Raises:
        ClientDisconnectedError: it disconnected.
    """
    try:
        return await _wait(request, work, None)
    finally:
        generation.cancel()


async def prepare(request: HttpRequest, limits: Limits, work: Coroutine[Any, Any, _T]) -> _T:
    """Wait for ``work`` that precedes generation, as long as the client is connected and the request has time left.

    Raises:
        ClientDisconnectedError: the client disconnected.
        RequestTimeoutError: the request timed out.
    """
    return await _wait(request, work, seconds_left(request, limits))


def seconds_left(request: HttpRequest, limits: Limits) -> float:
    """Return the time that a request has left, counted from the arrival of its headers."""
    arrived: float = request.state.arrived
    return max(arrived + limits.seconds - time.monotonic(), 0.0)


async def _wait(request: HttpRequest, work: Coroutine[Any, Any, _T], seconds: float | None) -> _T:
    result, disconnected = asyncio.ensure_future(work), asyncio.ensure_future(_until_disconnected(request))
    try:
        await asyncio.wait((result, disconnected), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if result.done():
            return result.result()
        raise ClientDisconnectedError if disconnected.done() else RequestTimeoutError
    finally:
        result.cancel()
        disconnected.cancel()


async def _until_disconnected(request: HttpRequest) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
