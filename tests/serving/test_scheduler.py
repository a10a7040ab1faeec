"""The model loop: real threads, and models that are small enough for a moment."""

import asyncio
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.append(str(Path(__file__).parents[1] / "inference"))  # generators.py
from generators import FAMILIES, make

from tiny_lm.errors import UserError
from tiny_lm.inference import Completion, GenerationConfig, TextGenerator
from tiny_lm.inference.batch import BatchDecoder
from tiny_lm.inference.sequence import SequenceState
from tiny_lm.serving import scheduler
from tiny_lm.serving.limits import Limits
from tiny_lm.serving.models import ServedModel, check_memory
from tiny_lm.serving.request_handle import RequestCancelledError, RequestHandle, SchedulerFailedError
from tiny_lm.serving.scheduler import (
    QueueFull,
    Scheduler,
    SchedulerStoppedError,
    run_in_thread,
)
from tiny_lm.tokenizer import Tokenizer

LONG = GenerationConfig(max_new_tokens=100_000, min_new_tokens=100_000, temperature=0)  # goes on until it is cancelled

Start = Callable[..., Scheduler]


@pytest.fixture
def generator(tokenizer: Tokenizer) -> TextGenerator:
    return make(tokenizer)


@pytest.fixture
def start() -> Iterator[Start]:
    """Start loops, and see that each of their threads ends."""
    loops = []

    def begin(generator: TextGenerator, **options: float) -> Scheduler:
        loops.append(Scheduler(generator, **options))  # type: ignore[arg-type]
        loops[-1].start()
        return loops[-1]

    yield begin
    for loop in loops:
        loop.stop(grace=0)
        assert loop.stats.running == loop.stats.waiting == 0


def until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread does; the bound is for tests that fail."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


REQUESTS = [
    ("", GenerationConfig(max_new_tokens=90, temperature=0), 5),
    ("One day", GenerationConfig(max_new_tokens=90, temperature=1.0, top_p=0.9, repetition_penalty=1.2), 6),
    (
        "The bear and the fox went home. " * 20,
        GenerationConfig(max_new_tokens=30, temperature=1.0, frequency_penalty=0.5),
        7,
    ),
    ("One day", GenerationConfig(max_new_tokens=90, temperature=1.0, top_p=0.9, repetition_penalty=1.2), 6),
    ("Once upon a time", GenerationConfig(max_new_tokens=40, min_new_tokens=40, temperature=1.5, top_k=40), 8),
    ("Once upon a time", GenerationConfig(max_new_tokens=60, temperature=2.0, stop=("e", "o")), 9),
    ("The fox", GenerationConfig(max_new_tokens=0), 1),
    ("One day", GenerationConfig(max_new_tokens=25, temperature=1.0, min_p=0.01, logprobs=2), 10),
]


@pytest.mark.parametrize("prompt_tokens", [7, 256])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_is_the_same_alone_and_among_others_that_join_and_leave(
    family: str, prompt_tokens: int, tokenizer: Tokenizer, start: Start
) -> None:
    generator = make(tokenizer, family)
    alone = [generator.generate_batch([prompt], request, seed=seed)[0] for prompt, request, seed in REQUESTS]
    loop = start(generator, slots=3, max_prefill_tokens=prompt_tokens)
    for begin in range(3):  # in other company each time
        order = [*range(begin, len(REQUESTS)), *range(begin)]
        other = loop.submit("A", LONG)
        tickets = {i: loop.submit(REQUESTS[i][0], REQUESTS[i][1], seed=REQUESTS[i][2]) for i in order}
        for i in order[:2]:
            assert same(tickets.pop(i).result(), alone[i])
        other.cancel()
        for i, ticket in tickets.items():
            assert same(ticket.result(), alone[i])
    assert loop.stats.finished == 3 * (len(REQUESTS) - 1)


