"""The sequences of one HTTP request, whichever API it came through."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence

from tiny_lm.errors import UserError
from tiny_lm.serving.chat import Message, plain_prompt
from tiny_lm.serving.models import ServedModel
from tiny_lm.serving.request_handle import RequestHandle, StreamChunk


class RequestTimeoutError(Exception):
    """A request took longer than its limit."""


class ClientDisconnectedError(Exception):
    """The client closed the connection."""


class GenerationStoppedError(Exception):
    """The scheduler cancelled a sequence because the server is stopping."""


class Generation:
    """The sequences that are generated for one HTTP request.

    Attributes:
        prompt_tokens: tokens of all prompts, each counted once.
        started: :func:`time.monotonic` at the beginning.
        first: the same when the first chunk arrived; None before.
    """

    def __init__(
        self, handles: Sequence[RequestHandle], prompt_tokens: int, *, seconds: float, on_first: Callable[[float], None]
    ) -> None:
        """Cancel ``handles`` after ``seconds``; ``on_first`` is called with the time to the first chunk."""
        self._handles = handles
        self._on_first = on_first
        self._expired = False
        self._timer = asyncio.get_running_loop().call_later(seconds, self._expire)
        self.seconds = seconds
        self.prompt_tokens = prompt_tokens
        self.started = time.monotonic()
        self.first: float | None = None

    @property
    def completion_tokens(self) -> int:
        """Tokens generated so far."""
        return sum(handle.completion_tokens for handle in self._handles)

    def cancel(self) -> None:
        """Free the slots of sequences that have not ended."""
        self._timer.cancel()
        for handle in self._handles:
            handle.cancel()

    def _expire(self) -> None:
        self._expired = True
        for handle in self._handles:
            handle.cancel()

    async def chunks(self) -> AsyncIterator[tuple[int, StreamChunk]]:
        """Yield the chunks of all sequences as they arrive, each with the index of its sequence.

        Raises:
            RequestTimeoutError: the request timed out.
            GenerationStoppedError: the server is stopping.
        """
        ended = 0
        merged = self._single() if len(self._handles) == 1 else self._merge()
        async for index, chunk in merged:
            if self.first is None:
                self.first = time.monotonic()
                self._on_first(self.first - self.started)
            ended += chunk.finish_reason is not None
            yield index, chunk
        if ended < len(self._handles):
            raise RequestTimeoutError if self._expired else GenerationStoppedError
        self._timer.cancel()

    async def _single(self) -> AsyncIterator[tuple[int, StreamChunk]]:
        async for chunk in self._handles[0]:
            yield 0, chunk

    async def _merge(self) -> AsyncIterator[tuple[int, StreamChunk]]:
        """Yield the chunks of several handles; the queue is bounded by the length of the sequences."""
        queue: asyncio.Queue[tuple[int, StreamChunk] | Exception | None] = asyncio.Queue()

        async def follow(index: int, handle: RequestHandle) -> None:
            try:
                async for chunk in handle:
                    queue.put_nowait((index, chunk))
                queue.put_nowait(None)
            except Exception as error:  # raised by the reader of the queue
                queue.put_nowait(error)

        tasks = [asyncio.create_task(follow(index, handle)) for index, handle in enumerate(self._handles)]
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

    async def results(self) -> list[StreamChunk]:
        """Return all sequences when they have ended, each as one merged chunk.

        Raises:
            RequestTimeoutError, GenerationStoppedError: as :meth:`chunks`.
        """
        merged = [StreamChunk() for _ in self._handles]
        async for index, chunk in self.chunks():
            merged[index] += chunk
        return merged


async def encode(model: ServedModel, text: str, *, bos: bool = True) -> list[int]:
    """Encode a prompt in a thread, since a long one takes a while.

    Raises:
        UserError: the prompt has no token.
    """
    tokenizer = model.generator.tokenizer
    ids = await asyncio.to_thread(tokenizer.encode_prompt if bos else tokenizer.encode, text)
    if not ids:
        raise UserError("the prompt is empty")
    return ids


async def encode_messages(model: ServedModel, messages: Sequence[Message]) -> tuple[list[int], tuple[str, ...]]:
    """Return the prompt ids of messages, and the special tokens that end the reply besides eos.

    Raises:
        UserError: the chat template refuses the messages.
        TemplateFailedError: it exceeds its time or memory limit.
    """
    if model.template is None:
        return await encode(model, plain_prompt(messages)), ()
    return await model.template.encode(messages), model.template.end_of_turn
