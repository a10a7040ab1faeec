"""The server of the page: on this machine only, and with no more of Gradio's routes than the page uses."""

import logging
import socket
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from tiny_lm.errors import UserError
from tiny_lm.files import to_json
from tiny_lm.inference import TextGenerator
from tiny_lm.serving.demo.backend import DemoBackend
from tiny_lm.serving.demo.calls import Calls
from tiny_lm.serving.demo.page import build_page, page_style
from tiny_lm.serving.demo.theme import build_theme
from tiny_lm.serving.middleware import host_name

HOST = "127.0.0.1"

_ICON = Path(__file__).parent / "favicon.svg"

_log = logging.getLogger("uvicorn.error")

_MAX_BODY_BYTES = 64 * 2**10
_MAX_PATH_LENGTH = 250
_ALLOWED_PATHS = {
    "GET": (
        "/assets/", "/static/", "/theme.css", "/favicon.ico", "/manifest.json",
        "/gradio_api/queue/data", "/gradio_api/heartbeat/",
    ),
    "POST": ("/gradio_api/queue/join", "/gradio_api/run/predict"),
}  # fmt: skip
"""The routes that the page uses. Gradio has many more: files, uploads, an API."""

_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; font-src 'self' data:; object-src 'none'; frame-ancestors 'none'; form-action 'none'"
)
"""With it the browser blocks requests of the page to other machines."""

_HEADERS = [
    (b"content-security-policy", _POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]

_Scope = dict[str, Any]
_Receive = Callable[[], Awaitable[dict[str, Any]]]
_Send = Callable[[dict[str, Any]], Awaitable[None]]


class RouteAllowlist:
    """Passes what the page itself requests to Gradio, and refuses everything else."""

    def __init__(self, app: Any, port: int, calls: Calls) -> None:
        """Wrap ``app``, an ASGI application at ``port`` of this machine whose events are ``calls``."""
        self._app, self._port, self._calls = app, port, calls

    async def __call__(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        """Handle one connection."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http" or (status := self._refusal(scope)):
            await _refuse(send, status if scope["type"] == "http" else 403)
            return

        started = False

        async def send_with_headers(message: dict[str, Any]) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message.get("headers", []), *_HEADERS]
            await send(message)

        if scope["method"] == "POST":
            body = await _read_body(receive)
            if body is None:
                await _refuse(send, 413)
                return
            if problem := self._calls.problem(body):
                await _refuse(send, 400, problem)
                return
            receive = _replay(body, receive)
        try:
            await self._app(scope, receive, send_with_headers)
        except Exception as error:  # Gradio raises if a client requests something that no longer exists
            _log.warning("%s %s failed (%s)", scope["method"], scope["path"][:100], type(error).__name__)
            if not started:
                await _refuse(send, 500)

    def _refusal(self, scope: _Scope) -> int:
        """Return the status of the refusal; 0 if the request is allowed."""
        headers = dict(scope["headers"])
        names = [name for name, _ in scope["headers"]]
        if names.count(b"host") != 1 or not self._is_this_machine(headers[b"host"]):
            return 421  # DNS rebinding: a page of another site uses its own name for this machine
        if b"origin" in headers and not self._is_this_machine(headers[b"origin"].removeprefix(b"http://")):
            return 403  # a page of another site
        path, method = scope["path"], scope["method"].replace("HEAD", "GET")
        is_page = path == "/" and method == "GET"
        if len(path) > _MAX_PATH_LENGTH:
            return 404
        if not is_page and (".." in path or not path.startswith(_ALLOWED_PATHS.get(method, ()))):
            return 404
        if method == "POST" and not _is_small(headers.get(b"content-length", b"")):
            return 413
        return 0

    def _is_this_machine(self, address: bytes) -> bool:
        """Return whether an address is that of the page."""
        text = address.decode("latin-1")
        return host_name(text) in (HOST, "localhost") and text.endswith(f":{self._port}")


def _is_small(length: bytes) -> bool:
    return length.isdigit() and int(length) <= _MAX_BODY_BYTES


async def _read_body(receive: _Receive) -> bytes | None:
    """Return the whole body, or None if it is too large."""
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > _MAX_BODY_BYTES:
            return None
    return body


def _replay(body: bytes, receive: _Receive) -> _Receive:
    """Return a ``receive`` that returns ``body`` first."""
    sent = False

    async def replayed() -> dict[str, Any]:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed


async def _refuse(send: _Send, status: int, detail: str = "") -> None:
    body = to_json({"detail": detail}).encode() if detail else b""
    headers = [(b"content-length", str(len(body)).encode()), (b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def build_app(backend: DemoBackend, port: int) -> RouteAllowlist:
    """Return the page as an ASGI application for ``port`` of this machine."""
    import fastapi
    import gradio as gr

    app = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    page = build_page(backend)
    gr.mount_gradio_app(
        app, page, "/", theme=build_theme(), head=f"<style>{page_style()}</style>",
        favicon_path=str(_ICON), server_name=HOST, server_port=port, footer_links=[], show_error=False,
        max_file_size=1, run_history=False, enable_monitoring=False, mcp_server=False, ssr_mode=False, pwa=False,
    )  # fmt: skip
    return RouteAllowlist(app, port, Calls(page))


def serve_demo(models: Mapping[str, TextGenerator], port: int, *, on_start: Callable[[str], None]) -> None:
    """Serve the page on this machine until the process is interrupted.

    Args:
        models: by the names that the page shows.
        port: to listen at; 0 chooses a free one.
        on_start: called with the URL once the page can be opened.

    Raises:
        UserError: the port is in use, or Gradio is not installed.
    """
    try:
        import gradio  # noqa: F401  (fails here if it is missing, before the models start)
        import uvicorn
    except ImportError:
        raise UserError("the demo needs Gradio: pip install 'tiny-lm[demo]'") from None
    from tiny_lm.serving.server import listen, stop_at_once, url_of

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            on_start(url_of(listening))

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if self.should_exit:
                stop_at_once(sig)
            super().handle_exit(sig, frame)

    with listen(HOST, port) as listening:
        backend = DemoBackend(models)
        try:
            app: Any = build_app(backend, listening.getsockname()[1])
            config = uvicorn.Config(
                app, log_level="warning", ws="none", timeout_graceful_shutdown=2, limit_concurrency=200
            )
            Server(config).run(sockets=[listening])
        finally:
            backend.close()