def same(text: Completion, other: Completion) -> bool:
    """Whether two texts are equal, with log-probabilities that differ by rounding."""
    assert [drawn.logprob for drawn in text.logprobs] == pytest.approx([d.logprob for d in other.logprobs], abs=1e-4)
    return (text.ids, text.text, text.finish_reason) == (other.ids, other.text, other.finish_reason)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_of_the_batch_reads_no_more_of_a_prompt_than_it_may(family: str, tokenizer: Tokenizer) -> None:
    generator = make(tokenizer, family)
    batch = generator.new_batch(3, max_prefill_tokens=10)
    short = generator.new_sequence("A", GenerationConfig(max_new_tokens=60, min_new_tokens=60, temperature=0))
    long = generator.new_sequence(
        "The bear went home. " * 20, GenerationConfig(max_new_tokens=8, min_new_tokens=8, temperature=0)
    )
    batch.add(short)
    batch.step()
    batch.add(long)
    for _ in range(6):  # 60 of the 64 tokens that fit
        assert batch.step() == [short]
    assert batch.step() == [short, long]
    batch.remove(short)
    while len(batch):
        batch.step()
    assert (
        long.completion()
        == generator.generate_batch([long.prompt], GenerationConfig(max_new_tokens=8, min_new_tokens=8, temperature=0))[
            0
        ]
    )


def test_a_prompt_waits_a_few_steps_for_others_where_many_texts_are_told(tokenizer: Tokenizer) -> None:
    generator = make(tokenizer)
    batch = generator.new_batch(24)

    def join(count: int) -> list[SequenceState]:
        texts = [
            generator.new_sequence("A", GenerationConfig(max_new_tokens=60, min_new_tokens=60, temperature=0))
            for _ in range(count)
        ]
        for text in texts:
            batch.add(text)
        return texts

    join(20)
    assert len(batch.step()) == 20
    [alone] = join(1)
    assert [alone in batch.step() for _ in range(9)] == [False] * 8 + [True]
    join(3)
    assert len(batch.step()) == 24


def test_pieces_add_up_and_the_last_one_tells_how_the_text_ended(generator: TextGenerator, start: Start) -> None:
    loop = start(generator, publish_seconds=0)
    request = GenerationConfig(max_new_tokens=40, min_new_tokens=40, temperature=1.0, logprobs=1)
    [expected] = generator.generate_batch(["One day"], request, seed=3)
    ticket = loop.submit("One day", request, seed=3)
    pieces = list(ticket)
    assert "".join(piece.text for piece in pieces) == expected.text
    assert [drawn.id for piece in pieces for drawn in piece.logprobs] == expected.ids
    assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["length"]
    assert (ticket.prompt_tokens, ticket.completion_tokens) == (
        len(generator.new_sequence("One day", request).prompt_ids),
        40,
    )
    assert loop.stats.tokens == 40 and loop.stats.prompt_tokens == ticket.prompt_tokens
    assert [
        (piece.text, piece.finish_reason) for piece in loop.submit("One day", GenerationConfig(max_new_tokens=0))
    ] == [("", "length")]


def test_ids_are_a_prompt_as_they_are(generator: TextGenerator, start: Start) -> None:
    loop = start(generator)
    ids = generator.tokenizer.encode("One day", bos=True)
    request = GenerationConfig(max_new_tokens=20, min_new_tokens=20, temperature=0)
    assert loop.submit(ids, request).result().ids == loop.submit("One day", request).result().ids
    with pytest.raises(UserError, match="token id 100000 is out of range"):
        loop.submit([1, 100_000], request)


def test_what_the_user_can_mend_is_told_at_once_and_the_loop_goes_on(generator: TextGenerator, start: Start) -> None:
    loop = start(generator)
    with pytest.raises(UserError, match="the prompt is empty"):
        loop.submit("", GenerationConfig(add_bos=False))
    with pytest.raises(UserError, match="is not a special token"):
        loop.submit("x", GenerationConfig(stop_tokens=("<|end|>",)))
    with pytest.raises(UserError, match="a seed must be between"):
        loop.submit("x", GenerationConfig(max_new_tokens=3), seed=2**64)
    assert len(loop.submit("x", GenerationConfig(max_new_tokens=3, min_new_tokens=3), seed=-(2**63)).result().ids) == 3


