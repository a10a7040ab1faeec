"""Generated text in the words of OpenAI's API: whole answers, and events of a stream."""

import json
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from typing import Any, ClassVar

from tiny_lm.inference.decoding import Drawn
from tiny_lm.serving.batching import Piece
from tiny_lm.serving.errors import describe, error_body
from tiny_lm.serving.generation import Choice, Generation
from tiny_lm.serving.models import ServedModel
from tiny_lm.tokenizer import Tokenizer

_LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON lacks."""


class Answers(ABC):
    """Puts the texts of one request into words.

    Attributes:
        prefix: of the id.
        whole_object: the ``object`` of a whole answer.
        event_object: the ``object`` of an event.
    """

    prefix: ClassVar[str]
    whole_object: ClassVar[str]
    event_object: ClassVar[str]

    def __init__(self, model: ServedModel, *, tells_logprobs: bool) -> None:
        self._tokenizer = model.generator.tokenizer
        self._tells_logprobs = tells_logprobs
        self._head = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model.name,
        }

    @abstractmethod
    def choice(self, index: int, choice: Choice) -> dict[str, Any]:
        """Return a finished text."""

    @abstractmethod
    def beginning(self) -> list[dict[str, Any]]:
        """Return the choices that a stream begins with, before anything is generated."""

    @abstractmethod
    def piece(self, index: int, piece: Piece) -> dict[str, Any]:
        """Return a piece of a text as a choice of an event."""

    def whole(self, choices: Sequence[Choice], generation: Generation) -> dict[str, Any]:
        """Return an answer that comes whole."""
        told = [self.choice(index, choice) for index, choice in enumerate(choices)]
        return {**self._head, "object": self.whole_object, "choices": told, "usage": _usage(generation)}

    async def events(self, generation: Generation, *, tells_usage: bool) -> AsyncIterator[str]:
        """Yield server-sent events; what goes wrong on the way becomes an event too, since the status is sent."""
        head = {**self._head, "object": self.event_object, **({"usage": None} if tells_usage else {})}
        try:
            for choice in self.beginning():
                yield _event({**head, "choices": [choice]})
            async for index, piece in generation.pieces():
                if piece.text or piece.finish_reason or (self._tells_logprobs and piece.drawn):
                    yield _event({**head, "choices": [self.piece(index, piece)]})
            if tells_usage:
                yield _event({**head, "choices": [], "usage": _usage(generation)})
        except Exception as error:
            told = describe(error)
            yield _event(error_body("/v1", told.status, told.message, code=told.code))
            if told.status == 500:
                raise
            return
        yield "data: [DONE]\n\n"


class CompletionAnswers(Answers):
    """Answers to ``/v1/completions``."""

    prefix, whole_object, event_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: ServedModel, n: int, echoes: Sequence[str], *, tells_logprobs: bool) -> None:
        """Tell ``n`` texts for each prompt; ``echoes`` are told before each prompt's texts."""
        super().__init__(model, tells_logprobs=tells_logprobs)
        self._echoes = [echo for echo in echoes for _ in range(n)]
        self._offsets = [len(echo) for echo in self._echoes]
        self._decoders = [self._tokenizer.stream_decoder() for _ in self._echoes]

    def choice(self, index: int, choice: Choice) -> dict[str, Any]:
        """Return a finished text."""
        return self._choice(index, self._echoes[index] + choice.text, choice.drawn, choice.finish_reason)

    def beginning(self) -> list[dict[str, Any]]:
        """Return the echoes of the prompts."""
        return [self._choice(index, echo, (), None) for index, echo in enumerate(self._echoes) if echo]

    def piece(self, index: int, piece: Piece) -> dict[str, Any]:
        """Return a piece of a text."""
        return self._choice(index, piece.text, piece.drawn, piece.finish_reason)

    def _choice(self, index: int, text: str, drawn: Sequence[Drawn], finish_reason: str | None) -> dict[str, Any]:
        logprobs = self._logprobs(index, drawn) if self._tells_logprobs else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

    def _logprobs(self, index: int, drawn: Sequence[Drawn]) -> dict[str, Any]:
        offsets = []
        for token in drawn:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(self._decoders[index].push(token.id))
        text = self._tokenizer.token_text
        tops = [{text(id_): _finite(logprob) for id_, logprob in token.top} for token in drawn]
        return {
            "tokens": [text(token.id) for token in drawn],
            "token_logprobs": [_finite(token.logprob) for token in drawn],
            "top_logprobs": tops,
            "text_offset": offsets,
        }


class ChatAnswers(Answers):
    """Answers to ``/v1/chat/completions``."""

    prefix, whole_object, event_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, model: ServedModel, n: int, *, tells_logprobs: bool) -> None:
        super().__init__(model, tells_logprobs=tells_logprobs)
        self._n = n

    def choice(self, index: int, choice: Choice) -> dict[str, Any]:
        """Return a finished answer."""
        return {
            "index": index,
            "message": {"role": "assistant", "content": choice.text},
            "logprobs": self._logprobs(choice.drawn),
            "finish_reason": choice.finish_reason,
        }

    def beginning(self) -> list[dict[str, Any]]:
        """Return the roles, which come before the words."""
        return [self._event(index, {"role": "assistant", "content": ""}, (), None) for index in range(self._n)]

    def piece(self, index: int, piece: Piece) -> dict[str, Any]:
        """Return a piece of an answer."""
        delta = {"content": piece.text} if piece.text or not piece.finish_reason else {}
        return self._event(index, delta, piece.drawn, piece.finish_reason)

    def _event(
        self, index: int, delta: dict[str, str], drawn: Sequence[Drawn], finish_reason: str | None
    ) -> dict[str, Any]:
        logprobs = self._logprobs(drawn) if drawn else None
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}

    def _logprobs(self, drawn: Sequence[Drawn]) -> dict[str, Any] | None:
        if not self._tells_logprobs:
            return None
        told = []
        for token in drawn:
            tops = [_chat_token(self._tokenizer, id_, logprob) for id_, logprob in token.top]
            told.append({**_chat_token(self._tokenizer, token.id, token.logprob), "top_logprobs": tops})
        return {"content": told}


def _chat_token(tokenizer: Tokenizer, token_id: int, logprob: float | None) -> dict[str, Any]:
    raw = tokenizer.token_bytes(token_id, skip_special=False)
    return {"token": raw.decode(errors="replace"), "logprob": _finite(logprob), "bytes": list(raw)}


def _finite(logprob: float | None) -> float:
    return _LEAST_LOGPROB if logprob is None else max(logprob, _LEAST_LOGPROB)


def _usage(generation: Generation) -> dict[str, int]:
    prompt, completion = generation.prompt_tokens, generation.completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _event(content: object) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"
