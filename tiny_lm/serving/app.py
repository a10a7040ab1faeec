"""The web application: the routes of all APIs."""

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Literal

from fastapi import FastAPI, Security
from fastapi.responses import PlainTextResponse, Response
from fastapi.security import HTTPBearer
from pydantic import BaseModel

from tiny_lm import __version__
from tiny_lm.serving import errors
from tiny_lm.serving.api_page import add_api_page
from tiny_lm.serving.limits import Limits
from tiny_lm.serving.middleware import LOOPBACK_HOSTS, RequestMiddleware, ShutdownState
from tiny_lm.serving.models import ServedModel
from tiny_lm.serving.ollama import schema as ollama_schema
from tiny_lm.serving.ollama.routes import ollama_router
from tiny_lm.serving.openai import schema as openai_schema
from tiny_lm.serving.openai.routes import openai_router
from tiny_lm.serving.registry import ModelRegistry

_DESCRIPTION = (
    "Text generation with small language models: OpenAI's API, and the part of Ollama's that its clients use."
)


def create_app(
    models: Iterable[ServedModel],
    *,
    limits: Limits | None = None,
    key: str | None = None,
    hosts: Sequence[str] = LOOPBACK_HOSTS,
    shutdown: ShutdownState | None = None,
) -> FastAPI:
    """Build the application, which starts and stops the schedulers of its models.

    Args:
        models: with schedulers that are not started yet.
        limits: of every request.
        key: the bearer token that clients must send; None for no authentication.
        hosts: host names under which clients may call the server; ``*`` for any.
        shutdown: its state, which the server sets; new requests are refused while it is stopping.
    """
    limits, shutdown = limits or Limits(), shutdown or ShutdownState()
    registry = ModelRegistry(models, limits)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        for model in registry.models:
            model.scheduler.start()
        yield
        for model in registry.models:
            await asyncio.to_thread(model.scheduler.stop, grace=0)
            if model.template is not None:
                await asyncio.to_thread(model.template.close)

    app = FastAPI(
        title="tiny-lm",
        version=__version__,
        description=_DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,  # FastAPI's own pages load scripts from other hosts
        redoc_url=None,
        redirect_slashes=False,
    )
    secured = [] if key is None else [Security(HTTPBearer(auto_error=False, description="the server's API key"))]
    app.include_router(openai_router(registry), dependencies=secured, responses=_errors(openai_schema.ErrorResponse))
    app.include_router(
        ollama_router(registry), dependencies=secured, responses=_errors(ollama_schema.OllamaErrorResponse)
    )

    @app.head("/health", include_in_schema=False)
    @app.get("/health", tags=["Server"], responses={503: {"model": FailedHealth, "description": "A model has failed."}})
    async def health(response: Response) -> Health | FailedHealth:
        """Return whether the server accepts requests, and which models have failed."""
        failed = [model.name for model in registry.models if model.scheduler.failed]
        if failed:
            response.status_code = 503
            return FailedHealth(status="failed", failed=failed)
        return Health(status="ok")

    @app.get("/metrics", tags=["Server"], response_class=PlainTextResponse, dependencies=secured)
    async def metrics() -> Response:
        """Return metrics for Prometheus."""
        return Response(registry.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def root() -> PlainTextResponse:
        """Respond as Ollama does; its clients check this to see whether it runs."""
        return PlainTextResponse("Ollama is running")

    add_api_page(app)
    errors.install_error_handlers(app)
    app.add_middleware(
        RequestMiddleware,
        shutdown=shutdown,
        metrics=registry.metrics,
        hosts=hosts,
        key=key,
        body_bytes=limits.body_bytes,
        body_seconds=limits.arrival_seconds,
    )
    return app


class Health(BaseModel):
    """Health of a server whose models all work."""

    status: Literal["ok"]


class FailedHealth(BaseModel):
    """Health of a server of which some models have failed."""

    status: Literal["failed"]
    failed: list[str]


def _errors(model: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """Document the errors that all routes of an API share."""
    descriptions: dict[int | str, str] = {
        400: "The body is not valid JSON, or a field is invalid or not supported.",
        401: "The API key is missing or wrong.",
        403: "The host name or the web page is not allowed.",
        404: "The model does not exist.",
        413: "The body is too large.",
        429: "Too many requests are waiting.",
        503: "The server is stopping, or the model has failed.",
        504: "The request took longer than this server allows.",
        "4XX": "The request is invalid.",
    }
    return {status: {"model": model, "description": text} for status, text in descriptions.items()}