def test_a_cancelled_text_frees_its_slot_for_one_that_waits(generator: TextGenerator, start: Start) -> None:
    loop = start(generator, slots=1)
    first = loop.submit("One day", LONG)
    until(lambda: loop.stats.tokens > 5)
    second, third = (
        loop.submit("One day", GenerationConfig(max_new_tokens=5, min_new_tokens=5)),
        loop.submit("One day", LONG),
    )
    third.cancel()  # it still waits
    assert loop.stats.running == 1
    first.cancel()
    steps = loop.stats.steps
    assert len(second.result().ids) == 5
    assert loop.stats.steps <= steps + 1 + 5  # at most the step that was being made
    assert list(first) == [] and list(third) == []
    with pytest.raises(RequestCancelledError):
        third.result()
    until(lambda: loop.stats.cancelled == 2)


def test_who_breaks_off_reading_gives_the_text_up(generator: TextGenerator, start: Start) -> None:
    loop = start(generator)
    reader = iter(loop.submit("One day", LONG))
    next(reader)
    del reader

    async def read() -> None:
        async for _ in loop.submit("One day", LONG):
            pass

    async def go_away() -> None:
        task = asyncio.create_task(read())
        await asyncio.sleep(0.02)
        task.cancel()

    asyncio.run(go_away())
    until(lambda: loop.stats.cancelled == 2 and loop.stats.running == 0)


def test_the_queue_has_an_end(generator: TextGenerator, start: Start) -> None:
    loop = start(generator, slots=2, queue=3)
    tickets = [loop.submit("One day", LONG) for _ in range(5)]
    with pytest.raises(QueueFull, match="3 requests are waiting already"):
        loop.submit("One day", LONG)
    until(lambda: loop.stats.running == 2)
    assert loop.stats.waiting == 3
    for ticket in tickets:
        ticket.cancel()
    until(lambda: loop.stats.waiting == loop.stats.running == 0)
    assert len(loop.submit("One day", GenerationConfig(max_new_tokens=5, min_new_tokens=5)).result().ids) == 5


def test_stopping_lets_texts_end_and_refuses_new_ones(generator: TextGenerator, start: Start) -> None:
    loop = start(generator, slots=1)
    tickets = [loop.submit("One day", GenerationConfig(max_new_tokens=200, min_new_tokens=200)) for _ in range(3)]
    stopper = threading.Thread(target=loop.stop, kwargs={"grace": 60})
    stopper.start()
    until(lambda: loop._deadline is not None)
    with pytest.raises(SchedulerStoppedError):
        loop.submit("One day", GenerationConfig(max_new_tokens=5))
    assert [len(ticket.result().ids) for ticket in tickets] == [200] * 3
    stopper.join()
    loop.stop(grace=0)  # once more does no harm


def test_stopping_ends_what_does_not_end(generator: TextGenerator, start: Start) -> None:
    loop = start(generator, slots=1)
    tickets = [loop.submit("One day", LONG) for _ in range(2)]
    until(lambda: loop.stats.tokens > 0)
    loop.stop(grace=0.05)
    for ticket in tickets:
        with pytest.raises(RequestCancelledError):
            ticket.result()
    assert loop.stats.cancelled == 2

    never_started = Scheduler(generator)
    ticket = never_started.submit("One day", LONG)
    never_started.stop(grace=60)
    assert list(ticket) == []


