"""The exact commands to serve a run with other engines, and the checks that an engine supports it."""

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tiny_lm.console import shell_command
from tiny_lm.errors import UserError
from tiny_lm.export.gguf import check_model, file_name
from tiny_lm.export.gguf_file import BLOCKS
from tiny_lm.export.gguf_vocabulary import to_gguf_vocabulary
from tiny_lm.export.source import ExportSource
from tiny_lm.export.verify import REPORT_FILE
from tiny_lm.model import ModelConfig
from tiny_lm.reading import read_json

PORTS: Mapping[str, int] = {"vllm": 8000, "tgi": 8080, "llamacpp": 8080, "ollama": 11434}
"""Default port of each engine."""

VLLM_HEAD_SIZES = (32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256)
"""Supported by vLLM 0.32 both on a CPU, where 16, 40 and 72 failed when tried, and by FlashAttention on a GPU."""

TGI_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 192, 256)
"""Supported by the paged attention that TGI decodes with."""

TGI_IMAGE = "ghcr.io/huggingface/text-generation-inference:3.3.5"

_MODEL_NAME = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True)
class ServeCommands:
    """Shell commands that serve a run.

    Attributes:
        export: command that writes ``served``.
        served: the file or folder that the engine loads.
        commands: the engine's own, in order.
        environment: environment variables of each command.
        exported: whether ``served`` already exists, from this checkpoint.
    """

    export: list[str]
    served: Path
    commands: list[list[str]]
    environment: Mapping[str, str] = field(default_factory=dict)
    exported: bool = False

    def lines(self) -> list[str]:
        """Return POSIX shell commands: the export, unless it exists, then the engine's commands."""
        variables = "".join(f"{name}={shlex.quote(value)} " for name, value in self.environment.items())
        export = [] if self.exported else [shell_command(*self.export)]
        return export + [variables + shell_command(*words) for words in self.commands]


@dataclass(frozen=True)
class ServeOptions:
    """The user's choices.

    Attributes:
        port: port on 127.0.0.1; None: the engine's default.
        folder: the export; None: one under ``exports/`` with the run's name.
        dtype: compute dtype; None: float32 on a CPU, half precision on a GPU.
        gpu: whether the engine runs on a GPU.
        kind: GGUF type.
    """

    port: int | None = None
    folder: Path | None = None
    dtype: str | None = None
    gpu: bool = False
    kind: str = "F16"


def serve_commands(engine: str, source: ExportSource, run: str, options: ServeOptions) -> ServeCommands:
    """Return the commands that serve a run with an engine.

    Args:
        engine: a key of ``PORTS``.
        source: what is served.
        run: the run as the user named it.
        options: the user's choices.

    Raises:
        UserError: the engine is unknown or does not support this model.
    """
    makers = {"vllm": _vllm, "tgi": _tgi, "llamacpp": _llamacpp, "ollama": _ollama}
    if engine not in makers:
        raise UserError(f"unknown engine {engine}; choose from: {', '.join(makers)}")
    return makers[engine](source, run, options)


def model_name(source: ExportSource) -> str:
    """Return the run's name in a form that every engine accepts: letters, digits, dots, dashes and underscores."""
    return _MODEL_NAME.sub("-", source.name).strip("-.") or "model"


def _vllm(source: ExportSource, run: str, options: ServeOptions) -> ServeCommands:
    folder, export, exported = _huggingface(source, run, options)
    command, environment = vllm_command(
        "python", folder, source.config, name=model_name(source), gpu=options.gpu, dtype=options.dtype
    )
    return ServeCommands(export, folder, [command + _address("vllm", options)], environment, exported)


