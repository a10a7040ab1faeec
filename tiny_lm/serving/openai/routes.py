"""Routes of OpenAI's API: models, completions, chat."""

import asyncio
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.requests import Request as HttpRequest

from tiny_lm.inference import GenerationConfig
from tiny_lm.serving.chat import Message
from tiny_lm.serving.errors import ApiError
from tiny_lm.serving.generation import Generation, encode, encode_messages
from tiny_lm.serving.models import ServedModel
from tiny_lm.serving.openai import schema
from tiny_lm.serving.openai.responses import ChatFormatter, CompletionFormatter, Echo, ResponseFormatter
from tiny_lm.serving.registry import ModelRegistry
from tiny_lm.serving.streaming import TextStream, prepare, seconds_left, while_connected

_DEFAULT_MAX_TOKENS = 16
"""OpenAI's default for completions."""

_MIN_TOP_P = 1e-9
"""OpenAI accepts 0, which keeps only the likeliest token, as this does."""


def openai_router(registry: ModelRegistry) -> APIRouter:
    """Return the routes below ``/v1``."""
    router = APIRouter(prefix="/v1", tags=["OpenAI"])

    @router.head("/models", include_in_schema=False)
    @router.get("/models", response_model=schema.ModelList)
    async def list_models() -> Any:
        """List the served models."""
        return {"object": "list", "data": [_card(model) for model in registry.models]}

    @router.get("/models/{model}", response_model=schema.ModelCard)
    async def show_model(model: str) -> Any:
        """Show one model."""
        return _card(registry.find(model))

    @router.post("/completions", response_model=None, responses=_responses(schema.CompletionResponse))
    async def complete(body: schema.CompletionRequest, request: HttpRequest) -> Response:
        """Complete one or several prompts."""
        model = registry.find(body.model)
        given = _prompt_list(body.prompt)
        prompts = await prepare(request, registry.limits, _encode_prompts(model, given))
        max_tokens = registry.limits.cap(_DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens)
        generation = registry.submit(
            model,
            prompts,
            _config(body, max_tokens, logprobs=body.logprobs),
            seconds=seconds_left(request, registry.limits),
            n=body.n or 1,
            seed=body.seed,
            score_prompts=bool(body.echo) and body.logprobs is not None,
        )
        echoes = [
            Echo(model.generator.tokenizer.decode(ids), _num_added_tokens(model, prompt)) if body.echo else Echo()
            for prompt, ids in zip(given, prompts, strict=True)
        ]
        formatter = CompletionFormatter(model, body.n or 1, echoes, logprobs=body.logprobs is not None)
        return await _respond(body, request, generation, formatter)

    @router.post("/chat/completions", response_model=None, responses=_responses(schema.ChatCompletionResponse))
    async def chat(body: schema.ChatCompletionRequest, request: HttpRequest) -> Response:
        """Reply to messages. A model without a chat template continues their text."""
        model = registry.find(body.model)
        encoding = encode_messages(model, [_message(each) for each in body.messages])
        prompt, stop_tokens = await prepare(request, registry.limits, encoding)
        max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        has_logprobs = bool(body.top_logprobs) if body.logprobs is None else body.logprobs
        logprobs = (body.top_logprobs or 0) if has_logprobs else None
        max_tokens = registry.limits.cap(model.context_length if max_tokens is None else max_tokens)
        config = _config(body, max_tokens, logprobs=logprobs, stop_tokens=stop_tokens)
        seconds = seconds_left(request, registry.limits)
        generation = registry.submit(model, [prompt], config, seconds=seconds, n=body.n or 1, seed=body.seed)
        return await _respond(body, request, generation, ChatFormatter(model, body.n or 1, logprobs=has_logprobs))

    return router


def _responses(model: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """Document a response that is sent whole or as events."""
    event = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
    return {200: {"model": model, "content": {"text/event-stream": {"schema": event}}}}


def _card(model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "tiny-lm",
        "max_model_len": model.context_length,
    }


async def _respond(
    body: schema.SampledRequest, request: HttpRequest, generation: Generation, formatter: ResponseFormatter
) -> Response:
    """Send what is generated, as events or whole."""
    if body.stream:
        include_usage = bool(body.stream_options and body.stream_options.include_usage)
        return TextStream(formatter.events(generation, include_usage=include_usage), generation, "text/event-stream")
    results = await while_connected(request, generation, generation.results())
    if any(result.prompt_logprobs for result in results):  # large enough to block other requests
        return await asyncio.to_thread(lambda: JSONResponse(formatter.response(results, generation)))
    return JSONResponse(formatter.response(results, generation))


async def _encode_prompts(model: ServedModel, given: Sequence[str | list[int]]) -> list[list[int]]:
    """Return the ids of the prompts of a completion: texts with bos, ids as they are.

    Raises:
        ApiError: a prompt is longer than the context, or an id is not in the vocabulary.
    """
    prompts = [each if isinstance(each, list) else await encode(model, each) for each in given]
    size = model.generator.tokenizer.vocab_size
    for ids in prompts:
        if len(ids) > model.context_length:
            raise ApiError(
                400,
                f"the prompt has {len(ids):,} tokens, and this model's context {model.context_length:,}",
                param="prompt",
                code="context_length_exceeded",
            )
        if max(ids) >= size:
            raise ApiError(400, f"{max(ids)} is not a token id: the vocabulary has {size:,} tokens", param="prompt")
    return prompts


def _num_added_tokens(model: ServedModel, prompt: str | list[int]) -> int:
    """Return the number of tokens before a prompt that the client did not send."""
    return int(isinstance(prompt, str) and (model.generator.tokenizer.bos_id is not None or not prompt))


def _prompt_list(prompt: schema.Prompt | None) -> list[str | list[int]]:
    """Return the prompts one by one, whatever form they were sent in."""
    if prompt is None or isinstance(prompt, str):
        return [prompt or ""]
    ids = [each for each in prompt if isinstance(each, int)]
    return [ids] if ids else [each for each in prompt if not isinstance(each, int)]


def _message(message: schema.ChatMessage) -> Message:
    content = message.content or ""
    return Message(message.role, content if isinstance(content, str) else "".join(part.text for part in content))


def _config(
    body: schema.SampledRequest, max_tokens: int, *, logprobs: int | None, stop_tokens: tuple[str, ...] = ()
) -> GenerationConfig:
    return GenerationConfig(
        max_new_tokens=max_tokens,
        min_new_tokens=min(body.min_tokens or 0, max_tokens),
        temperature=1.0 if body.temperature is None else body.temperature,
        top_k=max(body.top_k or 0, 0),
        top_p=1.0 if body.top_p is None else max(body.top_p, _MIN_TOP_P),
        min_p=body.min_p or 0.0,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        stop=body.stop or (),
        stop_tokens=stop_tokens,
        logprobs=logprobs,
    )
