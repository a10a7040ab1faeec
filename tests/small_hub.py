"""A Hub of our own on this machine: what the tests that download and those that upload share."""

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class HubHandler(BaseHTTPRequestHandler):
    """Answers quietly."""

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str | None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            if value is not None:
                self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextmanager
def serving(handler: type[HubHandler]) -> Iterator[str]:
    """Yield the address at which a handler answers."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def address_of_nobody() -> str:
    """Return the address of a port on which nobody listens."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{unused.getsockname()[1]}"


def hub_environment(endpoint: str, home: Path, **variables: str) -> dict[str, str]:
    """Return the variables of a child for which the Hub is ``endpoint``; the library reads them when it is imported."""
    hidden = {name: "" for name in os.environ if name.startswith("HF_") or name.lower().endswith("_proxy")}
    return {**os.environ, **hidden, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), **variables}
