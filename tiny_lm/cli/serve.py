"""The command that serves models over HTTP."""

import os
from typing import Annotated

import typer

from tiny_lm.console import print_message
from tiny_lm.errors import UserError

_KEY_VARIABLE = "TINY_LM_API_KEY"


def serve(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...",
            help="Runs, checkpoints, exported folders, or folders of these; NAME=RUN gives a model another name.",
        ),
    ],
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(help=f"What clients must send as their API key; or set {_KEY_VARIABLE}.")
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A name of this server, besides localhost; * for any."),
    ] = None,
    slots: Annotated[int, typer.Option(help="Texts of a model that are told at once.")] = 32,
    queue: Annotated[int, typer.Option(help="Texts of a model that wait; further ones are refused.")] = 256,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of a text, whatever a request asks for.")] = 4096,
    timeout: Annotated[float, typer.Option(help="Most seconds of a request.")] = 300.0,
    grace: Annotated[
        float, typer.Option(min=0, max=86_400, help="Seconds that running stories have to end when the server stops.")
    ] = 30.0,
    device: Annotated[str | None, typer.Option(help="Where to run: cpu, cuda, mps.")] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            metavar="llamacpp|vllm|transformers", help="Serve one model with this program's own server instead of ours."
        ),
    ] = None,
    engine_python: Annotated[
        str | None, typer.Option(metavar="FILE", help="Interpreter of the environment that has the engine.")
    ] = None,
) -> None:
    """Serve models by the APIs of OpenAI and Ollama."""
    if engine is not None:
        _serve_with(engine, runs, host, port, engine_python)
    try:
        from tiny_lm.serving import server
        from tiny_lm.serving.app import create_app
    except ImportError as error:
        raise UserError(
            f"the server needs {error.name or 'a library'}, which is not installed: pip install 'tiny-lm[serve]'"
        ) from None
    from tiny_lm.serving.limits import Limits
    from tiny_lm.serving.middleware import Gate, hosts_of
    from tiny_lm.serving.models import check_memory, find_models, load_model

    limits = Limits(max_tokens=max_tokens, seconds=timeout, slots=slots, queue=queue)
    key = os.environ.get(_KEY_VARIABLE) if api_key is None else api_key
    if key is not None and not key.strip():
        raise UserError("the API key is empty: give one, or leave --api-key and " + _KEY_VARIABLE + " out")
    found = find_models(runs)
    with server.listen(host, port) as listening:
        models = [load_model(name, path, limits, device=device) for name, path in found.items()]
        taken = check_memory(models, limits)
        gate = Gate()
        app = create_app(
            models, limits=limits, key=key and key.strip(), hosts=hosts_of(host, allow_host or ()), gate=gate
        )
        url = server.url_of(listening)
        print(url, flush=True)
        _tell(f"{slots} texts of each model at once; their keys and values take {taken / 2**20:,.0f} MiB in all")
        _tell(f"serving {', '.join(found)}; OpenAI's API is below {url}/v1, Ollama's below {url}/api; Ctrl-C stops")

        def end_stories() -> None:
            for model in models:
                model.loop.stop(grace=0)

        server.run(
            app, listening, gate, head_seconds=limits.arrival_seconds, grace=grace, end_stories=end_stories, tell=_tell
        )


def _serve_with(engine: str, runs: list[str], host: str, port: int, python: str | None) -> None:
    from tiny_lm.serving.engines import run_engine

    if len(runs) != 1:
        raise UserError(f"--engine {engine}: serves one model, not {len(runs)}")
    raise typer.Exit(run_engine(engine, runs[0], host, port, python=python, tell=_tell))


def _tell(line: str) -> None:
    print_message(line)
