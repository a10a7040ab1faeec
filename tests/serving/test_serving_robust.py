"""What a server withstands: too much work, clients that go away, strangers, and its own end."""

import json
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fastapi.testclient import TestClient
from served import Serve, Served, start, stop, wait_for

from tiny_lm.cli import main
from tiny_lm.inference import TextGenerator
from tiny_lm.inference.batch import BatchDecoder
from tiny_lm.inference.sequence import SequenceState
from tiny_lm.serving.app import create_app
from tiny_lm.serving.models import ServedModel
from tiny_lm.serving.scheduler import Scheduler

LONG: dict[str, Any] = {"model": "fox", "prompt": "One day", "max_tokens": 90_000, "min_tokens": 90_000}
SHORT: dict[str, Any] = {"model": "fox", "prompt": "One day", "max_tokens": 8, "temperature": 0}


def running(served: Served) -> int:
    return int(served.metric("tiny_lm_texts_running"))


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {**LONG, "stream": True}),
        ("/v1/completions", LONG),
        ("/v1/completions", {**LONG, "stream": True, "n": 3}),
        ("/api/generate", {"model": "fox", "prompt": "One day", "options": {"num_predict": 90_000}, "stream": False}),
    ],
)
def test_a_client_that_goes_away_frees_its_slot(server: Served, path: str, body: dict[str, Any]) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    content = json.dumps(body).encode()
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        wait_for(lambda: running(server) == body.get("n", 1))
    wait_for(lambda: running(server) == 0)


def test_a_slow_reader_does_not_stall_others(server: Served, generator: TextGenerator) -> None:
    with (
        httpx.Client(base_url=server.url, timeout=60) as slow,
        slow.stream("POST", "/v1/completions", json={**LONG, "stream": True, "logprobs": 20}),
    ):
        # Nobody reads that stream, whose buffers are full after some hundred tokens.
        wait_for(lambda: running(server) == 1)
        for _ in range(20):
            assert server.client.post("/v1/completions", json=SHORT).json()["usage"]["completion_tokens"] == 8
    wait_for(lambda: running(server) == 0)


@pytest.fixture(scope="module")
def narrow(run_folder: Path) -> Iterator[Served]:
    """A server with room for two texts, whose requests may take two seconds, and which has a key."""
    words = ["--slots", "1", "--queue", "1", "--timeout", "2", "--max-tokens", "100000", "--allow-host", "fox.example"]
    served = start(run_folder, *words, TINY_LM_API_KEY="secret")
    served.client.headers["authorization"] = "Bearer secret"
    yield served
    told = stop(served)
    assert "Traceback" not in told, told


def test_a_full_queue_refuses_with_a_time_to_come_back(narrow: Served) -> None:
    def ask(_: int) -> httpx.Response:
        return httpx.post(f"{narrow.url}/v1/completions", json=LONG, headers=narrow.client.headers, timeout=60)

    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(ask, range(6)))
    statuses = sorted(answer.status_code for answer in answers)
    assert statuses == [429, 429, 429, 429, 504, 504]  # two were begun and took too long
    for answer in answers:
        if answer.status_code == 429:
            assert int(answer.headers["retry-after"]) > 0
            assert answer.json()["error"]["type"] == "rate_limit_error"
        else:
            assert answer.json()["error"]["code"] == "timeout"
    wait_for(lambda: running(narrow) == 0)
    assert narrow.client.post("/v1/completions", json={**SHORT, "n": 3}).status_code == 429
    wait_for(lambda: narrow.client.post("/v1/completions", json={**SHORT, "n": 2}).status_code == 200)


def test_a_stream_that_takes_too_long_ends_with_an_error(narrow: Served) -> None:
    with (
        openai.OpenAI(base_url=f"{narrow.url}/v1", api_key="secret", max_retries=0) as client,
        pytest.raises(openai.APIError, match="longer than this server allows"),
    ):
        pieces = 0
        for _ in client.completions.create(
            model="fox", prompt="One day", max_tokens=90_000, stream=True, extra_body={"min_tokens": 90_000}
        ):
            pieces += 1
    assert pieces > 10
    response = narrow.client.post(
        "/api/generate", json={"model": "fox", "prompt": "One", "options": {"num_predict": 90_000, "stop": ["\x00"]}}
    )
    last = json.loads(response.text.splitlines()[-1])
    assert last.get("done") or "longer than this server allows" in last["error"]


