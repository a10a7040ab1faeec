"""The judge, against a real server that answers well, badly, late or not at all."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tiny_lm.errors import UserError
from tiny_lm.evaluation.judge import ASPECTS, Judge, parse_grades

GOOD = {"comment": "Fine.", "grammar": 8, "creativity": 5, "consistency": 7, "plot": 4}
Reply = tuple[int, dict[str, str], bytes]


def completion(content: Any, status: int = 200, **headers: str) -> Reply:
    body = {"choices": [{"message": {"role": "assistant", "content": content}}]}
    return status, headers, json.dumps(body).encode()


class Server:
    """Speaks /v1/chat/completions: gives its replies one after another, the last one for ever."""

    def __init__(self, replies: list[Reply | float]) -> None:
        self.requests: list[tuple[str, dict[str, str], Any]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                server.requests.append((self.path, dict(self.headers), body))
                reply = replies[min(len(server.requests), len(replies)) - 1]
                if isinstance(reply, float):  # drips a byte at a time, each within any limit between two of them
                    self.send_response(200)
                    self.end_headers()
                    end = time.monotonic() + reply
                    while time.monotonic() < end:
                        try:
                            self.wfile.write(b" ")
                            self.wfile.flush()
                        except OSError:
                            return
                        time.sleep(0.02)
                    return
                status, headers, content = reply
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                try:
                    self.wfile.write(content)
                except OSError:
                    return  # the judge had read enough

            def do_GET(self) -> None:
                self.send_error(404)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(*replies: Reply | float) -> Server:
        servers.append(Server(list(replies)))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def judge(server: Server, waits: list[float] | None = None, **values: Any) -> Judge:
    made = Judge.from_options(server.url, "big", None)
    return Judge(made.url, "big", sleep=(waits if waits is not None else []).append, **values)


STORIES = [("Once", " there was a bear."), ("One day", " it rained.")]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_stories_are_graded_and_raw_answers_kept(serve: Callable[..., Server], tmp_path: Path) -> None:
    second = {**GOOD, "grammar": 6}
    server = serve(completion(json.dumps(GOOD)), completion(f"Let me think.\n```json\n{json.dumps(second)}\n```"))
    result = judge(server, key="secret").grade(STORIES, tmp_path / "judge.jsonl")
    assert result.grades == {"grammar": 7.0, "creativity": 5.0, "consistency": 7.0, "plot": 4.0}
    assert (result.graded, result.stories, result.model) == (2, 2, "big")
    path, headers, body = server.requests[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer secret"
    assert body["messages"][1]["content"] == "Once\n***\n there was a bear."
    assert all(aspect in body["messages"][0]["content"] for aspect in ASPECTS)
    kept = lines(tmp_path / "judge.jsonl")
    assert kept[1]["answer"].startswith("Let me think.")
    assert kept[1]["grades"]["grammar"] == 6
    assert "secret" not in (tmp_path / "judge.jsonl").read_text()


def test_a_busy_or_failing_server_is_asked_again(serve: Callable[..., Server], tmp_path: Path) -> None:
    waits: list[float] = []
    busy, broken = completion("", 429, retry_after="7"), completion("", 503)
    server = serve(busy, broken, broken, completion(json.dumps(GOOD)))
    result = judge(server, waits).grade(STORIES, tmp_path / "judge.jsonl")
    assert (waits, result.graded) == ([7.0, 2.0, 4.0], 2)
    assert [line["attempts"] for line in lines(tmp_path / "judge.jsonl")] == [4, 1]


def test_an_answer_without_marks_is_asked_for_once_more(serve: Callable[..., Server], tmp_path: Path) -> None:
    bad = [completion("A lovely story!"), completion(json.dumps({**GOOD, "plot": 11}))]
    server = serve(*bad, completion(json.dumps(GOOD)))
    result = judge(server).grade(STORIES, tmp_path / "judge.jsonl")
    assert (result.graded, len(server.requests)) == (1, 3)
    kept = lines(tmp_path / "judge.jsonl")
    assert kept[0]["answer"] == "A lovely story!"
    assert [line["story"] for line in kept] == [0, 0, 1]
    assert "plot" in kept[1]["error"]


@pytest.mark.parametrize(
    "reply",
    [
        completion(None),
        (200, {}, b"<html>Welcome</html>"),
        (200, {}, b'{"choices": []}'),
        (200, {}, b'{"choices": "x"}'),
        (200, {}, b"[" * 100_000),
        (200, {}, b"x" * (2**20 + 1)),
        completion("{" * 20_000),
        completion('{"grammar": 1, ' * 4_000),
        completion("x" * 60_000),
        (500, {}, b"\xff\xfe broken"),
        (302, {"location": "http://127.0.0.1:9/"}, b""),
    ],
)
def test_a_server_that_gives_no_marks_is_told_in_one_line(
    reply: Reply, serve: Callable[..., Server], tmp_path: Path
) -> None:
    server = serve(reply)
    with pytest.raises(UserError, match=r"^--judge http://127.0.0.1:\d+/v1/chat/completions: ") as error:
        judge(server).grade(STORIES, tmp_path / "judge.jsonl")
    assert "\n" not in str(error.value)
    assert lines(tmp_path / "judge.jsonl")


def test_an_answer_that_drips_ends_at_the_time_limit(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve(30.0, completion(json.dumps(GOOD)))
    result = judge(server, timeout=0.3).grade(STORIES, tmp_path / "judge.jsonl")
    assert result.graded == 2
    assert lines(tmp_path / "judge.jsonl")[0]["attempts"] == 2


def test_a_wrong_key_ends_it_at_once(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve((401, {}, b'{"error": {"message": "no such\\nkey", "code": 7}}'))
    with pytest.raises(UserError, match=r"completions: HTTP 401: no such key$"):
        judge(server).grade(STORIES, tmp_path / "judge.jsonl")
    assert len(server.requests) == 1


def test_a_server_that_is_not_there_is_noticed_before_the_work(serve: Callable[..., Server]) -> None:
    server = serve(completion(""))
    judge(server).check_reachable()  # it knows no /models, but it is there
    with pytest.raises(UserError, match="does not answer"):
        Judge.from_options("http://127.0.0.1:9", "big", None).check_reachable()


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://h:1", "http://h:1/v1/chat/completions"),
        ("http://h:1/", "http://h:1/v1/chat/completions"),
        ("http://h/v1", "http://h/v1/chat/completions"),
        ("https://h/api/v1/", "https://h/api/v1/chat/completions"),
        ("https://h/v1/chat/completions", "https://h/v1/chat/completions"),
    ],
)
def test_addresses_as_people_write_them(url: str, expected: str) -> None:
    assert Judge.from_options(url, "m", None).url == expected


@pytest.mark.parametrize(
    "url", ["localhost:11434", "ftp://h", "http://", "http://h:99999", "http://k:pw@h", "http://h/?key=1"]
)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(UserError, match=r"^--judge"):
        Judge.from_options(url, "m", None)


def test_a_key_variable_that_is_not_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(UserError, match="JUDGE_KEY"):
        Judge.from_options("http://h", "m", "JUDGE_KEY")
    monkeypatch.setenv("JUDGE_KEY", "secret")
    made = Judge.from_options("http://h", "m", "JUDGE_KEY")
    assert made.key == "secret"
    assert "secret" not in repr(made)


@pytest.mark.parametrize("mark", [0, 11, 7.5, "7", True, None, float("nan"), float("inf"), [7]])
def test_a_mark_is_a_whole_number_from_1_to_10(mark: Any) -> None:
    with pytest.raises(ValueError, match="plot"):
        parse_grades(json.dumps({**GOOD, "plot": mark}))
    assert parse_grades(json.dumps({**GOOD, "plot": 7.0}))["plot"] == 7
