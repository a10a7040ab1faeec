"""``--engine``: other programs that serve a model, started and stopped with us."""

import json
import os
import signal
import socket
import stat
import sys
import time
import venv
from pathlib import Path

import httpx
import jinja2
import pytest
from engine_process import engine_process
from llama_server import LLAMA_SERVER, ROOT
from tiny_exports import TrainedRun, train_run

from tiny_lm.errors import UserError
from tiny_lm.export.gguf_file import write_gguf
from tiny_lm.export.gguf_vocabulary import to_gguf_vocabulary
from tiny_lm.export.source import ExportSource, load_source
from tiny_lm.export.verify import PROMPTS, OwnEngine, split_documents
from tiny_lm.files import write_json
from tiny_lm.model import model_config_from_dict
from tiny_lm.model.huggingface import to_huggingface_config
from tiny_lm.runs import Run
from tiny_lm.serving.engines import STORY_TEMPLATE, EngineAddress, run_engine, vllm
from tiny_lm.tokenizer import Tokenizer

CHAT = [
    {"role": "system", "content": "You are a pirate."},
    {"role": "user", "content": "Once upon a time"},
    {"role": "assistant", "content": ", there was a bear.\n"},
    {"role": "user", "content": "The bear"},
    {"role": "user", "content": "was happy."},
]
CHAT_AS_STORY = "Once upon a time , there was a bear.\nThe bear was happy."


def write(source: ExportSource, file: Path) -> Path:
    write_gguf(source, to_gguf_vocabulary(source.tokenizer, source.config.vocab_size), file, "F32")
    return file


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, stories: list[str], tokenizer: Tokenizer) -> Run:
    """A model that has learned enough to be sure of its words, which greedy text needs to be the same everywhere."""
    return train_run("llama3", 0, tokenizer, stories, tmp_path_factory.mktemp("sure"), steps=500, d_model=128)


@pytest.fixture
def source(run: Run) -> ExportSource:
    return load_source(run.folder)


@pytest.fixture
def gguf(trained_run: TrainedRun, tmp_path: Path) -> Path:
    return write(load_source(trained_run().folder), tmp_path / "bear.gguf")


def test_a_chat_is_the_beginning_of_a_story() -> None:
    template = jinja2.Template(STORY_TEMPLATE)
    assert template.render(messages=CHAT, bos_token="<bos>") == f"<bos>{CHAT_AS_STORY}"
    assert template.render(messages=[], bos_token="<bos>") == "<bos>"


# --- what is missing -------------------------------------------------------------------------------------------------


def test_an_unknown_engine() -> None:
    with pytest.raises(UserError, match="--engine tgi: unknown; choose one of: llamacpp, vllm, transformers"):
        run_engine("tgi", "runs/x", port=0)


@pytest.mark.parametrize(
    ("engine", "line"),
    [
        (
            "llamacpp",
            r"llama_cpp is not installed in .*: pip install 'tiny-lm\[llamacpp\]', or put llama.cpp's llama-s",
        ),
        ("vllm", r"vllm is not installed in .*: it needs its own environment: python -m venv"),
        ("transformers", r"transformers.cli.serve is not installed in .*: pip install 'transformers\[serving\]>=5'"),
    ],
)
def test_an_engine_that_is_not_installed(
    engine: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    venv.create(tmp_path / "bare", with_pip=False)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    with pytest.raises(UserError, match=f"--engine {engine}: {line}"):
        run_engine(engine, "runs/x", port=0, python=str(tmp_path / "bare" / "bin" / "python"))
    with pytest.raises(UserError, match=r"--engine-python .*/gone: does not run"):
        run_engine(engine, "runs/x", port=0, python=str(tmp_path / "gone"))


@pytest.mark.parametrize(("d_model", "refused"), [(32, True), (64, False)])
def test_vllm_refuses_heads_that_it_cannot_run(d_model: int, refused: bool, tmp_path: Path) -> None:
    config = model_config_from_dict(
        {
            "architecture": "llama3",
            "vocab_size": 96,
            "context_length": 48,
            "d_model": d_model,
            "n_layers": 1,
            "n_heads": 2,
        },
        source="test",
    )
    write_json(tmp_path / "config.json", to_huggingface_config(config, bos_id=1, eos_id=2, pad_id=0))
    if refused:
        with pytest.raises(UserError, match="vLLM does not support the head size 16"):
            vllm(tmp_path, EngineAddress("127.0.0.1", 8000, "python"))
    else:
        assert "--max-model-len 48" in " ".join(vllm(tmp_path, EngineAddress("127.0.0.1", 8000, "python")).words)


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=rf"127\.0\.0\.1:{port}: cannot listen there .* choose another --port"):
            run_engine("llamacpp", "runs/x", port=port)


# --- a program that stands in for llama-server: starting and stopping are tested here --------------------------------