@pytest.mark.parametrize("head", ["Content-Length: 100", "Transfer-Encoding: chunked"])
def test_a_body_that_does_not_come_is_not_waited_for(narrow: Served, head: str) -> None:
    host, port = narrow.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        lines = (
            "POST /v1/completions HTTP/1.1",
            "Host: localhost",
            "Authorization: Bearer secret",
            head,
            "",
            "2\r\n{ \r\n",
        )
        connection.sendall("\r\n".join(lines).encode())
        answer = b""
        while part := connection.recv(4096):  # until the server closes
            answer += part
    assert answer.startswith(b"HTTP/1.1 408") and b"the body did not arrive within 2 seconds" in answer


def test_headers_have_an_end(server: Served) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(b"GET /health HTTP/1.0\r\n\r\n")  # no Host, as health checks ask
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: ")
        with pytest.raises(OSError):  # the server closes
            for _ in range(10_000):
                connection.sendall(b"a" * 2**14)


@pytest.mark.parametrize("begun", [b"", b"GET /health HTTP/1.1\r\nHost: localh"])
@pytest.mark.parametrize("before", [0, 1])
def test_headers_come_in_time(narrow: Served, before: int, begun: bytes) -> None:
    host, port = narrow.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        for _ in range(before):
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            answer = b""
            while not answer.endswith(b'{"status":"ok"}'):
                answer += connection.recv(4096)
        connection.sendall(begun)
        assert connection.recv(4096) == b""  # the server closes


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer wrong", "Basic secret", "Bearer secre", "Bearer secret2"])
def test_without_the_key_nothing_is_told(narrow: Served, header: str) -> None:
    headers = {"authorization": header} if header else {}
    for method, path in (("GET", "/v1/models"), ("POST", "/v1/completions"), ("GET", "/api/tags"), ("GET", "/metrics")):
        response = httpx.request(method, narrow.url + path, headers=headers)
        assert response.status_code == 401 and response.headers["www-authenticate"] == "Bearer"
    assert httpx.get(f"{narrow.url}/health", headers=headers).json() == {"status": "ok"}
    with (
        openai.OpenAI(base_url=f"{narrow.url}/v1", api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError, match="API key"),
    ):
        client.models.list()


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "localhost"}, 200),
        ({"host": "LOCALHOST:80"}, 200),
        ({"host": "[::1]:8000"}, 200),
        ({"host": "fox.example:8000"}, 200),
        ({"host": "evil.example"}, 403),
        ({"host": "localhost.evil.example"}, 403),
        ({"host": "127.0.0.1.evil.example"}, 403),
        ({"origin": "http://localhost:3000"}, 200),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
    ],
)
def test_other_names_and_web_pages_are_refused(narrow: Served, headers: dict[str, str], status: int) -> None:
    response = narrow.client.get("/v1/models", headers=headers)
    assert response.status_code == status
    assert not [name for name in response.headers if name.startswith("access-control")]


def test_metrics_count_what_happened(server: Served) -> None:
    before = server.metric("tiny_lm_generated_tokens_total"), server.metric("tiny_lm_requests_total")
    server.client.post("/v1/completions", json=SHORT)
    server.client.get("/no/such/path")
    assert server.metric("tiny_lm_generated_tokens_total") == before[0] + 8
    assert server.metric("tiny_lm_requests_total") == before[1] + 4  # two of them asked for the metrics
    assert "/no/such/path" not in server.client.get("/metrics").text
    assert server.metric("process_resident_memory_bytes") > 1e7


def test_asked_to_stop_it_lets_stories_end_and_takes_no_new_ones(serve: Serve, run_folder: Path) -> None:
    served = serve(run_folder, "--max-tokens", "20000")
    told: list[str] = []

    def listen() -> None:
        body = {**LONG, "max_tokens": 4000, "min_tokens": 4000, "stream": True}
        with httpx.stream("POST", f"{served.url}/v1/completions", json=body, timeout=60) as response:
            told.extend(response.iter_lines())

    listener = threading.Thread(target=listen)
    listener.start()
    wait_for(lambda: running(served) == 1)
    served.process.terminate()
    wait_for(lambda: served.client.get("/health").status_code == 503)
    refused = served.client.post("/v1/completions", json=SHORT)
    assert refused.status_code == 503 and refused.headers["retry-after"]
    assert refused.json()["error"]["code"] == "stopping"
    listener.join(timeout=60)
    assert told[-2:] == ["data: [DONE]", ""]
    assert served.process.wait(timeout=20) == 0
    assert served.process.stderr and "active requests have 30 s to finish" in served.process.stderr.read()


