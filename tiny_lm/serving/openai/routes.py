"""The API of OpenAI: models, completions, chat."""

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
from tiny_lm.serving.generation import Generation, encode, prompt_of_messages
from tiny_lm.serving.models import ServedModel
from tiny_lm.serving.openai import schema
from tiny_lm.serving.openai.responses import Answers, ChatAnswers, CompletionAnswers, Echo
from tiny_lm.serving.registry import ModelRegistry
from tiny_lm.serving.streaming import TextStream, prepare, seconds_left, while_connected

_COMPLETION_TOKENS = 16
"""Most tokens of a completion that asks for no number: OpenAI's own default."""

_SMALLEST_TOP_P = 1e-9
"""OpenAI admits 0: then the likeliest token alone is drawn from, as with this."""


def openai_router(registry: ModelRegistry) -> APIRouter:
    """Return the routes below ``/v1``."""
    router = APIRouter(prefix="/v1", tags=["OpenAI"])

    @router.head("/models", include_in_schema=False)
    @router.get("/models", response_model=schema.ModelList)
    async def list_models() -> Any:
        """List the models that are served."""
        return {"object": "list", "data": [_card(model) for model in registry.models]}

    @router.get("/models/{model}", response_model=schema.ModelCard)
    async def show_model(model: str) -> Any:
        """Show one model."""
        return _card(registry.find(model))

    @router.post("/completions", response_model=None, responses=_responses(schema.CompletionResponse))
    async def complete(body: schema.CompletionRequest, request: HttpRequest) -> Response:
        """Go on with a beginning, or with several."""
        model = registry.find(body.model)
        given = _several(body.prompt)
        prompts = await prepare(request, registry.limits, _prompts(model, given))
        most = registry.limits.tokens(_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens)
        asked = _request(body, most, logprobs=body.logprobs)
        scores_prompts = bool(body.echo) and body.logprobs is not None
        generation = registry.begin(
            model,
            prompts,
            asked,
            seconds=seconds_left(request, registry.limits),
            n=body.n or 1,
            seed=body.seed,
            scores_prompts=scores_prompts,
        )
        echoes = [
            Echo(model.generator.tokenizer.decode(ids), unsaid=_added_tokens(model, each))
            for each, ids in zip(given, prompts, strict=True)
        ]
        answers = CompletionAnswers(
            model,
            body.n or 1,
            echoes if body.echo else [Echo()] * len(prompts),
            tells_logprobs=body.logprobs is not None,
        )
        return await _answer(body, request, generation, answers)

    @router.post("/chat/completions", response_model=None, responses=_responses(schema.ChatCompletionResponse))
    async def chat(body: schema.ChatCompletionRequest, request: HttpRequest) -> Response:
        """Answer messages; a model that was trained on stories alone goes on with their text."""
        model = registry.find(body.model)
        rendering = prompt_of_messages(model, [_message(each) for each in body.messages])
        prompt, stop_tokens = await prepare(request, registry.limits, rendering)
        most = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        tells_logprobs = bool(body.top_logprobs) if body.logprobs is None else body.logprobs
        logprobs = (body.top_logprobs or 0) if tells_logprobs else None
        most = registry.limits.tokens(model.context_length if most is None else most)
        asked = _request(body, most, logprobs=logprobs, stop_tokens=stop_tokens)
        seconds = seconds_left(request, registry.limits)
        generation = registry.begin(model, [prompt], asked, seconds=seconds, n=body.n or 1, seed=body.seed)
        answers = ChatAnswers(model, body.n or 1, tells_logprobs=tells_logprobs)
        return await _answer(body, request, generation, answers)

    return router


def _responses(model: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """Describe an answer that comes whole or in events."""
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


async def _answer(
    body: schema.SampledRequest, request: HttpRequest, generation: Generation, answers: Answers
) -> Response:
    """Send what is generated, in events or whole."""
    if body.stream:
        tells_usage = bool(body.stream_options and body.stream_options.include_usage)
        return TextStream(answers.events(generation, tells_usage=tells_usage), generation, "text/event-stream")
    choices = await while_connected(request, generation, generation.choices())
    if any(choice.prompt for choice in choices):  # long enough to keep others waiting
        return await asyncio.to_thread(lambda: JSONResponse(answers.whole(choices, generation)))
    return JSONResponse(answers.whole(choices, generation))


async def _prompts(model: ServedModel, given: Sequence[str | list[int]]) -> list[list[int]]:
    """Return the ids of the prompts of a completion: bos before texts, and ids as they are.

    Raises:
        ApiError: one is longer than the context, or holds no id of the model's tokenizer.
    """
    ids = [each if isinstance(each, list) else await encode(model, each) for each in given]
    size = model.generator.tokenizer.vocab_size
    for each in ids:
        if len(each) > model.context_length:
            raise ApiError(
                400,
                f"the prompt has {len(each):,} tokens, and this model's context {model.context_length:,}",
                param="prompt",
                code="context_length_exceeded",
            )
        if max(each) >= size:
            raise ApiError(400, f"{max(each)} is no token id: the vocabulary has {size:,} tokens", param="prompt")
    return ids


def _added_tokens(model: ServedModel, prompt: str | list[int]) -> int:
    """Return how many tokens were put before a prompt that are not the client's."""
    return int(isinstance(prompt, str) and (model.generator.tokenizer.bos_id is not None or not prompt))


def _several(prompt: schema.Prompt | None) -> list[str | list[int]]:
    """Return the prompts one by one, whatever form they came in."""
    if prompt is None or isinstance(prompt, str):
        return [prompt or ""]
    ids = [each for each in prompt if isinstance(each, int)]
    return [ids] if ids else [each for each in prompt if not isinstance(each, int)]


def _message(message: schema.ChatMessage) -> Message:
    content = message.content or ""
    return Message(message.role, content if isinstance(content, str) else "".join(part.text for part in content))


def _request(
    body: schema.SampledRequest, most: int, *, logprobs: int | None, stop_tokens: tuple[str, ...] = ()
) -> GenerationConfig:
    """Return what is asked of the loop: ``most`` tokens."""
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    return GenerationConfig(
        max_new_tokens=most,
        min_new_tokens=min(body.min_tokens or 0, most),
        temperature=1.0 if body.temperature is None else body.temperature,
        top_k=max(body.top_k or 0, 0),
        top_p=1.0 if body.top_p is None else max(body.top_p, _SMALLEST_TOP_P),
        min_p=body.min_p or 0.0,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        stop=stop,
        stop_tokens=stop_tokens,
        logprobs=logprobs,
    )
