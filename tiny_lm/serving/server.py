"""Running the application: its socket, limits of headers, and graceful shutdown."""

import asyncio
import errno
import os
import socket
import sys
import time
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any, NoReturn

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from tiny_lm.errors import UserError
from tiny_lm.serving.middleware import ShutdownState

_FLUSH_SECONDS = 5
"""Time to send the last bytes of responses after generation has ended."""

_MAX_HEADER_BYTES = 2**16

_RESET_SECONDS = 0.1
"""Interval of checks whether a client that sends nothing more has disconnected."""

_SWITCH_SECONDS = 0.0005
"""Python's thread switch interval. With the default of 5 ms, a decode step of 3 ms waits longer for the GIL than it
computes."""


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens at an address; port 0 chooses a free one.

    Raises:
        UserError: the port is in use, or the address does not belong to this machine.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"port {port} of {host} is in use: stop what runs there, or choose a --port") from None
        if error.errno == errno.EACCES:
            raise UserError(f"port {port} of {host} needs more rights: choose a --port above 1023") from None
        raise UserError(f"--host {host}: cannot be listened at ({error.strerror or error})") from None


def url_of(listening: socket.socket) -> str:
    """Return the URL of a server."""
    host, port = listening.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "localhost"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _CycleWithoutChunks(RequestResponseCycle):
    """Response to an HTTP/1.0 client, which lacks chunked encoding: a stream ends with the connection."""

    _has_length = False

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self._has_length = any(name.lower() == b"content-length" for name, _ in message.get("headers", []))
            self.chunked_encoding = None if self._has_length else False
        elif not self._has_length:
            self.expected_content_length = len(message.get("body", b""))  # any length is right
        await super().send(message)


class _Protocol(HttpToolsProtocol):
    """HTTP protocol that caps size and arrival time of headers, which are buffered until they are complete."""

    _unparsed = 0  # bytes since the last complete headers or part of a body
    _header_timeout: asyncio.TimerHandle | None = None  # timeout of incomplete headers

    def __init__(self, *, header_seconds: float, **options: Any) -> None:
        """Add the maximum arrival time of headers to uvicorn's options."""
        super().__init__(**options)
        self._header_seconds = header_seconds

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        super().connection_made(transport)
        self._start_header_timeout()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_header_timeout()
        super().connection_lost(exc)

    def _start_header_timeout(self) -> None:
        if self._header_timeout is None:
            self._header_timeout = self.loop.call_later(self._header_seconds, self.transport.close)

    def _cancel_header_timeout(self) -> None:
        if self._header_timeout is not None:
            self._header_timeout.cancel()
            self._header_timeout = None

    def data_received(self, data: bytes) -> None:
        """Parse received bytes, and refuse headers that are too large."""
        self._unparsed += len(data)
        super().data_received(data)
        if self._unparsed > _MAX_HEADER_BYTES and not self.transport.is_closing():
            self.send_400_response("The headers are too large.")
        elif self.cycle is None or self.cycle.response_complete:
            self._start_header_timeout()

    def eof_received(self) -> bool:  # type: ignore[override]  # uvicorn's own always closes
        """Keep the connection of a client that has sent its whole request and waits for the response; close others."""
        cycle = self.cycle
        if cycle is None or cycle.response_complete or cycle.more_body:
            return False
        cycle.keep_alive = False
        if cycle.scope["http_version"] == "1.1" and not cycle.response_started and not self.pipeline:
            # If the client has closed its socket completely, its system responds with a reset to any bytes, such as
            # these, which HTTP allows.
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._close_when_reset()
        return True

    def _close_when_reset(self) -> None:
        """Check for a reset at intervals: after the end of the input, nothing else reveals that the client is gone."""
        if self.transport.is_closing():
            return
        if self.transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.transport.abort()
            return
        self.loop.call_later(_RESET_SECONDS, self._close_when_reset)

    def on_headers_complete(self) -> None:
        self._unparsed = 0
        self._cancel_header_timeout()
        super().on_headers_complete()
        if self.cycle is not None and self.cycle.scope["http_version"] == "1.0":
            self.cycle.__class__ = _CycleWithoutChunks  # its task has not started yet, so nothing was sent

    def on_body(self, body: bytes) -> None:
        """Receive a part of the body, whose size the application limits."""
        self._unparsed = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._unparsed = 0
        super().on_message_complete()


def stop_at_once(sig: int) -> NoReturn:
    """Exit immediately after a second signal, with the exit code that a shell shows for it.

    Unwinding would print a traceback for each interrupted response. The server writes no files.
    """
    os._exit(128 + sig)


class Server(uvicorn.Server):
    """A server that refuses new requests and finishes the active ones when it is stopped.

    It keeps listening meanwhile, so that clients and load balancers get an error instead of a refused connection. A
    second signal exits immediately.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        shutdown: ShutdownState,
        *,
        grace: float,
        cancel_all: Callable[[], None],
        log: Callable[[str], None],
    ) -> None:
        super().__init__(config)
        self._state, self._grace, self._cancel_all, self._log = shutdown, grace, cancel_all, log
        self._deadline = 0.0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Start the shutdown."""
        if self._state.stopping:
            stop_at_once(sig)
        self._state.stopping = True
        self._deadline = time.monotonic() + self._grace
        if self._state.active:
            self._log(f"stopping: active requests have {self._grace:g} s to finish; press Ctrl-C again to stop now")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Cancel what still runs, so that its clients get an error, and close."""
        await asyncio.to_thread(self._cancel_all)
        await super().shutdown(sockets)

    async def on_tick(self, counter: int) -> bool:
        """Exit when no request is active, or the grace period has passed."""
        if self._state.stopping and (not self._state.active or time.monotonic() >= self._deadline):
            self.should_exit = True
        return await super().on_tick(counter)


def run(
    app: FastAPI,
    listening: socket.socket,
    shutdown: ShutdownState,
    *,
    header_seconds: float,
    grace: float,
    cancel_all: Callable[[], None],
    log: Callable[[str], None],
) -> None:
    """Serve ``app``, which was built with ``shutdown``, on the socket ``listening`` until a signal arrives.

    Headers that do not arrive within ``header_seconds`` close the connection. After the signal, active requests have
    ``grace`` seconds to finish; ``cancel_all`` cancels the rest. ``log`` prints a line for the user.
    """
    config = uvicorn.Config(
        app,
        http=partial(_Protocol, header_seconds=header_seconds),  # type: ignore[arg-type]  # only called
        log_level="warning",
        access_log=False,
        ws="none",
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=_FLUSH_SECONDS,
    )
    sys.setswitchinterval(_SWITCH_SECONDS)
    server = Server(config, shutdown, grace=grace, cancel_all=cancel_all, log=log)
    server.run(sockets=[listening])
