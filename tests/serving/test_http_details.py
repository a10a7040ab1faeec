"""What clients of all kinds send and expect: odd text, nulls, half-closed connections, forged hosts, second signals."""

import json
import signal
import socket
from typing import Any

import pytest
from served import Serve, Served, wait_for

from tiny_lm.serving.middleware import host_name

SEPARATED = "One\u2028day\u2029a\x85cat\x0b\x0c\x1c"


def test_events_and_lines_survive_unicode_line_separators(server: Served) -> None:
    body: dict[str, Any] = {"model": "fox", "prompt": SEPARATED, "echo": True, "stream": True, "max_tokens": 2}
    with server.client.stream("POST", "/v1/completions", json=body) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    assert json.loads(lines[0])["choices"][0]["text"] == SEPARATED
    for line in lines:
        json.loads(line)


def test_nulls_are_as_if_absent(server: Served) -> None:
    def answer(path: str, body: dict[str, Any]) -> dict[str, Any]:
        response = server.client.post(path, json=body)
        assert response.status_code == 200, response.text
        told: dict[str, Any] = response.json()
        return told

    options = dict.fromkeys(
        ("temperature", "top_k", "top_p", "min_p", "repeat_penalty", "presence_penalty", "frequency_penalty", "stop",
         "num_ctx")
    )  # fmt: skip
    body = {"model": "fox", "prompt": "One day", "stream": False}
    optional = dict.fromkeys(("system", "raw", "suffix", "format", "context", "images", "template", "think"))
    given = {**optional, **body, "options": {**options, "seed": 1, "num_predict": 3}}
    plain = {**body, "options": {"seed": 1, "num_predict": 3}}
    assert answer("/api/generate", given)["response"] == answer("/api/generate", plain)["response"]
    assert answer("/api/generate", {**body, "options": {"seed": None, "num_predict": None, "stop": ["e"]}})["done"]
    assert answer("/api/show", {"model": None, "name": "fox"})["details"]["family"] == "gpt2"
    names = (
        "stop", "temperature", "seed", "logit_bias", "tools", "tool_choice", "response_format", "user", "n", "top_p",
        "stream", "stream_options", "logprobs", "top_logprobs", "presence_penalty", "modalities", "function_call",
    )  # fmt: skip
    messages = [{"role": "user", "content": "One day", "name": None, "tool_calls": None}]
    chat = {**dict.fromkeys(names), "model": "fox", "messages": messages, "max_tokens": 2}
    assert answer("/v1/chat/completions", chat)["choices"]
    assert answer("/v1/chat/completions", {**chat, "stream": False, "stream_options": {"include_usage": None}})


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b'\xef\xbb\xbf{"model": "fox", "prompt": "One", "max_tokens": 1}', 200),
        (b'{"model": "x", "model": "fox", "prompt": "One", "max_tokens": 1}', 200),  # JSON's last key wins
        (b'{"model": "fox", "prompt": "One", "max_tokens": 1, "x": NaN}', 200),
        (b'{"model": "fox", "prompt": "One", "temperature": NaN, "options": {"temperature": NaN}}', 400),
        (b'{"model": "fox", "prompt": "One", "temperature": Infinity, "options": {"top_p": Infinity}}', 400),
        (b'{"model": "fox", "prompt": "One", "seed": 1' + b"0" * 5000 + b"}", 400),
        (b'{"model": "fox", "prompt": "One", "max_tokens": 1e400, "options": {"num_predict": 1e400}}', 400),
        (b'{"model": "fox", "prompt": "\\ud800"}', 400),
        (b'{"model": "\\udfff", "prompt": "One"}', 400),
        (b'{"model": "fox", "prompt": "\xff"}', 400),
        (b'{"model": "fox", "prompt": ' + b"[" * 100_000, 400),
        (b'{"model": "fox", "x": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_001, 400),
    ],
    ids=range(12),
)
def test_odd_bodies_get_an_answer_in_the_shape_of_the_api(server: Served, content: bytes, status: int) -> None:
    for path, shape in (("/v1/completions", dict), ("/api/generate", str)):
        response = server.client.post(path, content=content)
        assert response.status_code == status, response.text
        if status == 400:
            assert isinstance(response.json()["error"], shape)