STAND_IN = """#!{python}
import http.server, json, signal, sys, time
words = sys.argv[1:]
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        ready = time.monotonic() > begun + 0.5
        self.send_response(200 if ready else 503)
        self.end_headers()
        self.wfile.write(json.dumps(words).encode())
def stop(*_):
    print("stand-in: told to stop", flush=True)
    sys.exit({code})
signal.signal(signal.SIGTERM, stop)
begun = time.monotonic()
print("stand-in: begun", flush=True)
host, port = (words[words.index(name) + 1] for name in ("--host", "--port"))
http.server.HTTPServer((host, int(port)), Handler).serve_forever()
"""


def put_on_path(folder: Path, script: str) -> str:
    folder.mkdir()
    program = folder / "llama-server"
    program.write_text(script)
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return f"{folder}:/usr/bin:/bin"


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_engine_is_stopped_with_us(how: signal.Signals, gguf: Path, tmp_path: Path) -> None:
    path = put_on_path(tmp_path / "bin", STAND_IN.format(python=sys.executable, code=0))
    with engine_process("llamacpp", gguf, tmp_path, PATH=path) as engine:
        url = engine.wait_for("/v1 serves bear (llamacpp); Ctrl-C stops", 60).split("/v1")[0]
        words = httpx.get(f"{url}/health", trust_env=False).json()
        assert words[: words.index("--host")] == ["-m", str(gguf), "--alias", "bear"]
        assert words[words.index("--host") + 1] == "127.0.0.1"
        assert words[words.index("-c") + 1] == str(8 * 96)  # each of its 8 slots has the trained context
        assert engine.stop(how) == 0
        assert "stand-in: told to stop" in engine.log.read_text()
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{url}/health", trust_env=False)
    assert list((tmp_path / "tmp").iterdir()) == []


STUBBORN = STAND_IN.replace(
    "    sys.exit({code})\n", "    print('stand-in: goes on', os.getpid(), flush=True)\n"
).replace("import http.server", "import os, http.server")


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGHUP])
def test_a_second_signal_ends_an_engine_that_does_not_stop(how: signal.Signals, gguf: Path, tmp_path: Path) -> None:
    """A terminal that closes sends SIGHUP twice; no engine may stay behind."""
    path = put_on_path(tmp_path / "bin", STUBBORN.format(python=sys.executable, code=0))
    with engine_process("llamacpp", gguf, tmp_path, PATH=path) as engine:
        url = engine.wait_for("/v1 serves bear (llamacpp); Ctrl-C stops", 60).split("/v1")[0]
        engine.process.send_signal(how)
        engine.wait_for("stand-in: goes on", 60)
        assert engine.stop(how) == 0
        assert "Traceback" not in engine.log.read_text()
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{url}/health", trust_env=False)
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent died")
def test_an_engine_does_not_outlive_a_killed_command(gguf: Path, tmp_path: Path) -> None:
    path = put_on_path(tmp_path / "bin", STAND_IN.format(python=sys.executable, code=0))
    with engine_process("llamacpp", gguf, tmp_path, PATH=path) as engine:
        engine.wait_for("/v1 serves bear (llamacpp)", 60)
        assert engine.stop(signal.SIGKILL) == -signal.SIGKILL
        deadline = time.monotonic() + 60
        while "stand-in: told to stop" not in engine.log.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_what_a_killed_engine_command_leaves_is_removed_by_the_next(gguf: Path, tmp_path: Path) -> None:
    path = put_on_path(tmp_path / "bin", STUBBORN.format(python=sys.executable, code=0))
    with engine_process("llamacpp", gguf, tmp_path, PATH=path) as engine:
        engine.wait_for("/v1 serves bear (llamacpp)", 60)
        engine.process.send_signal(signal.SIGTERM)
        number = int(engine.wait_for("stand-in: goes on", 60).rpartition(" ")[2])
        assert engine.stop(signal.SIGKILL) == -signal.SIGKILL
        os.kill(number, signal.SIGKILL)
    [left] = (tmp_path / "tmp").iterdir()
    path = put_on_path(tmp_path / "bin2", "#!/bin/sh\nexit 7\n")
    (tmp_path / "next").mkdir()
    with engine_process("llamacpp", gguf, tmp_path / "next", PATH=path, TMPDIR=str(left.parent)) as engine:
        assert engine.process.wait(timeout=60) == 2
    assert list(left.parent.iterdir()) == []


def test_an_engine_that_ends_by_itself(gguf: Path, tmp_path: Path) -> None:
    path = put_on_path(tmp_path / "bin", "#!/bin/sh\necho 'out of memory' >&2\nexit 7\n")
    with engine_process("llamacpp", gguf, tmp_path, PATH=path) as engine:
        assert engine.process.wait(timeout=60) == 2
        assert "error: --engine llamacpp: exited with code 7 while starting" in engine.log.read_text()


