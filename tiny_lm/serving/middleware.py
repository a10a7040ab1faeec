"""Who may ask, how much at once, and until when: what is checked before a request is read."""

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
"""Paths that need no key: they tell that there is a server and nothing more."""


class Gate:
    """Whether a server still takes requests, and how many it is answering.

    Attributes:
        closed: new requests are refused.
        inside: requests that are being answered.
    """

    def __init__(self) -> None:
        self.closed = False
        self.inside = 0


class Guard:
    """Refuses requests that nobody should make, and counts the others.

    The name in ``Host`` must be one of ours, so that a web page cannot reach the server by letting its own name
    point to 127.0.0.1 (DNS rebinding); an ``Origin`` must be one of ours too, since browsers send simple requests
    across origins without asking.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        gate: Gate,
        metrics: Metrics,
        hosts: Sequence[str],
        key: str | None,
        body_bytes: int,
        body_seconds: float,
    ) -> None:
        """Guard ``app``.

        Args:
            app: answers what is let through.
            gate: told how many requests are inside.
            metrics: told what was answered.
            hosts: names under which clients may call the server; ``*`` for any.
            key: what clients must send as a bearer token; None: nothing.
            body_bytes: most bytes of a body.
            body_seconds: most time that a body may take to come.
        """
        self._app, self._gate, self._metrics = app, gate, metrics
        self._body_bytes, self._body_seconds = body_bytes, body_seconds
        self._hosts = {host_name(host) or host for host in hosts}
        self._key = None if key is None else key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.monotonic(), 500
        scope.setdefault("state", {})["arrived"] = started  # the time of a request counts from here

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if self._gate.closed:
                    MutableHeaders(scope=message)["connection"] = "close"
            await send(message)

        refusal = self._refusal(scope)
        self._gate.inside += 1
        try:
            if refusal is not None:
                await refusal(scope, receive, watch)
            else:
                await self._app(scope, self._limited(receive), watch)
        finally:
            self._gate.inside -= 1
            path = getattr(scope.get("route"), "path", "other")
            self._metrics.answered(path, status, time.monotonic() - started)

    def _refusal(self, scope: Scope) -> Response | None:
        """Return why a request is refused before it is read, or None."""
        headers, path = Headers(scope=scope), scope["path"]
        # Browsers name the host; what asks without a name (HTTP/1.0, as some health checks do) is none.
        hosts, origins = headers.getlist("host"), headers.getlist("origin")
        if len(hosts) > 1 or len(origins) > 1:
            return error_response(path, 400, "the request has more than one Host or Origin header", code="bad_host")
        if hosts and not self._is_ours(hosts[0]):
            message = "this server does not answer to that host name (tiny-lm serve --allow-host NAME admits one)"
            return error_response(path, 403, message, code="host_not_allowed")
        if origins and not self._is_ours(origins[0].partition("://")[2]):
            return error_response(path, 403, "requests from that web page are not admitted", code="origin_not_allowed")
        if self._key is not None and path not in _OPEN_PATHS and not self._has_key(headers):
            message = "this server needs its API key, as in 'Authorization: Bearer KEY'"
            return error_response(path, 401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
        if self._gate.closed and path != "/metrics":
            return error_response(path, 503, "the server is stopping", code="stopping")
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self._body_bytes:
            # Closed, or the rest of the body would be read only to be thrown away.
            return error_response(path, 413, self._too_large(), headers={"connection": "close"})
        if path.startswith("/api/") and scope["method"] == "POST":
            # Ollama reads JSON whatever the content type says, and the curl lines of its documentation need that.
            MutableHeaders(scope=scope)["content-type"] = "application/json"
        return None

    def _too_large(self) -> str:
        return f"the body is larger than {self._body_bytes:,} bytes"

    def _is_ours(self, address: str) -> bool:
        """Return whether ``address``, a host name that may carry a port, is one of ours."""
        return "*" in self._hosts or host_name(address) in self._hosts

    def _has_key(self, headers: Headers) -> bool:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        assert self._key is not None
        return scheme.lower() == "bearer" and hmac.compare_digest(key.strip().encode(), self._key)

    def _limited(self, receive: Receive) -> Receive:
        """Return ``receive`` with an end to the body: in bytes, for one that does not tell its length, and in time."""
        seen, whole, started = 0, False, time.monotonic()

        async def limited() -> Message:
            nonlocal seen, whole
            if whole:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), started + self._body_seconds - time.monotonic())
            except asyncio.TimeoutError:
                told = f"the body did not come within {self._body_seconds:g} seconds"
                raise HTTPException(408, told, headers={"connection": "close"}) from None
            seen += len(message.get("body", b""))
            if seen > self._body_bytes:
                raise HTTPException(413, self._too_large(), headers={"connection": "close"})
            whole = not message.get("more_body", False)
            return message

        return limited


_ADDRESS = re.compile(
    r"(?:\[([0-9a-f:.]{2,45})\]|([a-z0-9_](?:[a-z0-9_.-]{0,253}[a-z0-9_])?)\.?)(?::[0-9]{1,5})?", re.ASCII
)
"""``host``, ``host:port`` or ``[IPv6]:port``, in lower case; a host name may end with the dot of the DNS root."""


def host_name(address: str) -> str | None:
    """Return the host of an address that may carry a port, in one spelling, or None where it is malformed."""
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
    """Return the names under which a server at ``address`` may be called: those of this machine, and ``allowed``."""
    own = [] if _is_any(address) else [address]
    return [*LOOPBACK_HOSTS, *own, *allowed]


def _is_any(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_unspecified
    except ValueError:
        return False
