"""Generated text in the format of OpenAI's API: whole responses, and events of a stream."""

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from tiny_lm.files import to_json
from tiny_lm.inference.request import TokenLogprobs
from tiny_lm.serving.errors import describe_error, error_body
from tiny_lm.serving.generation import Generation
from tiny_lm.serving.models import ServedModel
from tiny_lm.serving.request_handle import StreamChunk
from tiny_lm.tokenizer import StreamDecoder, Tokenizer

_MIN_LOGPROB = -9999.0
"""Replaces minus infinity, which JSON cannot express."""


class ResponseFormatter(ABC):
    """Formats the generated texts of one request.

    Attributes:
        id_prefix: of the response's id.
        response_object: ``object`` of a whole response.
        event_object: ``object`` of an event.
    """

    id_prefix: ClassVar[str]
    response_object: ClassVar[str]
    event_object: ClassVar[str]

    def __init__(self, model: ServedModel, *, logprobs: bool) -> None:
        self._tokenizer = model.generator.tokenizer
        self._has_logprobs = logprobs
        self._head = {
            "id": f"{self.id_prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model.name,
        }

    @abstractmethod
    def choice(self, index: int, result: StreamChunk) -> dict[str, Any]:
        """Return a whole text as a choice."""

    @abstractmethod
    def first_choices(self) -> list[dict[str, Any]]:
        """Return the choices that a stream starts with, before anything is generated."""

    @abstractmethod
    def delta(self, index: int, chunk: StreamChunk) -> dict[str, Any]:
        """Return a chunk as a choice of an event."""

    def _top_logprobs(self, token: TokenLogprobs) -> list[tuple[int, float]]:
        """Return the likeliest alternatives without ids beyond the tokenizer, which the model may have."""
        return [(id_, logprob) for id_, logprob in token.top if id_ < self._tokenizer.vocab_size]

    def response(self, results: Sequence[StreamChunk], generation: Generation) -> dict[str, Any]:
        """Return a whole response."""
        choices = [self.choice(index, result) for index, result in enumerate(results)]
        return {**self._head, "object": self.response_object, "choices": choices, "usage": _usage(generation)}

    async def events(self, generation: Generation, *, include_usage: bool) -> AsyncIterator[str]:
        """Yield server-sent events; errors become events, too, since the status has been sent."""
        head = {**self._head, "object": self.event_object, **({"usage": None} if include_usage else {})}
        try:
            for choice in self.first_choices():
                yield _event({**head, "choices": [choice]})
            async for index, chunk in generation.chunks():
                if chunk.text or chunk.finish_reason or (self._has_logprobs and chunk.logprobs):
                    yield _event({**head, "choices": [self.delta(index, chunk)]})
            if include_usage:
                yield _event({**head, "choices": [], "usage": _usage(generation)})
        except Exception as error:
            described = describe_error(error)
            yield _event(error_body("/v1", described.status, described.message, code=described.code))
            if described.status == 500:
                raise
            return
        yield "data: [DONE]\n\n"


@dataclass(frozen=True)
class Echo:
    """The part of a completion that repeats its prompt.

    Attributes:
        text: the prompt, or nothing.
        num_added_tokens: tokens at the start of the prompt that the client did not send: the bos before a text.
    """

    text: str = ""
    num_added_tokens: int = 0