def test_an_error_in_the_loop_reaches_all_who_wait(
    generator: TextGenerator, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = BatchDecoder.step

    def failing(batch: BatchDecoder) -> list[SequenceState]:
        if len(batch) == 2 and any(sequence.num_generated > 3 for sequence in batch._running):
            raise MemoryError("no room")
        return step(batch)

    monkeypatch.setattr(BatchDecoder, "step", failing)
    loop = start(generator, slots=2)
    tickets = [loop.submit("One day", LONG) for _ in range(4)]  # two of them wait

    async def read(ticket: RequestHandle) -> None:
        async for _ in ticket:
            pass

    for ticket in tickets[::2]:
        with pytest.raises(SchedulerFailedError) as raised:
            ticket.result()
        assert str(raised.value.__cause__) == "no room"
    for ticket in tickets[1::2]:
        with pytest.raises(SchedulerFailedError):
            asyncio.run(read(ticket))
    with pytest.raises(SchedulerFailedError):
        loop.submit("One day", GenerationConfig(max_new_tokens=5))


def test_who_reads_slowly_keeps_nobody_waiting(generator: TextGenerator, start: Start) -> None:
    loop = start(generator, publish_seconds=0)
    request = GenerationConfig(max_new_tokens=150, min_new_tokens=150)

    async def read() -> tuple[int, list[str], Completion]:
        slow = loop.submit("One day", request, seed=1)
        reading = slow.__aiter__()
        pieces = [(await anext(reading)).text]
        others = [loop.submit("One day", request, seed=seed) for seed in range(2, 6)]
        for other in others:
            await asyncio.to_thread(other.result)
        await asyncio.to_thread(until, lambda: slow.completion_tokens == 150)  # told to its end while nobody read
        pieces += [piece.text async for piece in reading]
        return slow.completion_tokens, pieces, slow.sequence.completion()

    tokens, pieces, text = asyncio.run(read())
    assert tokens == 150 and len(pieces) == 2 and "".join(pieces) == text.text


def test_many_readers_of_one_event_loop(generator: TextGenerator, start: Start) -> None:
    loop = start(generator, slots=8)
    request = GenerationConfig(max_new_tokens=30, min_new_tokens=30, temperature=1.0)

    async def read(seed: int) -> str:
        return "".join([piece.text async for piece in loop.submit("One day", request, seed=seed)])

    async def read_all() -> list[str]:
        return await asyncio.gather(*map(read, range(40)))

    expected = generator.generate_batch(["One day"] * 40, request, seed=list(range(40)))
    assert asyncio.run(read_all()) == [text.text for text in expected]


def test_no_short_text_waits_for_a_longer_one_that_came_before(generator: TextGenerator, start: Start) -> None:
    loop = start(generator, slots=4)
    long = [loop.submit("One day", LONG) for _ in range(3)]
    for _ in range(20):
        loop.submit("One day", GenerationConfig(max_new_tokens=5, min_new_tokens=5)).result()
    assert all(ticket.sequence.finish_reason is None for ticket in long)
    assert min(ticket.completion_tokens for ticket in long) > 80  # which did not wait either, while 20 x 5 were told
    for ticket in long:
        ticket.cancel()


def test_a_loop_without_work_gives_its_thread_up_and_goes_on_later(
    generator: TextGenerator, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "_IDLE_SECONDS", 0.01)
    loop = start(generator)
    texts = []
    for _ in range(3):
        texts.append(
            loop.submit("One day", GenerationConfig(max_new_tokens=5, min_new_tokens=5, temperature=0)).result()
        )
        until(lambda: loop._thread is None)
    assert texts[0] == texts[1] == texts[2]


def test_what_is_done_apart_is_done_in_a_thread_that_ends() -> None:
    def work(size: int) -> tuple[threading.Thread, int]:
        return threading.current_thread(), len(torch.ones(size))

    thread, size = run_in_thread(work, size=3)
    assert size == 3 and not thread.is_alive()
    with pytest.raises(ZeroDivisionError):
        run_in_thread(lambda: 1 // 0)


class Operations(TorchDispatchMode):
    """Notes every operation on tensors of the thread that it is switched on in."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        self.seen.append(str(function))
        return function(*arguments, **options or {})


def test_only_the_loop_computes(generator: TextGenerator, start: Start) -> None:
    """A second thread that has computed halves the speed of the loop as long as it lives."""
    loop = start(generator)
    served = ServedModel("fox", generator, loop, None, 0, "")
    with Operations() as operations:
        taken = check_memory([served, served], Limits(slots=8))
        ticket = loop.submit("Once", LONG, prompt_scorer=generator.new_prompt_scorer([1, 2, 3]))
        next(iter(ticket))
        ticket.cancel()
    assert not operations.seen
    cache = generator.model.new_cache(8)
    assert taken == 2 * sum(part.nbytes for part in (*cache.keys, *cache.values))
