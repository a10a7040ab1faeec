"""Routes of Ollama's API that its clients use to list models and to generate."""

import time
from collections.abc import AsyncIterator, Callable
from datetime import datetime, timezone
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.requests import Request as HttpRequest

from tiny_lm.files import to_json
from tiny_lm.inference import GenerationConfig
from tiny_lm.serving.chat import Message
from tiny_lm.serving.errors import describe_error
from tiny_lm.serving.generation import Generation, encode, encode_messages
from tiny_lm.serving.models import ServedModel
from tiny_lm.serving.ollama import schema
from tiny_lm.serving.registry import ModelRegistry
from tiny_lm.serving.streaming import TextStream, prepare, seconds_left, while_connected

API_VERSION = "0.12.0"
"""The version of Ollama whose API this implements; some clients refuse servers that they take for old ones."""

_MIN_TOP_P = 1e-9

FormatText = Callable[[str], dict[str, Any]]
"""Puts text into the field in which a route returns it."""


def ollama_router(registry: ModelRegistry) -> APIRouter:
    """Return the routes below ``/api``."""
    router = APIRouter(prefix="/api", tags=["Ollama"])

    @router.head("/version", include_in_schema=False)
    @router.get("/version", response_model=schema.Version)
    async def version() -> Any:
        """Return the version of Ollama whose API this implements."""
        return {"version": API_VERSION}

    @router.head("/tags", include_in_schema=False)
    @router.get("/tags", response_model=schema.ListedModels)
    async def tags() -> Any:
        """List the served models."""
        return {"models": [{**_metadata(model), "modified_at": _modified(model)} for model in registry.models]}

    @router.get("/ps", response_model=schema.RunningModelList)
    async def running() -> Any:
        """List the models in memory, which are all served ones."""
        return {"models": [_running(model) for model in registry.models]}

    @router.post("/show", response_model=schema.ModelInfo)
    async def show(body: schema.ModelRequest) -> Any:
        """Show one model."""
        return _model_info(registry.find(body.model))

    @router.post("/generate", response_model=None, responses=_responses(schema.OllamaGenerateResponse))
    async def generate(body: schema.OllamaGenerateRequest, request: HttpRequest) -> Response:
        """Complete a prompt."""
        model = registry.find(body.model)
        if not body.prompt:
            return JSONResponse({**_head(model), "response": "", "done": True, "done_reason": "load"})
        if body.raw or model.template is None:
            # A chat template writes bos itself, so a rendered prompt contains it.
            encoding = encode(model, body.prompt, bos=model.template is None)
            prompt = await prepare(request, registry.limits, encoding)
            stop_tokens: tuple[str, ...] = ()
        else:
            system = [Message("system", body.system)] if body.system else []
            rendering = encode_messages(model, [*system, Message("user", body.prompt)])
            prompt, stop_tokens = await prepare(request, registry.limits, rendering)
        return await _respond(registry, model, prompt, stop_tokens, body, request, lambda text: {"response": text})

    @router.post("/chat", response_model=None, responses=_responses(schema.OllamaChatResponse))
    async def chat(body: schema.OllamaChatRequest, request: HttpRequest) -> Response:
        """Reply to messages. A model without a chat template continues their text."""
        model = registry.find(body.model)
        if not body.messages:
            return JSONResponse({**_head(model), **_message(""), "done": True, "done_reason": "load"})
        messages = [Message(message.role, message.content or "") for message in body.messages]
        prompt, stop_tokens = await prepare(request, registry.limits, encode_messages(model, messages))
        return await _respond(registry, model, prompt, stop_tokens, body, request, _message)

    return router