class CompletionFormatter(ResponseFormatter):
    """Formats responses of ``/v1/completions``."""

    id_prefix, response_object, event_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: ServedModel, n: int, echoes: Sequence[Echo], *, logprobs: bool) -> None:
        """Store the echo of each prompt, which has ``n`` completions."""
        super().__init__(model, logprobs=logprobs)
        self._echoes = [echo for echo in echoes for _ in range(n)]
        self._offsets = [len(echo.text) for echo in self._echoes]
        self._decoders = [self._tokenizer.stream_decoder() for _ in self._echoes]

    def choice(self, index: int, result: StreamChunk) -> dict[str, Any]:
        """Return a whole text as a choice."""
        return self._choice(index, self._echoes[index].text + result.text, result)

    def first_choices(self) -> list[dict[str, Any]]:
        """Return the echoes of the prompts; with log-probabilities they are part of the first chunk."""
        if self._has_logprobs:
            return []
        return [self._choice(index, echo.text, StreamChunk()) for index, echo in enumerate(self._echoes) if echo.text]

    def delta(self, index: int, chunk: StreamChunk) -> dict[str, Any]:
        """Return a chunk as a choice of an event."""
        return self._choice(
            index, self._echoes[index].text + chunk.text if chunk.prompt_logprobs else chunk.text, chunk
        )

    def _choice(self, index: int, text: str, chunk: StreamChunk) -> dict[str, Any]:
        logprobs = self._logprobs(index, chunk) if self._has_logprobs else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": chunk.finish_reason}

    def _logprobs(self, index: int, chunk: StreamChunk) -> dict[str, Any]:
        """Return the log-probabilities of a chunk; the token that ends the text is included, as usage counts it."""
        num_added = self._echoes[index].num_added_tokens
        prompt = chunk.prompt_logprobs[num_added:]
        sampled = [*chunk.logprobs, *([chunk.stop_logprobs] if chunk.stop_logprobs else [])]
        offsets, _ = self._text_offsets(chunk.prompt_logprobs, self._tokenizer.stream_decoder(), 0)
        own_offsets, self._offsets[index] = self._text_offsets(sampled, self._decoders[index], self._offsets[index])
        tokens = [*prompt, *sampled]
        tops: list[dict[str, float] | None] = [self._top_by_text(token) for token in tokens]
        logprobs = [None if token.logprob is None else _finite(token.logprob) for token in tokens]
        if prompt:  # the client's first token follows nothing of the client's
            tops[0] = logprobs[0] = None
        return {
            "tokens": [self._tokenizer.token_text(token.id) for token in tokens],
            "token_logprobs": logprobs,
            "top_logprobs": tops,
            "text_offset": offsets[num_added:] + own_offsets,
        }

    def _top_by_text(self, token: TokenLogprobs) -> dict[str, float]:
        """Return the log-probabilities of a token and its likeliest alternatives, by text."""
        top: dict[str, float] = {}
        for id_, logprob in (*self._top_logprobs(token), (token.id, token.logprob)):
            top.setdefault(self._tokenizer.token_text(id_), _finite(logprob))  # the likelier of two with equal texts
        return top

    @staticmethod
    def _text_offsets(tokens: Sequence[TokenLogprobs], decoder: StreamDecoder, start: int) -> tuple[list[int], int]:
        """Return where each token starts in a text, the first one at ``start``, and where the last one ends."""
        offsets = []
        for token in tokens:
            offsets.append(start)
            start += len(decoder.push(token.id))
        return offsets, start


class ChatFormatter(ResponseFormatter):
    """Formats responses of ``/v1/chat/completions``."""

    id_prefix, response_object, event_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, model: ServedModel, n: int, *, logprobs: bool) -> None:
        super().__init__(model, logprobs=logprobs)
        self._n = n

    def choice(self, index: int, result: StreamChunk) -> dict[str, Any]:
        """Return a whole reply as a choice."""
        return {
            "index": index,
            "message": {"role": "assistant", "content": result.text},
            "logprobs": self._logprobs(result.logprobs),
            "finish_reason": result.finish_reason,
        }

    def first_choices(self) -> list[dict[str, Any]]:
        """Return the roles, which are sent before the text."""
        return [
            self._event_choice(index, {"role": "assistant", "content": ""}, StreamChunk()) for index in range(self._n)
        ]

    def delta(self, index: int, chunk: StreamChunk) -> dict[str, Any]:
        """Return a chunk as a choice of an event."""
        delta = {"content": chunk.text} if chunk.text or not chunk.finish_reason else {}
        return self._event_choice(index, delta, chunk)

    def _event_choice(self, index: int, delta: dict[str, str], chunk: StreamChunk) -> dict[str, Any]:
        logprobs = self._logprobs(chunk.logprobs) if chunk.logprobs else None
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": chunk.finish_reason}

    def _logprobs(self, tokens: Sequence[TokenLogprobs]) -> dict[str, Any] | None:
        if not self._has_logprobs:
            return None
        content = []
        for token in tokens:
            tops = [_chat_token(self._tokenizer, id_, logprob) for id_, logprob in self._top_logprobs(token)]
            content.append({**_chat_token(self._tokenizer, token.id, token.logprob), "top_logprobs": tops})
        return {"content": content}


def _chat_token(tokenizer: Tokenizer, token_id: int, logprob: float | None) -> dict[str, Any]:
    raw = tokenizer.token_bytes(token_id, skip_special=False)
    return {"token": raw.decode(errors="replace"), "logprob": _finite(logprob), "bytes": list(raw)}


def _finite(logprob: float | None) -> float:
    return _MIN_LOGPROB if logprob is None else max(logprob, _MIN_LOGPROB)


def _usage(generation: Generation) -> dict[str, int]:
    prompt, completion = generation.prompt_tokens, generation.completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _event(content: object) -> str:
    return f"data: {to_json(content)}\n\n"
