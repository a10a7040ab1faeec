"""The command that prints how to serve a run with another engine."""

from pathlib import Path
from typing import Annotated

import typer

from tiny_lm.console import print_message, print_result
from tiny_lm.errors import UserError


def serve_config(
    engine: Annotated[str, typer.Argument(metavar="vllm|tgi|llamacpp|ollama", help="The engine.")],
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder, or a checkpoint inside one.")],
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Default: the engine's.")] = None,
    export_dir: Annotated[Path | None, typer.Option(help="Folder of the export; default: exports/NAME.")] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="float32|float16|bfloat16", help="Data type of vLLM and TGI.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(metavar="cpu|cuda", help="Device of vLLM; default: the one of this machine.")
    ] = None,
    outtype: Annotated[
        str, typer.Option(metavar="TYPE", help="Type of the GGUF file for llama.cpp and Ollama, such as Q8_0.")
    ] = "f16",
) -> None:
    """Print the commands that export a run and serve it with another engine."""
    from tiny_lm.export.gguf import check_kinds
    from tiny_lm.export.huggingface import check_dtype
    from tiny_lm.export.serve_config import ServeOptions, serve_commands
    from tiny_lm.export.source import load_source
    from tiny_lm.hardware.device import choose_device

    if device not in (None, "cpu", "cuda"):
        raise UserError(f"--device {device}: unknown; choose cpu or cuda")
    gpu = choose_device(device).type == "cuda"
    options = ServeOptions(port, export_dir, dtype and check_dtype(dtype), gpu, check_kinds([outtype])[0])
    commands = serve_commands(engine, load_source(run), run, options)
    for line in commands.lines():
        print_result(line)
    if commands.exported:
        print_message(f"{commands.served} is this checkpoint's export, and was verified")
