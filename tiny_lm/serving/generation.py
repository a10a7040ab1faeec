"""The texts of one request in the making, whichever API asked for them."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from tiny_lm.errors import UserError
from tiny_lm.inference.decoding import Drawn
from tiny_lm.inference.request import FinishReason
from tiny_lm.inference.scoring import ReadToken
from tiny_lm.serving.chat import Message, story_beginning
from tiny_lm.serving.models import ServedModel
from tiny_lm.serving.scheduler import RequestHandle, StreamChunk


class RequestTimeoutError(Exception):
    """A request took longer than it may."""


class ClientDisconnectedError(Exception):
    """Nobody waits for the answer any more."""


class StoppedError(Exception):
    """The loop ended a text before its time, since the server stops."""


@dataclass
class Choice:
    """One finished text."""

    text: str = ""
    drawn: list[Drawn] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    end: Drawn | None = None
    prompt: tuple[ReadToken, ...] = ()

    def add(self, piece: StreamChunk) -> None:
        """Put the next piece behind."""
        self.text += piece.text
        self.drawn += piece.drawn
        self.finish_reason = piece.finish_reason or self.finish_reason
        self.end = piece.end or self.end
        self.prompt = piece.prompt or self.prompt


class Generation:
    """Some texts that are told at once for one client.

    Attributes:
        prompt_tokens: tokens of all prompts, each counted once.
        started: :func:`time.monotonic` at the beginning.
        first: the same when the first piece came; None before.
    """

    def __init__(
        self, tickets: Sequence[RequestHandle], prompt_tokens: int, *, seconds: float, on_first: Callable[[float], None]
    ) -> None:
        """Follow ``tickets``, and cancel them after ``seconds``; ``on_first`` is told when the first piece comes."""
        self._tickets = tickets
        self._on_first = on_first
        self._late = False
        self._timer = asyncio.get_running_loop().call_later(seconds, self._expire)
        self.seconds = seconds
        self.prompt_tokens = prompt_tokens
        self.started = time.monotonic()
        self.first: float | None = None

    @property
    def completion_tokens(self) -> int:
        """Tokens told so far."""
        return sum(ticket.completion_tokens for ticket in self._tickets)

    def cancel(self) -> None:
        """Give the slots back; nothing happens to texts that have ended."""
        self._timer.cancel()
        for ticket in self._tickets:
            ticket.cancel()

    def _expire(self) -> None:
        self._late = True
        for ticket in self._tickets:
            ticket.cancel()

    async def pieces(self) -> AsyncIterator[tuple[int, StreamChunk]]:
        """Yield piece after piece of all texts, each with the number of its text.

        Raises:
            RequestTimeoutError: the time of the request has passed.
            StoppedError: the server stops.
        """
        ended = 0
        merged = self._one() if len(self._tickets) == 1 else self._merge()
        async for number, piece in merged:
            if self.first is None:
                self.first = time.monotonic()
                self._on_first(self.first - self.started)
            ended += piece.finish_reason is not None
            yield number, piece
        if ended < len(self._tickets):
            raise RequestTimeoutError if self._late else StoppedError
        self._timer.cancel()

    async def _one(self) -> AsyncIterator[tuple[int, StreamChunk]]:
        async for piece in self._tickets[0]:
            yield 0, piece

    async def _merge(self) -> AsyncIterator[tuple[int, StreamChunk]]:
        """Yield the pieces of several tickets as they come; a queue is no longer than the texts that it is made of."""
        queue: asyncio.Queue[tuple[int, StreamChunk] | Exception | None] = asyncio.Queue()

        async def follow(number: int, ticket: RequestHandle) -> None:
            try:
                async for piece in ticket:
                    queue.put_nowait((number, piece))
                queue.put_nowait(None)
            except Exception as error:  # told to the one who reads
                queue.put_nowait(error)

        tasks = [asyncio.create_task(follow(number, ticket)) for number, ticket in enumerate(self._tickets)]
        try:
            running = len(tasks)
            while running:
                item = await queue.get()
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    running -= 1
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()

    async def choices(self) -> list[Choice]:
        """Return all texts when they have ended.

        Raises:
            RequestTimeoutError, StoppedError: as :meth:`pieces`.
        """
        made = [Choice() for _ in self._tickets]
        async for number, piece in self.pieces():
            made[number].add(piece)
        return made


async def encode(model: ServedModel, text: str, *, bos: bool = True) -> list[int]:
    """Encode a prompt in a thread, since a long one takes a while.

    Raises:
        UserError: there is no token to begin with.
    """
    tokenizer = model.generator.tokenizer
    ids = await asyncio.to_thread(tokenizer.encode_prompt if bos else tokenizer.encode, text)
    if not ids:
        raise UserError("the prompt is empty")
    return ids


async def prompt_of_messages(model: ServedModel, messages: Sequence[Message]) -> tuple[list[int], tuple[str, ...]]:
    """Return the ids that messages become, and the special tokens that end an answer besides eos.

    Raises:
        UserError: the chat template refuses the messages.
        TemplateFailedError: it takes more time or memory than it may.
    """
    if model.template is None:
        return await encode(model, story_beginning(messages)), ()
    return await model.template.encode(messages), model.template.end_of_turn
