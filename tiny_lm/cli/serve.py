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
            help="Runs, checkpoints, exported folders, or folders of these; NAME=RUN renames a model.",
        ),
    ],
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 admits other machines.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0 chooses a free one.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(help=f"API key that clients must send; or set {_KEY_VARIABLE}.")
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Host name of this server besides localhost; * for any."),
    ] = None,
    slots: Annotated[int, typer.Option(help="Maximum running sequences of a model.")] = 32,
    queue: Annotated[int, typer.Option(help="Maximum waiting sequences; further requests are refused.")] = 256,
    max_tokens: Annotated[int, typer.Option(help="Maximum tokens of a completion, whatever the request.")] = 4096,
    timeout: Annotated[float, typer.Option(help="Maximum seconds of a request.")] = 300.0,
    grace: Annotated[
        float, typer.Option(min=0, max=86_400, help="Seconds for active requests to finish when the server stops.")
    ] = 30.0,
    device: Annotated[str | None, typer.Option(help="Device to run on: cpu, cuda, mps.")] = None,
    engine: Annotated[
        str | None,
        typer.Option(metavar="llamacpp|vllm|transformers", help="Serve one model with another engine's server."),
    ] = None,
    engine_python: Annotated[
        str | None, typer.Option(metavar="FILE", help="Python interpreter of the engine's environment.")
    ] = None,
) -> None:
    """Serve models with the APIs of OpenAI and Ollama."""
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
    from tiny_lm.serving.middleware import ShutdownState, hosts_of
    from tiny_lm.serving.models import check_memory, find_models, load_model

    limits = Limits(max_tokens=max_tokens, seconds=timeout, slots=slots, queue=queue)
    key = os.environ.get(_KEY_VARIABLE) if api_key is None else api_key
    if key is not None and not key.strip():
        raise UserError(f"the API key is empty: set one, or omit --api-key and {_KEY_VARIABLE}")
    found = find_models(runs)
    with server.listen(host, port) as listening:
        models = [load_model(name, path, limits, device=device) for name, path in found.items()]
        cache_bytes = check_memory(models, limits)
        shutdown = ShutdownState()
        app = create_app(
            models, limits=limits, key=key and key.strip(), hosts=hosts_of(host, allow_host or ()), shutdown=shutdown
        )
        url = server.url_of(listening)
        print(url, flush=True)
        print_message(f"{slots} slots per model; KV caches take {cache_bytes / 2**20:,.0f} MiB in all")
        print_message(f"serving {', '.join(found)}: OpenAI's API at {url}/v1, Ollama's at {url}/api; Ctrl-C stops")

        def cancel_all() -> None:
            for model in models:
                model.scheduler.stop(grace=0)

        server.run(
            app,
            listening,
            shutdown,
            header_seconds=limits.arrival_seconds,
            grace=grace,
            cancel_all=cancel_all,
            log=print_message,
        )


def _serve_with(engine: str, runs: list[str], host: str, port: int, python: str | None) -> None:
    from tiny_lm.serving.engines import run_engine

    if len(runs) != 1:
        raise UserError(f"--engine {engine}: serves one model, not {len(runs)}")
    raise typer.Exit(run_engine(engine, runs[0], host, port, python=python, log=print_message))