def test_files_that_cannot_be_served(gguf: Path, tmp_path: Path) -> None:
    path = put_on_path(tmp_path / "bin", "#!/bin/sh\nexit 7\n")
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"not GGUF at all, and long enough for its header")
    with engine_process("llamacpp", tmp_path, tmp_path / "bin", PATH=path) as engine:
        assert engine.process.wait(timeout=60) == 2
        assert "contains several GGUF files; choose one: bear.gguf, broken.gguf" in engine.log.read_text()
    with engine_process("llamacpp", broken, tmp_path, PATH=path) as engine:
        assert engine.process.wait(timeout=60) == 2
        assert "broken.gguf: is not a GGUF file of a language model" in engine.log.read_text()


# --- the real ones ---------------------------------------------------------------------------------------------------


def ask(url: str, path: str, **body: object) -> dict[str, object]:
    answer = httpx.post(f"{url}{path}", json=body, timeout=120, trust_env=False)
    assert answer.status_code == 200, answer.text
    return json.loads(answer.text)["choices"][0]


def sure_words(source: ExportSource, prompt: str) -> tuple[int, str]:
    """Return how many tokens our model is sure of after a prompt, and these in words.

    These engines keep keys and values in half precision, which decides where two tokens are as likely.
    """
    own, begin = OwnEngine(source), source.tokenizer.encode(prompt, bos=True)
    ids = own.greedy(begin, 24)
    rows = own.log_probabilities([*begin, *ids])[len(begin) - 1 : -1]
    best = rows.topk(2, dim=1).values
    unsure = ((best[:, 0] - best[:, 1]) < 0.3).tolist()
    count = [*unsure, True].index(True)
    return count, source.tokenizer.decode(ids[:count])


def check_answers(url: str, name: str, source: ExportSource) -> None:
    """Compare completions and chats with our greedy text, as far as our model is sure of it."""
    compared = 0
    for prompt in [*PROMPTS, *(source.tokenizer.decode(ids[:20]) for ids in split_documents(source)[:30])]:
        count, words = sure_words(source, prompt)
        if count:
            asked = {"model": name, "temperature": 0, "max_tokens": count}
            assert ask(url, "/v1/completions", prompt=prompt, **asked)["text"] == words
            chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": prompt}]
            message = ask(url, "/v1/chat/completions", messages=chat, **asked)["message"]
            assert isinstance(message, dict)
            assert message["content"].strip() == words.strip()
            compared += count
    assert compared >= 8


@pytest.mark.llama_server
def test_llama_server_serves_a_run(run: Run, source: ExportSource, tmp_path: Path) -> None:
    if not LLAMA_SERVER.is_file():
        pytest.fail(f"{LLAMA_SERVER} is not built: make test-llama-server")
    with engine_process("llamacpp", run.folder, tmp_path, PATH=f"{LLAMA_SERVER.parent}:/usr/bin:/bin") as engine:
        url = engine.wait_for("/v1 serves llama3-BPE-F16 (llamacpp)", 120).split("/v1")[0]
        check_answers(url, "llama3-BPE-F16", source)
        applied = httpx.post(f"{url}/apply-template", json={"messages": CHAT}, trust_env=False).json()
        assert applied["prompt"].removeprefix("<bos>") == CHAT_AS_STORY
        foreign = httpx.get(f"{url}/v1/models", headers={"Origin": "http://example.com"}, trust_env=False)
        assert foreign.headers.get("access-control-allow-origin") not in ("*", "http://example.com")
        assert engine.stop(signal.SIGINT) == 0
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.llama_server
def test_llama_cpp_python_serves_a_file(source: ExportSource, tmp_path: Path) -> None:
    with engine_process("llamacpp", write(source, tmp_path / "bear.gguf"), tmp_path, PATH="/usr/bin:/bin") as engine:
        url = engine.wait_for("/v1 serves bear (llamacpp)", 120).split("/v1")[0]
        check_answers(url, "bear", source)
        assert engine.stop(signal.SIGTERM) == 0


@pytest.mark.llama_server
def test_transformers_serves_a_run(run: Run, source: ExportSource, tmp_path: Path) -> None:
    with engine_process("transformers", run.folder, tmp_path, HF_HOME=str(tmp_path)) as engine:
        words = engine.wait_for("/v1 serves ", 120).removesuffix(" (transformers); Ctrl-C stops")
        url, _, name = words.partition("/v1 serves ")
        check_answers(url, name, source)
        assert engine.stop(signal.SIGINT) == 0


@pytest.mark.vllm
def test_vllm_serves_a_run(run: Run, source: ExportSource, tmp_path: Path) -> None:
    python = Path(os.environ.get("VLLM_ENVIRONMENT", ROOT / ".venv-vllm")) / "bin" / "python"
    with engine_process("vllm", run.folder, tmp_path, python=str(python)) as engine:
        url = engine.wait_for("/v1 serves llama3-BPE (vllm)", 600).split("/v1")[0]
        check_answers(url, "llama3-BPE", source)
        assert engine.stop(signal.SIGINT) == 0