def test_a_story_without_an_end_is_told_that_the_server_stops(serve: Serve, run_folder: Path) -> None:
    served = serve(run_folder, "--max-tokens", "100000", "--grace", "0.5")
    with httpx.stream("POST", f"{served.url}/v1/completions", json={**LONG, "stream": True}, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        served.process.terminate()
        *_, last = (line for line in lines if line)
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "stopping"
    assert served.process.wait(timeout=20) == 0
    assert served.process.stderr and "Traceback" not in served.process.stderr.read()


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return the one line with which `tiny-lm serve` gives up."""

    def run(*words: str | Path) -> str:
        monkeypatch.setattr(sys, "argv", ["tiny-lm", "serve", *map(str, words)])
        with pytest.raises(SystemExit) as exit_:
            main()
        told = capsys.readouterr()
        assert exit_.value.code == 2 and told.out == "" and told.err.count("\n") == 1, told.err
        return told.err

    return run


def test_what_cannot_be_served_is_told_in_one_line(
    fail: Callable[..., str], run_folder: Path, server: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = server.url.rpartition(":")[2]
    assert f"port {port} of 127.0.0.1 is in use" in fail(run_folder, "--port", port)
    assert "no such run, checkpoint or exported folder" in fail(tmp_path / "nothing")
    assert "is neither a trained run nor an exported folder" in fail(tmp_path)
    assert "both named 'fox'" in fail(run_folder, f"fox={run_folder / 'checkpoints' / 'last.ckpt'}")
    assert "the API key is empty" in fail(run_folder, "--api-key", "")
    assert "slots must be between" in fail(run_folder, "--slots", "0")
    with monkeypatch.context() as patch:
        patch.setattr("tiny_lm.serving.models.free_memory", lambda device: 2**20)
        told = fail(run_folder, "--slots", "1024", "--port", "0")
        assert "the KV caches of 1024 slots take 16 MiB, and 1 are free: choose fewer --slots" in told
    assert "cannot be listened at" in fail(run_folder, "--host", "203.0.113.7")
    for name in [name for name in sys.modules if name.startswith("tiny_lm.serving")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "needs uvicorn, which is not installed: pip install 'tiny-lm[serve]'" in fail(run_folder)


@pytest.fixture
def half(generator: TextGenerator) -> Iterator[TestClient]:
    """Two models, of which one fails after a few steps."""

    class Failing(TextGenerator):
        def new_batch(self, slots: int, **options: int | None) -> BatchDecoder:
            batch = super().new_batch(slots, **options)
            step, steps = batch.step, iter(range(4))

            def failing_step() -> list[SequenceState]:
                if next(steps, None) is None:
                    raise MemoryError("no room")
                return step()

            batch.step = failing_step  # type: ignore[method-assign]
            return batch

    def served(name: str, generator: TextGenerator) -> ServedModel:
        return ServedModel(name, generator, Scheduler(generator, publish_seconds=0), None, 0, "")

    failing = Failing(generator.model, generator.tokenizer)
    with TestClient(create_app([served("fox", generator), served("owl", failing)]), "http://localhost") as client:
        yield client


def test_a_model_that_fails_takes_no_other_with_it(half: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    owl = {"model": "owl", "prompt": "One day", "max_tokens": 40, "min_tokens": 40}
    assert half.get("/health").json() == {"status": "ok"} and half.head("/health").status_code == 200
    assert half.post("/v1/completions", json={**owl, "max_tokens": 2, "min_tokens": 2}).status_code == 200
    *_, last = [line for line in half.post("/v1/completions", json={**owl, "stream": True}).iter_lines() if line]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "model_failed"
    for path, body in (
        ("/v1/completions", owl),
        ("/v1/completions", {**owl, "stream": True}),
        ("/v1/completions", {**owl, "max_tokens": 0, "min_tokens": 0, "echo": True, "logprobs": 0}),
        ("/v1/chat/completions", {"model": "owl", "messages": [{"role": "user", "content": "One day"}]}),
    ):
        refused = half.post(path, json=body)
        assert refused.status_code == 503 and "retry-after" not in refused.headers
        error = refused.json()["error"]
        assert (error["type"], error["code"], error["param"]) == ("server_error", "model_failed", None)
    assert half.post("/api/generate", json={"model": "owl", "prompt": "One"}).json()["error"].startswith("this model")
    assert half.get("/health").status_code == 503 and half.head("/health").status_code == 503
    assert half.get("/health").json() == {"status": "failed", "failed": ["owl"]}
    assert 'tiny_lm_model_failed{model="owl"} 1.0' in half.get("/metrics").text
    assert [str(record.exc_info[1]) for record in caplog.records if record.exc_info] == ["no room"]  # told once
    assert half.post("/v1/completions", json={**owl, "model": "fox"}).json()["usage"]["completion_tokens"] == 40
