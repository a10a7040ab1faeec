"""The web application: all routes around the models that are served."""

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
from tiny_lm.serving.middleware import LOOPBACK_HOSTS, Gate, Guard
from tiny_lm.serving.models import ServedModel
from tiny_lm.serving.ollama import schema as ollama_schema
from tiny_lm.serving.ollama.routes import ollama_router
from tiny_lm.serving.openai import schema as openai_schema
from tiny_lm.serving.openai.routes import openai_router
from tiny_lm.serving.registry import ModelRegistry

_DESCRIPTION = "Stories from small language models, by the API of OpenAI and the part of Ollama's that its clients use."


def create_app(
    models: Iterable[ServedModel],
    *,
    limits: Limits | None = None,
    key: str | None = None,
    hosts: Sequence[str] = LOOPBACK_HOSTS,
    gate: Gate | None = None,
) -> FastAPI:
    """Build the application; the models' loops run as long as it does.

    Args:
        models: each with its loop, not yet started.
        limits: of every request.
        key: what clients must send as a bearer token; None: nothing.
        hosts: names under which clients may call the server; ``*`` for any.
        gate: by which the server that runs the application refuses requests when it stops.
    """
    limits, gate = limits or Limits(), gate or Gate()
    registry = ModelRegistry(models, limits)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        for model in registry.models:
            model.loop.start()
        yield
        for model in registry.models:
            await asyncio.to_thread(model.loop.stop, grace=0)
            if model.template is not None:
                await asyncio.to_thread(model.template.close)

    app = FastAPI(
        title="tiny-lm",
        version=__version__,
        description=_DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,  # FastAPI's own pages load their script from elsewhere
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
        """Tell that the server takes requests, or which models have failed."""
        failed = [model.name for model in registry.models if model.loop.failed]
        if failed:
            response.status_code = 503
            return FailedHealth(status="failed", failed=failed)
        return Health(status="ok")

    @app.get("/metrics", tags=["Server"], response_class=PlainTextResponse, dependencies=secured)
    async def metrics() -> Response:
        """Tell figures for Prometheus."""
        return Response(registry.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def root() -> PlainTextResponse:
        """Answer as Ollama does, by which its clients find out whether it runs."""
        return PlainTextResponse("Ollama is running")

    add_api_page(app)
    errors.install(app)
    app.add_middleware(
        Guard,
        gate=gate,
        metrics=registry.metrics,
        hosts=hosts,
        key=key,
        body_bytes=limits.body_bytes,
        body_seconds=limits.arrival_seconds,
    )
    return app


class Health(BaseModel):
    """A server that works."""

    status: Literal["ok"]


class FailedHealth(BaseModel):
    """A server that works but for some models."""

    status: Literal["failed"]
    failed: list[str]


def _errors(model: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """Describe the refusals that all routes of an API share."""
    told: dict[int | str, str] = {
        400: "The body is no JSON, or holds what cannot be honoured.",
        401: "The API key is missing or wrong.",
        403: "The host name or the web page is not admitted.",
        404: "There is no such model.",
        413: "The body is too large.",
        429: "Too many requests are waiting.",
        503: "The server is stopping, or the model has failed.",
        504: "The request took longer than this server allows.",
        "4XX": "The request cannot be honoured.",
    }
    return {status: {"model": model, "description": text} for status, text in told.items()}
