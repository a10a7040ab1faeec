"""What the page requests from the models, and what it shows of a story while it is generated."""

import math
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tiny_lm.errors import UserError
from tiny_lm.inference import GenerationConfig, TextGenerator
from tiny_lm.inference.request import TokenLogprobs
from tiny_lm.model import FAMILY_NAMES, num_parameters
from tiny_lm.pages.surprise import TokenSurprise
from tiny_lm.pages.text import short, visible
from tiny_lm.serving.request_handle import RequestHandle
from tiny_lm.serving.scheduler import Scheduler

MAX_PROMPT_LENGTH = 2000
"""In characters."""
TOKEN_RANGE = (50, 500)
TEMPERATURE_RANGE = (0.1, 2.0)
NUM_SEEDS = 10_000

_NUM_ALTERNATIVES = 5
_UPDATE_SECONDS = 0.06
"""Interval at which the page is updated; shorter ones load the browser without a visible difference."""

_STATUS = {
    "generating": "generating …",
    "stop": "the model ended the story",
    "length": "reached the maximum of tokens",
    "cancelled": "stopped",
}

ViewState = dict[str, Any]
"""What the page's script reads of one story."""

EMPTY_VIEW: ViewState = {"story": 0, "state": "none"}


@dataclass(frozen=True)
class DemoParams:
    """What the page requests.

    Raises:
        UserError: a value is outside the range of the page's controls.
    """

    prompt: str
    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int

    def __post_init__(self) -> None:
        if len(self.prompt) > MAX_PROMPT_LENGTH:
            raise UserError(f"the prompt has {len(self.prompt):,} characters; the maximum is {MAX_PROMPT_LENGTH:,}")
        for name, value, (low, high) in (
            ("the number of tokens", self.max_new_tokens, TOKEN_RANGE),
            ("the temperature", self.temperature, TEMPERATURE_RANGE),
            ("the seed", self.seed, (0, NUM_SEEDS - 1)),
        ):
            if not low <= value <= high:
                raise UserError(f"{name} must be between {low} and {high} (it is {value})")

    def config(self) -> GenerationConfig:
        """Return the config for the generator."""
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            logprobs=_NUM_ALTERNATIVES,
        )


@dataclass
class DemoStory:
    """A story while it is generated."""

    number: int
    model: str
    prompt: str
    num_dropped: int
    """Characters at the beginning of the prompt that do not fit into the context."""
    text: str = ""
    tokens: list[ViewState] = field(default_factory=list)
    state: str = "generating"
    seconds: float = 0.0

    def view(self) -> ViewState:
        """Return what the page shows now."""
        bits = sum(token["bits"] for token in self.tokens)
        facts = [f"{len(self.tokens)} tokens"]
        if self.tokens:
            facts.append(f"{bits / len(self.tokens):.2f} bits each")
        if self.state != "generating" and self.seconds:
            facts.append(f"{len(self.tokens) / self.seconds:,.0f} tokens per second")
        facts.append(_STATUS[self.state])
        if self.num_dropped:
            facts.append(f"the first {self.num_dropped:,} characters of the prompt do not fit into the context")
        return {
            "story": self.number,
            "model": self.model,
            "prompt": visible(self.prompt),
            "text": visible(self.text),
            "tokens": list(self.tokens),
            "state": "generating" if self.state == "generating" else "done",
            "facts": " · ".join(facts),
        }


class DemoBackend:
    """The models of the page with their schedulers, and the running requests of each open page.

    Attributes:
        names: of the models; the first one is selected initially.
    """

    def __init__(self, models: Mapping[str, TextGenerator]) -> None:
        self.names = list(models)
        self._models = dict(models)
        self._schedulers = {
            name: Scheduler(generator, publish_seconds=_UPDATE_SECONDS) for name, generator in models.items()
        }
        self._handles: defaultdict[str, set[RequestHandle]] = defaultdict(set)  # by session
        self._lock = threading.Lock()
        self._num_stories = 0
        for scheduler in self._schedulers.values():
            scheduler.start()

    def describe(self, name: str) -> str:
        """Describe a model in one line."""
        config = self._models[name].model.config
        size, family = short(num_parameters(config)), FAMILY_NAMES[config.architecture]
        return f"{family}, {size} parameters, context of {config.context_length:,} tokens"

    def generate(self, name: str, params: DemoParams, session: str) -> Iterator[ViewState]:
        """Generate a story and yield what to show of it until it has ended.

        ``session`` is the open page, which may stop the story with :meth:`stop`.

        Raises:
            UserError: the model does not exist, or the request is invalid.
        """
        if name not in self._models:
            raise UserError(f"model {name!r} not found")
        generator = self._models[name]
        with self._lock:
            self._num_stories += 1
            story = DemoStory(self._num_stories, name, params.prompt, len(generator.truncated_text(params.prompt)))
            handle = self._schedulers[name].submit(params.prompt, params.config(), seed=params.seed)
            self._handles[session].add(handle)
        started = time.monotonic()
        try:
            yield story.view()
            for chunk in handle:
                story.text += chunk.text
                story.tokens += [_token_view(generator, token) for token in chunk.logprobs]
                if chunk.finish_reason is None:
                    yield story.view()
                else:
                    story.state = chunk.finish_reason
            if story.state == "generating":
                story.state = "cancelled"
            story.seconds = time.monotonic() - started
            yield story.view()
        finally:
            handle.cancel()  # does nothing if it has ended; else the page was closed
            self._forget(session, handle)

    def stop(self, session: str) -> None:
        """Stop all stories of a page, within a step of the model."""
        with self._lock:
            handles = list(self._handles.get(session, ()))
        for handle in handles:
            handle.cancel()

    @property
    def num_running(self) -> int:
        """Number of stories that are being generated."""
        with self._lock:
            return sum(map(len, self._handles.values()))

    def close(self) -> None:
        """Stop all stories and schedulers."""
        for scheduler in self._schedulers.values():
            scheduler.stop(grace=0)

    def _forget(self, session: str, handle: RequestHandle) -> None:
        with self._lock:
            self._handles[session].discard(handle)
            if not self._handles[session]:
                del self._handles[session]


def _token_view(generator: TextGenerator, token: TokenLogprobs) -> ViewState:
    """Return what the page shows of a token: its color, and the model's prediction at its position."""
    assert token.logprob is not None  # only that of a prompt's first token is None
    tokenizer = generator.tokenizer

    def text(token_id: int) -> str:
        return tokenizer.token_text(token_id) if token_id < tokenizer.vocab_size else f"[{token_id}]"

    ids = [token_id for token_id, _ in token.top]
    rank = ids.index(token.id) + 1 if token.id in ids else 0
    alternatives = [(text(token_id), math.exp(logprob)) for token_id, logprob in token.top]
    surprise = TokenSurprise.of(text(token.id), token.logprob, rank, alternatives)
    return {**surprise.data(), "level": surprise.level}