def _connect(served: Served, body: dict[str, Any]) -> socket.socket:
    content = json.dumps(body).encode()
    host, port = served.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=60)
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return connection


def _read(connection: socket.socket) -> bytes:
    answer = b""
    while part := connection.recv(4096):
        answer += part
    return answer


@pytest.mark.parametrize("stream", [False, True])
def test_a_half_closed_client_gets_its_answer(server: Served, stream: bool) -> None:
    with _connect(server, {"model": "fox", "prompt": "One", "max_tokens": 30, "stream": stream}) as connection:
        connection.shutdown(socket.SHUT_WR)
        answer = _read(connection)  # to the end: the server closes the connection
    final = answer.rpartition(b"HTTP/1.1 200")[2]
    assert (b"[DONE]" if stream else b'"completion_tokens":') in final


def test_half_a_request_is_not_waited_for_after_the_end_of_input(server: Served) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{")
        connection.shutdown(socket.SHUT_WR)
        assert b"200" not in _read(connection)


@pytest.mark.parametrize(
    ("address", "host"),
    [
        ("localhost", "localhost"),
        ("LOCALHOST.:80", "localhost"),
        ("[::1]:8000", "::1"),
        ("[0:0:0:0:0:0:0:1]", "::1"),
        ("[::1].evil.com", None),
        ("[::1]evil.com:80", None),
        ("[::1", None),
        ("localhost:80@evil.com", None),
        ("user@localhost", None),
        ("localhost..", None),
        ("localhost:80:80", None),
        ("localhost/evil", None),
        ("", None),
        (":80", None),
    ],
)
def test_host_names_are_parsed_strictly(address: str, host: str | None) -> None:
    assert host_name(address) == host


@pytest.mark.parametrize(
    "hosts", [["[::1].evil.com"], ["user@localhost"], [""], ["localhost", "evil.example"], ["localhost"] * 2]
)
def test_forged_host_headers_are_refused(server: Served, hosts: list[str]) -> None:
    address, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((address, int(port)), timeout=60) as connection:
        lines = "".join(f"Host: {host}\r\n" for host in hosts)
        connection.sendall(f"GET /v1/models HTTP/1.1\r\n{lines}Connection: close\r\n\r\n".encode())
        head, _, body = _read(connection).partition(b"\r\n\r\n")
    assert head.split()[1] in (b"400", b"403") and json.loads(body)["error"]["message"]


@pytest.mark.parametrize("keep_alive", [False, True])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/completions", "/api/generate"])
def test_clients_of_http_1_0_get_an_answer_without_chunks(
    server: Served, path: str, stream: bool, keep_alive: bool
) -> None:
    """Old clients, and proxies such as nginx by default; without a length, the answer ends with the connection."""
    content = json.dumps({"model": "fox", "prompt": "One", "stream": stream, "options": {"num_predict": 5}}).encode()
    address, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((address, int(port)), timeout=60) as connection:
        wish = "Connection: keep-alive\r\n" if keep_alive else ""
        head = f"POST {path} HTTP/1.0\r\n{wish}Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        connection.sendall(head.encode() + content)
        head, _, body = _read(connection).decode().partition("\r\n\r\n")
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in head.splitlines()[1:])}
    assert headers["connection"] == "close"
    assert "transfer-encoding" not in headers
    assert ("content-length" in headers) is not stream
    lines = [line.removeprefix("data: ") for line in body.splitlines() if line and line != "data: [DONE]"]
    assert len(lines) >= 1 + stream
    for line in lines:
        json.loads(line)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_during_a_stream_ends_quietly(
    serve: Serve, run_folder: Any, number: signal.Signals, code: int
) -> None:
    served = serve(run_folder, "--max-tokens", "100000")
    body = {"model": "fox", "prompt": "One day", "max_tokens": 90_000, "min_tokens": 90_000, "stream": True}
    with _connect(served, body) as connection:
        assert connection.recv(100)
        served.process.send_signal(number)
        wait_for(lambda: served.client.get("/health").status_code == 503)
        served.process.send_signal(number)
        assert served.process.wait(timeout=20) == code
    assert served.process.stderr and "Traceback" not in served.process.stderr.read()
