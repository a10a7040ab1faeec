"""Checks before a request is handled: host, origin, API key, size and time of its body."""

import asyncio
import hmac
import ipaddress
import re
import time
from collections.abc import Sequence
from contextlib import suppress

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tiny_lm.serving.errors import error_response
from tiny_lm.serving.metrics import Metrics

LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "::1")

_OPEN_PATHS = ("/", "/health")
"""Paths that need no key: they reveal only that a server is running."""


class ShutdownState:
    """Whether a server is stopping, and how many requests it still handles.

    Attributes:
        stopping: new requests are refused.
        active: number of requests that are being handled.
    """

    def __init__(self) -> None:
        self.stopping = False
        self.active = 0


class RequestMiddleware:
    """Refuses forbidden requests, and records metrics of all.

    ``Host`` must be a name of this server, so that a web page cannot reach it by pointing its own name to 127.0.0.1
    (DNS rebinding). So must ``Origin`` be, since browsers send simple cross-origin requests without a preflight.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        shutdown: ShutdownState,
        metrics: Metrics,
        hosts: Sequence[str],
        key: str | None,
        body_bytes: int,
        body_seconds: float,
    ) -> None:
        """Wrap ``app``.

        Args:
            app: handles what is allowed.
            shutdown: tracks the active requests.
            metrics: records the responses.
            hosts: host names under which clients may call the server; ``*`` for any.
            key: the bearer token that clients must send; None for no authentication.
            body_bytes: maximum size of a body.
            body_seconds: maximum time for a body to arrive.
        """
        self._app, self._shutdown, self._metrics = app, shutdown, metrics
        self._body_bytes, self._body_seconds = body_bytes, body_seconds
        self._hosts = {host_name(host) or host for host in hosts}
        self._key = None if key is None else key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.monotonic(), 500
        scope.setdefault("state", {})["arrived"] = started  # its timeout counts from here

        async def send_watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if self._shutdown.stopping:
                    MutableHeaders(scope=message)["connection"] = "close"
            await send(message)

        refusal = self._refusal(scope)
        self._shutdown.active += 1
        try:
            if refusal is not None:
                await refusal(scope, receive, send_watched)
            else:
                await self._app(scope, self._limited(receive), send_watched)
        finally:
            self._shutdown.active -= 1
            path = getattr(scope.get("route"), "path", "other")
            self._metrics.record_response(path, status, time.monotonic() - started)

    def _refusal(self, scope: Scope) -> Response | None:
        """Return the response to a request that is refused before its body is read, or None."""
        headers, path = Headers(scope=scope), scope["path"]
        # Browsers always send a host; a client without one (HTTP/1.0, as some health checks) is not a browser.
        hosts, origins = headers.getlist("host"), headers.getlist("origin")
        if len(hosts) > 1 or len(origins) > 1:
            return error_response(path, 400, "the request has more than one Host or Origin header", code="bad_host")
        if hosts and not self._is_allowed(hosts[0]):
            message = "this host name is not allowed (tiny-lm serve --allow-host NAME allows one)"
            return error_response(path, 403, message, code="host_not_allowed")
        if origins and not self._is_allowed(origins[0].partition("://")[2]):
            return error_response(path, 403, "requests from this web page are not allowed", code="origin_not_allowed")
        if self._key is not None and path not in _OPEN_PATHS and not self._has_key(headers):
            message = "this server needs its API key, as in 'Authorization: Bearer KEY'"
            return error_response(path, 401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
        if self._shutdown.stopping and path != "/metrics":
            return error_response(path, 503, "the server is stopping", code="stopping")
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self._body_bytes:
            # Close the connection; else the rest of the body would be read only to be discarded.
            return error_response(path, 413, self._too_large(), headers={"connection": "close"})
        if path.startswith("/api/") and scope["method"] == "POST":
            # Ollama reads JSON whatever the content type is, and the curl commands of its documentation rely on it.
            MutableHeaders(scope=scope)["content-type"] = "application/json"
        return None

    def _too_large(self) -> str:
        return f"the body is larger than {self._body_bytes:,} bytes"

    def _is_allowed(self, address: str) -> bool:
        """Return whether ``address``, a host name with or without a port, is one of the allowed hosts."""
        return "*" in self._hosts or host_name(address) in self._hosts

    def _has_key(self, headers: Headers) -> bool:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        assert self._key is not None
        return scheme.lower() == "bearer" and hmac.compare_digest(key.strip().encode(), self._key)

    def _limited(self, receive: Receive) -> Receive:
        """Wrap ``receive`` to cap size and arrival time of the body, whose length may not be declared."""
        received, complete, started = 0, False, time.monotonic()

        async def limited() -> Message:
            nonlocal received, complete
            if complete:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), started + self._body_seconds - time.monotonic())
            except asyncio.TimeoutError:
                detail = f"the body did not arrive within {self._body_seconds:g} seconds"
                raise HTTPException(408, detail, headers={"connection": "close"}) from None
            received += len(message.get("body", b""))
            if received > self._body_bytes:
                raise HTTPException(413, self._too_large(), headers={"connection": "close"})
            complete = not message.get("more_body", False)
            return message

        return limited


_ADDRESS = re.compile(
    r"(?:\[([0-9a-f:.]{2,45})\]|([a-z0-9_](?:[a-z0-9_.-]{0,253}[a-z0-9_])?)\.?)(?::[0-9]{1,5})?", re.ASCII
)
"""``host``, ``host:port`` or ``[IPv6]:port``, in lower case; a host name may end with the dot of the DNS root."""


def host_name(address: str) -> str | None:
    """Return the normalized host of an address with or without a port, or None if it is malformed."""
    with suppress(ValueError):
        return str(ipaddress.ip_address(address))
    match = _ADDRESS.fullmatch(address.lower())
    if match is None:
        return None
    if match[1] is None:
        return match[2]
    try:
        return str(ipaddress.IPv6Address(match[1]))
    except ValueError:
        return None


def hosts_of(address: str, allowed: Sequence[str]) -> list[str]:
    """Return the host names under which a server at ``address`` may be called: loopback names and ``allowed``."""
    own = [] if _is_unspecified(address) else [address]
    return [*LOOPBACK_HOSTS, *own, *allowed]


def _is_unspecified(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_unspecified
    except ValueError:
        return False
