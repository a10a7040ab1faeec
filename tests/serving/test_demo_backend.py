"""What the demo page shows of stories, and what happens when it is stopped or closed."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tiny_lm.errors import UserError
from tiny_lm.inference import TextGenerator
from tiny_lm.pages.text import visible
from tiny_lm.serving.demo.backend import MAX_PROMPT_LENGTH, DemoBackend, DemoParams
from tiny_lm.tokenizer import Tokenizer

sys.path.append(str(Path(__file__).parents[1] / "inference"))  # generators.py
from generators import make

PARAMS = DemoParams("One day", 60, 0.9, 40, 0.9, 5)


@pytest.fixture(scope="module")
def generator(tokenizer: Tokenizer) -> TextGenerator:
    return make(tokenizer)


@pytest.fixture(scope="module")
def backend(generator: TextGenerator, tokenizer: Tokenizer) -> Iterator[DemoBackend]:
    backend = DemoBackend({"small": generator, "other": make(tokenizer, "llama3")})
    yield backend
    backend.close()


def test_demo_story_equals_the_generators(backend: DemoBackend, generator: TextGenerator) -> None:
    views = list(backend.generate("small", PARAMS, "me"))
    (expected,) = generator.generate_batch([PARAMS.prompt], PARAMS.config(), seed=PARAMS.seed)
    last = views[-1]
    assert (last["prompt"], last["text"], last["state"]) == ("One day", visible(expected.text), "done")
    assert views[0]["state"] == "generating"
    texts = [view["text"] for view in views]
    assert texts == sorted(texts, key=len)
    assert len(last["tokens"]) == len(expected.ids)
    assert f"{len(expected.ids)} tokens · " in last["facts"]
    for token, drawn in zip(last["tokens"], expected.logprobs, strict=True):
        assert token["text"] == visible(generator.tokenizer.token_text(drawn.id))
        assert token["p"] == pytest.approx(2.0 ** -token["bits"], rel=0.01)
        shares = [share for _, share in token["others"]]
        assert len(shares) == 5
        assert shares == sorted(shares, reverse=True)
        assert (token["rank"] == 0) == (drawn.id not in [other for other, _ in drawn.top])
    assert backend.num_running == 0


def test_stopping_ends_the_stories_of_one_page_only(backend: DemoBackend) -> None:
    long = DemoParams("One day", 500, 0.9, 0, 1.0, 5)
    mine, theirs = backend.generate("small", long, "me"), backend.generate("other", long, "them")
    next(mine), next(theirs)
    backend.stop("me")
    assert list(mine)[-1]["facts"].endswith("stopped")
    assert backend.num_running == 1
    assert not list(theirs)[-1]["facts"].endswith("stopped")
    assert backend.num_running == 0


def test_closing_the_page_frees_the_model(backend: DemoBackend) -> None:
    views = backend.generate("small", DemoParams("One day", 500, 0.9, 0, 1.0, 5), "me")
    next(views)
    assert backend.num_running == 1
    views.close()
    assert backend.num_running == 0


def test_demo_reports_a_truncated_prompt(backend: DemoBackend) -> None:
    *_, last = backend.generate("small", DemoParams("word " * 200, 50, 1.0, 0, 1.0, 0), "me")
    assert "characters of the prompt do not fit into the context" in last["facts"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompt": "x" * (MAX_PROMPT_LENGTH + 1)}, "2,001 characters; the maximum is 2,000"),
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


def test_an_unknown_model_is_refused(backend: DemoBackend) -> None:
    with pytest.raises(UserError, match="model 'nobody' not found"):
        next(backend.generate("nobody", PARAMS, "me"))
