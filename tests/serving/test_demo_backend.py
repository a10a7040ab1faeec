"""What the demo page shows of stories, and what becomes of those who stop or leave."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tiny_lm.errors import UserError
from tiny_lm.inference import TextGenerator
from tiny_lm.pages.text import visible
from tiny_lm.serving.demo.backend import PROMPT_LENGTH, DemoBackend, DemoParams
from tiny_lm.tokenizer import Tokenizer

sys.path.append(str(Path(__file__).parents[1] / "inference"))  # generators.py
from generators import make

WISH = DemoParams("One day", 60, 0.9, 40, 0.9, 5)


@pytest.fixture(scope="module")
def generator(tokenizer: Tokenizer) -> TextGenerator:
    return make(tokenizer)


@pytest.fixture(scope="module")
def tellers(generator: TextGenerator, tokenizer: Tokenizer) -> Iterator[DemoBackend]:
    tellers = DemoBackend({"small": generator, "other": make(tokenizer, "llama3")})
    yield tellers
    tellers.close()


def test_a_story_is_what_the_generator_tells(tellers: DemoBackend, generator: TextGenerator) -> None:
    views = list(tellers.tell("small", WISH, "me"))
    (expected,) = generator.generate_batch([WISH.prompt], WISH.request(), seed=WISH.seed)
    last = views[-1]
    assert (last["prompt"], last["text"], last["state"]) == ("One day", visible(expected.text), "told")
    assert views[0]["state"] == "telling"
    texts = [view["text"] for view in views]
    assert texts == sorted(texts, key=len)
    assert len(last["tokens"]) == len(expected.ids)
    assert f"{len(expected.ids)} tokens · " in last["facts"]
    for token, drawn in zip(last["tokens"], expected.drawn, strict=True):
        assert token["text"] == visible(generator.tokenizer.token_text(drawn.id))
        assert token["p"] == pytest.approx(2.0 ** -token["bits"], rel=0.01)
        shares = [share for _, share in token["others"]]
        assert len(shares) == 5
        assert shares == sorted(shares, reverse=True)
        assert (token["rank"] == 0) == (drawn.id not in [other for other, _ in drawn.top])
    assert tellers.telling == 0


def test_stopping_ends_the_stories_of_one_page_only(tellers: DemoBackend) -> None:
    long = DemoParams("One day", 500, 0.9, 0, 1.0, 5)
    mine, theirs = tellers.tell("small", long, "me"), tellers.tell("other", long, "them")
    next(mine), next(theirs)
    tellers.stop("me")
    assert list(mine)[-1]["facts"].endswith("stopped")
    assert tellers.telling == 1
    assert not list(theirs)[-1]["facts"].endswith("stopped")
    assert tellers.telling == 0


def test_a_listener_who_leaves_frees_the_model(tellers: DemoBackend) -> None:
    told = tellers.tell("small", DemoParams("One day", 500, 0.9, 0, 1.0, 5), "me")
    next(told)
    assert tellers.telling == 1
    told.close()
    assert tellers.telling == 0


def test_a_beginning_beyond_the_context_is_told(tellers: DemoBackend) -> None:
    *_, last = tellers.tell("small", DemoParams("word " * 200, 50, 1.0, 0, 1.0, 0), "me")
    assert "characters of the beginning do not fit into the context" in last["facts"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompt": "x" * (PROMPT_LENGTH + 1)}, "2,001 characters; 2,000 are the most"),
        ({"max_new_tokens": 501}, "the number of tokens must be between 50 and 500"),
        ({"max_new_tokens": 49}, "the number of tokens must be between 50 and 500"),
        ({"temperature": 0.0}, "the temperature must be between 0.1 and 2.0"),
        ({"seed": -1}, "the seed must be between 0 and 9999"),
    ],
)
def test_what_the_page_does_not_offer_is_refused(values: dict[str, object], message: str) -> None:
    usual = {"prompt": "", "max_new_tokens": 50, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 0}
    with pytest.raises(UserError, match=message):
        DemoParams(**{**usual, **values})  # type: ignore[arg-type]  # of the right types, or it is no test


def test_an_unknown_model_is_refused(tellers: DemoBackend) -> None:
    with pytest.raises(UserError, match="there is no model 'nobody' here"):
        next(tellers.tell("nobody", WISH, "me"))