def vllm_command(
    python: str, folder: Path, config: ModelConfig, *, name: str, gpu: bool, dtype: str | None = None
) -> tuple[list[str], dict[str, str]]:
    """Return the command of vLLM's server without its address, and its environment variables.

    Args:
        python: the interpreter that has vLLM.
        folder: the model in Hugging Face layout.
        config: its config.
        name: the model's name for clients.
        gpu: whether vLLM runs on a GPU.
        dtype: compute dtype; default: bfloat16 on a GPU, whose FlashAttention has no float32, else float32.

    Raises:
        UserError: vLLM does not support this head size.
    """
    check_head_size(config, "vLLM", VLLM_HEAD_SIZES)
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--served-model-name", name, "--dtype", dtype or ("bfloat16" if gpu else "float32")]
    command += ["--max-model-len", str(config.context_length)]
    environment = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    if not gpu:
        command.append("--enforce-eager")
        environment["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB
    return command, environment


def _tgi(source: ExportSource, run: str, options: ServeOptions) -> ServeCommands:
    config = source.config
    if config.architecture == "qwen3":
        raise UserError(
            "text-generation-inference does not support Qwen3; serve this run with vLLM (tiny-lm serve-config vllm)"
        )
    check_head_size(config, "text-generation-inference", TGI_HEAD_SIZES)
    dtype = options.dtype or "float16"
    if dtype == "float32":
        raise UserError("text-generation-inference supports float16 and bfloat16 only; for float32 use vLLM")
    folder, export, exported = _huggingface(source, run, options)
    port = _port("tgi", options)
    command = ["docker", "run", "--gpus", "all", "--shm-size", "1g", "-p", f"127.0.0.1:{port}:80"]
    command += ["-v", f"{folder.resolve()}:/data/model", TGI_IMAGE, "--model-id", "/data/model", "--dtype", dtype]
    command += ["--max-input-tokens", str(config.context_length - 1), "--max-total-tokens", str(config.context_length)]
    return ServeCommands(export, folder, [command], exported=exported)


LLAMACPP_SLOTS = 8
"""Sequences that llama-server runs in parallel, each with the full context."""


def _llamacpp(source: ExportSource, run: str, options: ServeOptions) -> ServeCommands:
    _check_gguf(source)
    folder = options.folder or _exports(source, "-gguf")
    file = folder / file_name(source, options.kind)
    export = ["tiny-lm", "export", "gguf", run, "--output-dir", str(folder), *_gguf_type(options.kind)]
    cells = LLAMACPP_SLOTS * source.config.context_length  # divided by llama-server between its slots
    command = ["llama-server", "-m", str(file), "-np", str(LLAMACPP_SLOTS), "-c", str(cells)]
    command += _address("llamacpp", options)
    return ServeCommands(export, file, [command], exported=file.is_file() and is_export_of(folder, source))


def _ollama(source: ExportSource, run: str, options: ServeOptions) -> ServeCommands:
    _check_gguf(source)
    folder = options.folder or _exports(source, "-ollama")
    name, file = model_name(source).lower(), folder / "Modelfile"
    export = ["tiny-lm", "export", "ollama", run, "--output-dir", str(folder), "--name", name]
    export += _gguf_type(options.kind)
    commands = [["ollama", "create", name, "-f", str(file)], ["ollama", "run", name]]
    port = _port("ollama", options)
    environment = {} if port == PORTS["ollama"] else {"OLLAMA_HOST": f"127.0.0.1:{port}"}
    return ServeCommands(export, file, commands, environment, file.is_file() and is_export_of(folder, source))


def _huggingface(source: ExportSource, run: str, options: ServeOptions) -> tuple[Path, list[str], bool]:
    """Return the folder, the command that writes it, and whether it exists."""
    folder = options.folder or _exports(source)
    export = ["tiny-lm", "export", "huggingface", run, "--output-dir", str(folder)]
    return folder, export, (folder / "config.json").is_file() and is_export_of(folder, source)


def _exports(source: ExportSource, ending: str = "") -> Path:
    return Path("exports") / f"{model_name(source)}{ending}"


def _gguf_type(kind: str) -> list[str]:
    return ["--outtype", kind.lower()] if kind in BLOCKS else ["--quantize", kind]


def _port(engine: str, options: ServeOptions) -> int:
    return PORTS[engine] if options.port is None else options.port


def _address(engine: str, options: ServeOptions) -> list[str]:
    return ["--host", "127.0.0.1", "--port", str(_port(engine, options))]


def check_head_size(config: ModelConfig, engine: str, sizes: tuple[int, ...]) -> None:
    """Raise UserError, with the nearest supported size, if an engine's attention lacks the model's head size."""
    if config.head_size not in sizes:
        larger = next((size for size in sizes if size > config.head_size), sizes[-1])
        raise UserError(
            f"{engine} does not support the head size {config.head_size} (only {', '.join(map(str, sizes))}): train "
            f"with a head size of {larger} (fewer n_heads, or a larger d_model), or serve this run with llama.cpp "
            "(tiny-lm serve-config llamacpp)"
        )


def _check_gguf(source: ExportSource) -> None:
    to_gguf_vocabulary(source.tokenizer, source.config.vocab_size)
    check_model(source.config)


def is_export_of(folder: Path, source: ExportSource) -> bool:
    """Return whether a folder has a verified export of exactly this checkpoint."""
    if not (folder / REPORT_FILE).is_file():
        return False
    report = read_json(folder / REPORT_FILE)
    if not isinstance(report, dict):
        return False
    found = [report.get(key) for key in ("source", "step", "tokenizer_hash", "passed")]
    return found == [source.name, source.step, source.tokenizer.hash, True]