def _responses(model: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """Document a response that is sent whole or in lines."""
    return {200: {"model": model, "content": {"application/x-ndjson": {"schema": {"type": "string"}}}}}


async def _respond(
    registry: ModelRegistry,
    model: ServedModel,
    prompt: list[int],
    stop_tokens: tuple[str, ...],
    body: schema.OllamaRequest,
    request: HttpRequest,
    format_text: FormatText,
) -> Response:
    """Send what is generated, in lines (Ollama's default) or whole."""
    options = body.options or schema.OllamaOptions()
    max_tokens = options.num_predict if options.num_predict >= 0 else model.context_length
    config = _config(options, registry.limits.cap(max_tokens), stop_tokens)
    seconds, seed = seconds_left(request, registry.limits), options.seed if options.seed >= 0 else None
    generation = registry.submit(model, [prompt], config, seconds=seconds, seed=seed)
    if body.stream is None or body.stream:
        return TextStream(_lines(model, generation, format_text), generation, "application/x-ndjson")
    [result] = await while_connected(request, generation, generation.results())
    return JSONResponse({**_head(model), **format_text(result.text), **_statistics(generation, result.finish_reason)})


async def _lines(model: ServedModel, generation: Generation, format_text: FormatText) -> AsyncIterator[str]:
    """Yield a line of JSON for each chunk, and one with statistics."""
    reason: str | None = None
    try:
        async for _, chunk in generation.chunks():
            reason = chunk.finish_reason or reason
            if chunk.text:
                yield _line({**_head(model), **format_text(chunk.text), "done": False})
        yield _line({**_head(model), **format_text(""), **_statistics(generation, reason)})
    except Exception as error:
        described = describe_error(error)
        yield _line({"error": described.message})
        if described.status == 500:
            raise


def _line(content: object) -> str:
    return to_json(content) + "\n"


def _config(options: schema.OllamaOptions, max_tokens: int, stop_tokens: tuple[str, ...]) -> GenerationConfig:
    return GenerationConfig(
        max_new_tokens=max_tokens,
        temperature=options.temperature,
        top_k=max(options.top_k, 0),
        top_p=max(options.top_p, _MIN_TOP_P),
        min_p=options.min_p,
        repetition_penalty=options.repeat_penalty,
        presence_penalty=options.presence_penalty,
        frequency_penalty=options.frequency_penalty,
        stop=options.stop,
        stop_tokens=stop_tokens,
    )


def _head(model: ServedModel) -> dict[str, Any]:
    return {"model": model.name, "created_at": _time(time.time())}


def _message(text: str) -> dict[str, Any]:
    return {"message": {"role": "assistant", "content": text}}


def _statistics(generation: Generation, reason: str | None) -> dict[str, Any]:
    now = time.monotonic()
    first = generation.first or now
    return {
        "done": True,
        "done_reason": reason,
        "total_duration": _nanoseconds(now - generation.started),
        "load_duration": 0,
        "prompt_eval_count": generation.prompt_tokens,
        "prompt_eval_duration": _nanoseconds(first - generation.started),
        "eval_count": generation.completion_tokens,
        "eval_duration": _nanoseconds(now - first),
    }


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat().replace("+00:00", "Z")


def _modified(model: ServedModel) -> str:
    return _time(model.created)


def _metadata(model: ServedModel) -> dict[str, Any]:
    """Return the fields of all lists; names have the tag that Ollama's clients expect."""
    name = f"{model.name}:latest"
    return {"name": name, "model": name, "size": model.bytes, "digest": model.digest, "details": _details(model)}


def _details(model: ServedModel) -> dict[str, Any]:
    return {
        "parent_model": "",
        "format": "safetensors",
        "family": model.architecture,
        "families": [model.architecture],
        "parameter_size": f"{model.parameters / 1e6:.1f}M",
        "quantization_level": "F32",
    }


def _running(model: ServedModel) -> dict[str, Any]:
    never = "9999-12-31T23:59:59Z"
    return {**_metadata(model), "expires_at": never, "size_vram": 0, "context_length": model.context_length}


def _model_info(model: ServedModel) -> dict[str, Any]:
    family = model.architecture
    return {
        "modelfile": f"FROM {model.name}",
        "parameters": "",
        "template": model.template.source if model.template else "{{ .Prompt }}",
        "details": _details(model),
        "model_info": {
            "general.architecture": family,
            "general.basename": model.name,
            "general.parameter_count": model.parameters,
            f"{family}.context_length": model.context_length,
        },
        "capabilities": ["completion"],
        "modified_at": _modified(model),
    }
