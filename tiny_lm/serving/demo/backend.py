"""What the page asks of the models, and what it shows of a story while it is told."""

import math
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tiny_lm.errors import UserError
from tiny_lm.inference import GenerationConfig, TextGenerator
from tiny_lm.inference.decoding import Drawn
from tiny_lm.model import FAMILY_NAMES, num_parameters
from tiny_lm.pages.surprise import TokenSurprise
from tiny_lm.pages.text import short, visible
from tiny_lm.serving.scheduler import RequestHandle, Scheduler

PROMPT_LENGTH = 2000
"""Most characters of a prompt."""
TOKENS = (50, 500)
"""Fewest and most tokens that may be asked for."""
TEMPERATURES = (0.1, 2.0)
SEEDS = 10_000

_ALTERNATIVES = 5
_REFRESH_SECONDS = 0.06
"""A story is shown anew so often; more often would cost the browser time and show nothing more to the eye."""

_ENDINGS = {
    "telling": "telling …",
    "stop": "the model ended it",
    "length": "it reached the most tokens",
    "cancelled": "stopped",
}

View = dict[str, Any]
"""What the script of the page reads of one story."""

NO_STORY: View = {"story": 0, "state": "none"}
"""The place of a story that is not told."""


@dataclass(frozen=True)
class DemoParams:
    """What the page asks for.

    Raises:
        UserError: a value is beyond what the page offers.
    """

    prompt: str
    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int

    def __post_init__(self) -> None:
        if len(self.prompt) > PROMPT_LENGTH:
            raise UserError(f"the beginning has {len(self.prompt):,} characters; {PROMPT_LENGTH:,} are the most")
        for name, value, (low, high) in (
            ("the number of tokens", self.max_new_tokens, TOKENS),
            ("the temperature", self.temperature, TEMPERATURES),
            ("the seed", self.seed, (0, SEEDS - 1)),
        ):
            if not low <= value <= high:
                raise UserError(f"{name} must be between {low} and {high} (it is {value})")

    def request(self) -> GenerationConfig:
        """Return it as a generator is asked."""
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            logprobs=_ALTERNATIVES,
        )


@dataclass
class Story:
    """A story in the making."""

    number: int
    model: str
    prompt: str
    dropped: int
    """Characters at the beginning of the prompt that the context has no room for."""
    text: str = ""
    tokens: list[View] = field(default_factory=list)
    state: str = "telling"
    seconds: float = 0.0

    def view(self) -> View:
        """Return what the page shows now."""
        bits = sum(token["bits"] for token in self.tokens)
        facts = [f"{len(self.tokens)} tokens"]
        if self.tokens:
            facts.append(f"{bits / len(self.tokens):.2f} bits each")
        if self.state != "telling" and self.seconds:
            facts.append(f"{len(self.tokens) / self.seconds:,.0f} tokens a second")
        facts.append(_ENDINGS[self.state])
        if self.dropped:
            facts.append(f"the first {self.dropped:,} characters of the beginning do not fit into the context")
        return {
            "story": self.number,
            "model": self.model,
            "prompt": visible(self.prompt),
            "text": visible(self.text),
            "tokens": list(self.tokens),
            "state": "telling" if self.state == "telling" else "told",
            "facts": " · ".join(facts),
        }


class DemoBackend:
    """The models of the page, each with its loop, and who is listening.

    Attributes:
        names: the menu; the first is the one that is chosen at first.
    """

    def __init__(self, models: Mapping[str, TextGenerator]) -> None:
        self.names = list(models)
        self._models = dict(models)
        self._loops = {name: Scheduler(generator, refresh=_REFRESH_SECONDS) for name, generator in models.items()}
        self._tickets: defaultdict[str, set[RequestHandle]] = defaultdict(set)  # of each open page
        self._lock = threading.Lock()
        self._told = 0
        for loop in self._loops.values():
            loop.start()

    def describe(self, name: str) -> str:
        """Say in a line what a model is."""
        config = self._models[name].model.config
        size, family = short(num_parameters(config)), FAMILY_NAMES[config.architecture]
        return f"{family}, {size} parameters, context of {config.context_length:,} tokens"

    def tell(self, name: str, wish: DemoParams, listener: str) -> Iterator[View]:
        """Yield what to show of a story, again and again until it ends.

        Args:
            name: one of the menu.
            wish: what is asked for.
            listener: who may stop it with :meth:`stop`.

        Raises:
            UserError: there is no such model, or it cannot be asked this.
        """
        if name not in self._models:
            raise UserError(f"there is no model {name!r} here")
        generator = self._models[name]
        with self._lock:
            self._told += 1
            story = Story(self._told, name, wish.prompt, len(generator.dropped(wish.prompt)))
            ticket = self._loops[name].submit(wish.prompt, wish.request(), seed=wish.seed)
            self._tickets[listener].add(ticket)
        began = time.monotonic()
        try:
            yield story.view()
            for piece in ticket:
                story.text += piece.text
                story.tokens += [_view_token(generator, drawn) for drawn in piece.drawn]
                if piece.finish_reason is None:
                    yield story.view()
                else:
                    story.state = piece.finish_reason
            if story.state == "telling":
                story.state = "cancelled"
            story.seconds = time.monotonic() - began
            yield story.view()
        finally:
            ticket.cancel()  # nothing, where it has ended; else the page was closed
            self._forget(listener, ticket)

    def stop(self, listener: str) -> None:
        """End all stories that are told to ``listener``, within a step of the model."""
        with self._lock:
            tickets = list(self._tickets.get(listener, ()))
        for ticket in tickets:
            ticket.cancel()

    @property
    def telling(self) -> int:
        """Number of stories that are being told."""
        with self._lock:
            return sum(map(len, self._tickets.values()))

    def close(self) -> None:
        """End all stories and loops."""
        for loop in self._loops.values():
            loop.stop(grace=0)

    def _forget(self, listener: str, ticket: RequestHandle) -> None:
        with self._lock:
            self._tickets[listener].discard(ticket)
            if not self._tickets[listener]:
                del self._tickets[listener]


def _view_token(generator: TextGenerator, drawn: Drawn) -> View:
    """Return what the page shows of a token: its colour, and what the model thought before it came."""
    assert drawn.logprob is not None  # it was asked for
    tokenizer = generator.tokenizer

    def text(token: int) -> str:
        return tokenizer.token_text(token) if token < tokenizer.vocab_size else f"[{token}]"

    ids = [token for token, _ in drawn.top]
    rank = ids.index(drawn.id) + 1 if drawn.id in ids else 0
    alternatives = [(text(token), math.exp(logprob)) for token, logprob in drawn.top]
    surprise = TokenSurprise.of(text(drawn.id), drawn.logprob, rank, alternatives)
    return {**surprise.data(), "level": surprise.level}
