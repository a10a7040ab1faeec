"""Generated text in the words of OpenAI's API: whole answers, and events of a stream."""

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from tiny_lm.files import to_json
from tiny_lm.inference.decoding import Drawn
from tiny_lm.inference.scoring import ReadToken
from tiny_lm.serving.errors import describe, error_body
from tiny_lm.serving.generation import Choice, Generation
from tiny_lm.serving.models import ServedModel
from tiny_lm.serving.scheduler import StreamChunk
from tiny_lm.tokenizer import StreamDecoder, Tokenizer

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
    def piece(self, index: int, piece: StreamChunk) -> dict[str, Any]:
        """Return a piece of a text as a choice of an event."""

    def _likeliest(self, token: Drawn | ReadToken) -> list[tuple[int, float]]:
        """Return the likeliest tokens in the place of one; the model may have rows that are no token."""
        return [(id_, logprob) for id_, logprob in token.top if id_ < self._tokenizer.vocab_size]

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


@dataclass(frozen=True)
class Echo:
    """What is told of a prompt before its texts.

    Attributes:
        text: the prompt itself, or nothing.
        unsaid: tokens at the beginning of the prompt that are not the client's: the bos that is put before a text.
    """

    text: str = ""
    unsaid: int = 0


class CompletionAnswers(Answers):
    """Answers to ``/v1/completions``."""

    prefix, whole_object, event_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: ServedModel, n: int, echoes: Sequence[Echo], *, tells_logprobs: bool) -> None:
        """Tell ``n`` texts for each prompt; ``echoes`` are told before each prompt's texts."""
        super().__init__(model, tells_logprobs=tells_logprobs)
        self._echoes = [echo for echo in echoes for _ in range(n)]
        self._offsets = [len(echo.text) for echo in self._echoes]
        self._decoders = [self._tokenizer.stream_decoder() for _ in self._echoes]

    def choice(self, index: int, choice: Choice) -> dict[str, Any]:
        """Return a finished text."""
        return self._choice(index, self._echoes[index].text + choice.text, choice)

    def beginning(self) -> list[dict[str, Any]]:
        """Return the echoes of the prompts; with log-probabilities they come when these are there."""
        if self._tells_logprobs:
            return []
        return [self._choice(index, echo.text, Choice()) for index, echo in enumerate(self._echoes) if echo.text]

    def piece(self, index: int, piece: StreamChunk) -> dict[str, Any]:
        """Return a piece of a text."""
        return self._choice(index, self._echoes[index].text + piece.text if piece.prompt else piece.text, piece)

    def _choice(self, index: int, text: str, part: StreamChunk | Choice) -> dict[str, Any]:
        logprobs = self._logprobs(index, part) if self._tells_logprobs else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": part.finish_reason}

    def _logprobs(self, index: int, part: StreamChunk | Choice) -> dict[str, Any]:
        """Return the log-probabilities of the tokens of a part, with the one that ends the text, as usage counts it."""
        unsaid = self._echoes[index].unsaid
        read, drawn = part.prompt[unsaid:], [*part.drawn, *([part.end] if part.end else [])]
        offsets, _ = self._offsets_of(part.prompt, self._tokenizer.stream_decoder(), 0)
        drawn_offsets, self._offsets[index] = self._offsets_of(drawn, self._decoders[index], self._offsets[index])
        told: list[Drawn | ReadToken] = [*read, *drawn]
        tops = [self._top(token) for token in told]
        logprobs = [None if token.logprob is None else _finite(token.logprob) for token in told]
        if read:  # nothing of the client's stands before it
            tops[0] = logprobs[0] = None
        return {
            "tokens": [self._tokenizer.token_text(token.id) for token in told],
            "token_logprobs": logprobs,
            "top_logprobs": tops,
            "text_offset": offsets[unsaid:] + drawn_offsets,
        }

    def _top(self, token: Drawn | ReadToken) -> dict[str, float] | None:
        """Return the likeliest tokens in the place of one, and that token itself."""
        top: dict[str, float] = {}
        for id_, logprob in (*self._likeliest(token), (token.id, token.logprob)):
            top.setdefault(self._tokenizer.token_text(id_), _finite(logprob))  # of two that look alike the likelier
        return top

    @staticmethod
    def _offsets_of(tokens: Sequence[Drawn | ReadToken], decoder: StreamDecoder, begin: int) -> tuple[list[int], int]:
        """Return where each token begins in a text, the first one at ``begin``, and where the last one ends."""
        offsets = []
        for token in tokens:
            offsets.append(begin)
            begin += len(decoder.push(token.id))
        return offsets, begin


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

    def piece(self, index: int, piece: StreamChunk) -> dict[str, Any]:
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
            tops = [_chat_token(self._tokenizer, id_, logprob) for id_, logprob in self._likeliest(token)]
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
    return f"data: {to_json(content)}\n\n"
