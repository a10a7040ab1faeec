"""`tiny-lm demo`: the newest run without any word, and what a user may do wrong."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from story_runs import train_story_run

from tiny_lm.runs import Run

Cli = Callable[..., Any]
SCRIPT = Path(__file__).parents[2] / "scripts" / "demo" / "gradio_app.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, stream_folder: Path) -> Path:
    """A working directory with two runs, of which `raspberry` is the newest."""
    folder = tmp_path_factory.mktemp("work")
    run = Run(train_story_run(folder / "runs" / "elderberry", stream_folder, steps=2))
    shutil.copytree(run.folder, folder / "runs" / "raspberry")
    os.utime(run.checkpoints, (1, 1))
    return folder


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    """Where the documented script serves its page, without any word but for the port; it ends as it should."""
    command = [sys.executable, SCRIPT, "--port", "0"]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().strip()
            assert re.fullmatch(r"http://127\.0\.0\.1:\d+", address), process.communicate(timeout=30)
            yield address
        finally:
            process.send_signal(signal.SIGINT)
            rest, complaints = process.communicate(timeout=30)
    assert (rest, complaints, process.returncode) == ("", "", 130)  # as a shell says it of Ctrl-C


def test_a_second_signal_ends_the_demo_quietly(folder: Path) -> None:
    """While a browser that keeps its connection open has us wait."""
    command = [sys.executable, SCRIPT, "--port", "0"]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        address = process.stdout.readline().strip()
        with (
            httpx.Client(base_url=address, trust_env=False, timeout=60) as client,
            client.stream("GET", "/gradio_api/heartbeat/abc") as beat,
        ):
            next(beat.iter_bytes())
            process.send_signal(signal.SIGINT)
            for _ in range(500):
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(signal.SIGINT)
                if process.poll() is not None:
                    break
                time.sleep(0.02)
            assert process.wait(timeout=30) == 130
        assert "Traceback" not in process.stderr.read()


def test_the_documented_script_shows_the_newest_run(address: str) -> None:
    page = httpx.get(address, trust_env=False)
    assert page.status_code == 200
    assert "raspberry" in page.text
    assert "elderberry" not in page.text


def test_only_what_the_page_needs_is_served(address: str, folder: Path) -> None:
    (folder / "secret.txt").write_text("secret")
    with httpx.Client(base_url=address, trust_env=False) as client:
        headers = client.get("/").headers
        assert "default-src 'self'" in headers["content-security-policy"]
        assert "access-control-allow-origin" not in headers
        for path in (
            "/config", "/docs", "/openapi.json", "/gradio_api/info", "/gradio_api/openapi.json", "/monitoring",
            f"/gradio_api/file={folder / 'secret.txt'}", "/gradio_api/proxy=http://127.0.0.1:1/", "/runs",
            "/login_check", "/file/x", "/assets/..%2fgradio_api/info", "/gradio_api/startup-events",
        ):  # fmt: skip
            assert client.get(path).status_code == 404, path
        assert client.post("/gradio_api/upload", files={"files": b"x"}).status_code == 404
        assert client.put("/").status_code == 404
        assert client.post("/gradio_api/queue/join", content=b" " * 70_000).status_code == 413
        assert client.post("/gradio_api/queue/join", content=iter([b"{}"])).status_code == 413  # says no length
        assert client.get("/", headers={"host": "elsewhere.example"}).status_code == 421


def test_forged_calls_and_hosts_are_refused_in_one_line(address: str) -> None:
    story = ["raspberry", "One day", 50, 0.8, 0, 0.9, 1]
    with httpx.Client(base_url=address, trust_env=False) as client:
        page = re.search(r"window.gradio_config = (.*?);</script>", client.get("/").text)
        assert page is not None
        events = json.loads(page[1])["dependencies"]
        [tell, *_] = [event["id"] for event in events if event["api_name"] == "tell"]
        call = {"fn_index": tell, "session_hash": "abc", "data": story, "trigger_id": None, "event_data": None}
        assert client.post("/gradio_api/queue/join", json=call).status_code == 200
        forged: list[dict[str, Any]] = [{"fn_index": number} for number in (99, -1, 0, "x", True, None)]
        forged += [{"session_hash": session} for session in (None, "", "a b", [1], "a" * 1000)]
        forged += [{"data": data} for data in (None, [], {}, [*story, 1], [{"path": "/etc/passwd"}] * 7)]
        for place, values in enumerate(
            (["nobody else", None], [5, None, "\ud800"], [1e308, 49, 50.5, None], [None, 0, "x"], [2.5, -1])
        ):
            forged += [{"data": [*story[:place], value, *story[place + 1 :]]} for value in values]
        forged += [{"batched": True}, {"trigger_id": "x"}]
        for change in forged:
            for path in ("/gradio_api/queue/join", "/gradio_api/run/predict"):
                response = client.post(path, content=json.dumps({**call, **change}))
                assert response.status_code == 400 and response.json()["detail"], change
        too_long = {**call, "data": ["raspberry", "a" * 2001, *story[2:]]}  # the event itself answers, in words
        assert client.post("/gradio_api/queue/join", json=too_long).status_code == 200
        for body in (b"", b"{", b"[]", b"\xff", b"[" * 50_000):
            assert client.post("/gradio_api/queue/join", content=body).status_code == 400
        assert client.get("/assets/" + "a" * 5000).status_code == 404
        port = address.rpartition(":")[2]
        for host in (f"[::1].evil.com:{port}", f"user@localhost:{port}", "localhost", f"localhost:{port}@evil.com", ""):
            assert client.get("/", headers={"host": host}).status_code == 421
        assert client.get("/", headers={"host": f"LOCALHOST:{port}"}).status_code == 200
        assert (
            client.post("/gradio_api/queue/join", json=call, headers={"origin": "http://evil.com"}).status_code == 403
        )


def test_without_a_run_it_says_what_to_do(cli: Cli, workplace: Path) -> None:
    result = cli("demo")
    assert (result.code, result.stdout) == (2, "")
    assert result.stderr == "error: no run under runs/ yet: train one, or name one: tiny-lm demo RUN\n"


def test_mistakes_end_in_one_line(cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for words, message in (
            (["runs/elderbery"], "error: runs/elderbery: no such run folder; did you mean 'runs/elderberry'?\n"),
            (["runs/elderberry", "runs/elderberry"], "error: each model can be given only once\n"),
            (["--port", port], f"error: port {port} of 127.0.0.1 is in use: "),
        ):
            result = cli("demo", *words)
            assert (result.code, result.stdout) == (2, "")
            assert result.stderr.startswith(message)
            assert result.stderr.count("\n") == 1
