"""Running the application: the socket it listens at, and how it stops."""

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
from tiny_lm.serving.middleware import Gate

_LAST_SECONDS = 5
"""Time for the last bytes of answers to be sent, after the stories have ended."""

_HEADER_BYTES = 2**16
"""Most bytes of headers that are waited for."""

_RESET_SECONDS = 0.1
"""How often to look whether a client that sends nothing more has gone away."""

_SWITCH_SECONDS = 0.0005
"""After so long the thread of the requests leaves Python to that of the model, and the other way round. With Python's
own 5 ms, a step of 3 ms waits longer for its turn than it computes."""


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens at an address; port 0 takes a free one.

    Raises:
        UserError: the port is in use, or the address is none of this machine's.
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
    """Return the address of a server as clients write it."""
    host, port = listening.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "localhost"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _CycleWithoutChunks(RequestResponseCycle):
    """Answers a client of HTTP/1.0, which does not know chunks: what has no length ends with the connection."""

    _has_length = False

    async def send(self, message: Any) -> None:
        """Send a part of the answer."""
        if message["type"] == "http.response.start":
            self._has_length = any(name.lower() == b"content-length" for name, _ in message.get("headers", []))
            self.chunked_encoding = None if self._has_length else False
        elif not self._has_length:
            self.expected_content_length = len(message.get("body", b""))  # whatever comes is right
        await super().send(message)


class _Protocol(HttpToolsProtocol):
    """HTTP with an end to headers, in bytes and in time: they are kept until the last one is there."""

    _unparsed = 0  # bytes since a request, or a part of its body, was last complete
    _head: asyncio.TimerHandle | None = None  # ends the time for headers that are waited for

    def __init__(self, *, head_seconds: float, **options: Any) -> None:
        """Take what uvicorn gives, and the most seconds that headers take."""
        super().__init__(**options)
        self._head_seconds = head_seconds

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        """Wait for the headers of the first request."""
        super().connection_made(transport)
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no more."""
        self._head_came()
        super().connection_lost(exc)

    def _wait_for_head(self) -> None:
        if self._head is None:
            self._head = self.loop.call_later(self._head_seconds, self.transport.close)

    def _head_came(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None

    def data_received(self, data: bytes) -> None:
        """Read what came, unless it is too much of what is no body."""
        self._unparsed += len(data)
        super().data_received(data)
        if self._unparsed > _HEADER_BYTES and not self.transport.is_closing():
            self.send_400_response("The headers are too large.")
        elif self.cycle is None or self.cycle.response_complete:
            self._wait_for_head()

    def eof_received(self) -> bool:  # type: ignore[override]  # uvicorn's own always closes
        """Keep the connection of a client that has sent its whole request and waits for the answer; close any other."""
        cycle = self.cycle
        if cycle is None or cycle.response_complete or cycle.more_body:
            return False
        cycle.keep_alive = False
        if cycle.scope["http_version"] == "1.1" and not cycle.response_started and not self.pipeline:
            # A client that has closed its socket altogether answers any bytes with a reset; HTTP lets us send these.
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._close_when_reset()
        return True

    def _close_when_reset(self) -> None:
        """Look now and then whether the client is still there: after the end of its input, nothing else says it."""
        if self.transport.is_closing():
            return
        if self.transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.transport.abort()
            return
        self.loop.call_later(_RESET_SECONDS, self._close_when_reset)

    def on_headers_complete(self) -> None:
        """Begin the request."""
        self._unparsed = 0
        self._head_came()
        super().on_headers_complete()
        if self.cycle is not None and self.cycle.scope["http_version"] == "1.0":
            self.cycle.__class__ = _CycleWithoutChunks  # before it sends: its task has not begun

    def on_body(self, body: bytes) -> None:
        """Take a part of the body, which the application limits."""
        self._unparsed = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """End the request."""
        self._unparsed = 0
        super().on_message_complete()


def stop_at_once(sig: int) -> NoReturn:
    """End the process quietly after a second signal, with the exit code that a shell shows for it.

    Unwinding would print a traceback for each answer that is broken off. The server writes no files.
    """
    os._exit(128 + sig)


class Server(uvicorn.Server):
    """A server that, asked to stop, refuses new requests and lets the running ones end.

    It goes on to listen meanwhile, so that clients and load balancers are told instead of turned away. A second signal
    ends it at once.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        gate: Gate,
        *,
        grace: float,
        end_stories: Callable[[], None],
        tell: Callable[[str], None],
    ) -> None:
        super().__init__(config)
        self._gate, self._grace, self._end_stories, self._tell = gate, grace, end_stories, tell
        self._deadline = 0.0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to stop."""
        if self._gate.closed:
            stop_at_once(sig)
        self._gate.closed = True
        self._deadline = time.monotonic() + self._grace
        if self._gate.inside:
            self._tell(f"stopping: what runs has {self._grace:g} s to end; again to stop at once")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End what still runs, so that its clients are told, and close."""
        await asyncio.to_thread(self._end_stories)
        await super().shutdown(sockets)

    async def on_tick(self, counter: int) -> bool:
        """Exit when nothing runs any more, or the time for that has passed."""
        if self._gate.closed and (not self._gate.inside or time.monotonic() >= self._deadline):
            self.should_exit = True
        return await super().on_tick(counter)


def run(
    app: FastAPI,
    listening: socket.socket,
    gate: Gate,
    *,
    head_seconds: float,
    grace: float,
    end_stories: Callable[[], None],
    tell: Callable[[str], None],
) -> None:
    """Serve ``app`` until a signal comes.

    Args:
        app: the application.
        listening: where clients come in.
        gate: that the application was built with.
        head_seconds: most seconds in which the headers of a request come; then the connection is closed.
        grace: seconds that running requests have to end.
        end_stories: ends what still runs after these.
        tell: is given lines for the user.
    """
    config = uvicorn.Config(
        app,
        http=partial(_Protocol, head_seconds=head_seconds),  # type: ignore[arg-type]  # all that is asked is a call
        log_level="warning",
        access_log=False,
        ws="none",
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=_LAST_SECONDS,
    )
    sys.setswitchinterval(_SWITCH_SECONDS)
    server = Server(config, gate, grace=grace, end_stories=end_stories, tell=tell)
    server.run(sockets=[listening])
