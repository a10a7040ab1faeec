"""The API of OpenAI, asked by its official client."""

import json
import math
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from served import Served

from tiny_lm.inference import GenerationConfig, TextGenerator

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 24}


@pytest.fixture
def client(server: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0, timeout=60) as client:
        yield client


def told(generator: TextGenerator, prompt: str, tokens: int, seed: int | None = None, **sampling: Any) -> str:
    request = GenerationConfig(max_new_tokens=tokens, **{"temperature": 1.0, **sampling})
    return generator.generate_batch([prompt], request, seed=seed)[0].text


def test_models_are_listed_and_shown(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["fox", "bear"]
    assert client.models.retrieve("bear").owned_by == "tiny-lm"
    with pytest.raises(openai.NotFoundError, match="there are: fox, bear"):
        client.models.retrieve("wolf")


def test_a_greedy_completion_is_what_the_generator_tells(client: openai.OpenAI, generator: TextGenerator) -> None:
    for prompt in ("Once upon a time", "", "Der Bär sagte: “né” 🦊"):
        completion = client.completions.create(model="fox", prompt=prompt, **GREEDY)
        [choice] = completion.choices
        assert choice.text == told(generator, prompt, 24, temperature=0)
        assert completion.usage and completion.usage.prompt_tokens == 1 + len(generator.tokenizer.encode(prompt))
        if choice.finish_reason == "length":
            assert completion.usage.completion_tokens == 24


def test_a_seed_is_the_generators_seed_and_each_text_has_its_own(
    client: openai.OpenAI, generator: TextGenerator
) -> None:
    completion = client.completions.create(model="fox", prompt="One day", max_tokens=20, seed=7, n=3, top_p=0.9)
    expected = [told(generator, "One day", 20, seed, top_p=0.9) for seed in (7, 8, 9)]
    assert [choice.text for choice in completion.choices] == expected
    assert len(set(expected)) == 3
    assert [choice.index for choice in completion.choices] == [0, 1, 2]


def test_penalties_and_further_options_are_the_generators(client: openai.OpenAI, generator: TextGenerator) -> None:
    completion = client.completions.create(
        model="fox", prompt="One day", max_tokens=40, seed=3, temperature=0.7, presence_penalty=1.5,
        frequency_penalty=0.5, extra_body={"top_k": 30, "min_p": 0.02, "repetition_penalty": 1.2},
    )  # fmt: skip
    assert completion.choices[0].text == told(
        generator, "One day", 40, 3, temperature=0.7, presence_penalty=1.5, frequency_penalty=0.5, top_k=30,
        min_p=0.02, repetition_penalty=1.2,
    )  # fmt: skip


def test_prompts_come_in_every_form(client: openai.OpenAI, generator: TextGenerator) -> None:
    texts = ["One day", "The fox"]
    ids = [generator.tokenizer.encode(text, bos=True) for text in texts]
    expected = [told(generator, text, 24, temperature=0) for text in texts]
    for prompt in (texts, ids):
        completion = client.completions.create(model="fox", prompt=prompt, **GREEDY)
        assert [choice.text for choice in completion.choices] == expected
        assert completion.usage and completion.usage.prompt_tokens == sum(map(len, ids))
    assert client.completions.create(model="fox", prompt=ids[1], **GREEDY).choices[0].text == expected[1]
    echoed = client.completions.create(model="fox", prompt=texts, echo=True, n=2, **GREEDY)
    assert [choice.text for choice in echoed.choices] == [texts[i] + expected[i] for i in (0, 0, 1, 1)]


def test_a_stream_adds_up_to_the_whole(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "fox", "prompt": ["One day", "The fox"], "n": 2, "seed": 5, "max_tokens": 30}
    whole = client.completions.create(**options, logprobs=2)
    texts, tokens, reasons, usage = [""] * 4, [[] for _ in range(4)], [None] * 4, None
    for event in client.completions.create(**options, logprobs=2, stream=True, stream_options={"include_usage": True}):
        usage = event.usage
        for choice in event.choices:
            texts[choice.index] += choice.text
            tokens[choice.index] += choice.logprobs.tokens if choice.logprobs else []
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.text for choice in whole.choices]
    assert tokens == [choice.logprobs.tokens for choice in whole.choices if choice.logprobs]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage


def test_stop_strings_end_a_text_before_them(client: openai.OpenAI, generator: TextGenerator) -> None:
    text = told(generator, "One day", 60, temperature=0)
    stop = text[10:13]
    for given in (stop, ["never in it", stop]):
        [choice] = client.completions.create(
            model="fox", prompt="One day", temperature=0, max_tokens=60, stop=given
        ).choices
        assert choice.text == text[: text.index(stop)]
        assert choice.finish_reason == "stop"


def test_logprobs_are_the_generators(client: openai.OpenAI, generator: TextGenerator) -> None:
    request = GenerationConfig(max_new_tokens=12, temperature=0, logprobs=3)
    [expected] = generator.generate_batch(["One day"], request)
    [choice] = client.completions.create(
        model="fox", prompt="One day", max_tokens=12, temperature=0, logprobs=3
    ).choices
    assert choice.logprobs and choice.logprobs.token_logprobs and choice.logprobs.top_logprobs
    assert choice.logprobs.token_logprobs == pytest.approx([drawn.logprob for drawn in expected.logprobs], abs=1e-5)
    text_of = generator.tokenizer.token_text
    assert choice.logprobs.tokens == [text_of(token) for token in expected.ids]
    for told_, drawn in zip(choice.logprobs.top_logprobs, expected.logprobs, strict=True):
        assert told_ == pytest.approx({text_of(token): logprob for token, logprob in drawn.top}, abs=1e-5)
    assert choice.logprobs.text_offset == [
        len(generator.tokenizer.decode(expected.ids[:i])) for i in range(len(expected.ids))
    ]


def test_a_chat_goes_on_with_the_messages_as_a_story(client: openai.OpenAI, generator: TextGenerator) -> None:
    answer = client.chat.completions.create(
        model="fox",
        messages=[
            {"role": "system", "content": "You are a pirate."},
            {"role": "user", "content": "Once upon a time"},
            {"role": "assistant", "content": " there was a fox."},
            {"role": "user", "content": [{"type": "text", "text": "It"}]},
        ],
        temperature=0, max_completion_tokens=20, logprobs=True, top_logprobs=2,
    )  # fmt: skip
    story = "Once upon a time there was a fox. It"
    request = GenerationConfig(max_new_tokens=20, temperature=0, logprobs=2)
    [expected] = generator.generate_batch([story], request)
    [choice] = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", expected.text)
    assert choice.logprobs and choice.logprobs.content
    assert b"".join(bytes(token.bytes or []) for token in choice.logprobs.content).decode() == expected.text
    for token, drawn in zip(choice.logprobs.content, expected.logprobs, strict=True):
        assert token.logprob == pytest.approx(drawn.logprob, abs=1e-5)
        assert [top.logprob for top in token.top_logprobs] == pytest.approx([p for _, p in drawn.top], abs=1e-5)


def test_tools_may_be_offered_and_are_not_called(client: openai.OpenAI) -> None:
    tools = [{"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}]
    ask: dict[str, Any] = {"model": "fox", "messages": [{"role": "user", "content": "The fox"}], **GREEDY}
    plain = client.chat.completions.create(**ask)
    offered = client.chat.completions.create(**ask, tools=tools, tool_choice="auto")
    assert offered.choices[0].message.content == plain.choices[0].message.content
    assert offered.choices[0].message.tool_calls is None
    with pytest.raises(openai.BadRequestError, match="tool_choice"):
        client.chat.completions.create(**ask, tools=tools, tool_choice="required")


def test_a_streamed_chat_adds_up_to_the_whole(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {
        "model": "fox", "messages": [{"role": "user", "content": "One day"}], "seed": 2, "n": 2, "max_tokens": 30,
    }  # fmt: skip
    whole = client.chat.completions.create(**options)
    with client.chat.completions.create(**options, stream=True) as stream:
        events = list(stream)
    roles = [choice.delta.role for event in events for choice in event.choices if choice.delta.role]
    assert roles == ["assistant", "assistant"]
    for index in range(2):
        pieces = [choice for event in events for choice in event.choices if choice.index == index]
        assert "".join(piece.delta.content or "" for piece in pieces) == whole.choices[index].message.content
        assert pieces[-1].finish_reason == whole.choices[index].finish_reason


def test_a_chat_longer_than_the_context_goes_on_from_its_end(client: openai.OpenAI, generator: TextGenerator) -> None:
    text = "The fox went home. " * 40
    answer = client.chat.completions.create(model="fox", messages=[{"role": "user", "content": text}], **GREEDY)
    assert answer.choices[0].message.content == told(generator, text, 24, temperature=0)
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="fox", prompt=text, **GREEDY)
    assert refused.value.code == "context_length_exceeded" and refused.value.param == "prompt"


def test_the_async_client_gets_many_texts_at_once(server: Served, generator: TextGenerator) -> None:
    import asyncio

    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused", timeout=60) as client:
            asked = [
                client.completions.create(model="fox", prompt=f"Day {number}", seed=number, max_tokens=20)
                for number in range(24)
            ]
            return [answer.choices[0].text for answer in await asyncio.gather(*asked)]

    assert asyncio.run(ask()) == [told(generator, f"Day {number}", 20, number) for number in range(24)]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"prompt": 3}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [512]}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"max_tokens": "3"}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"n": 17}, "n"),
        ({"prompt": ["a"] * 60, "n": 2}, None),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": ""}, "stop"),
        ({"seed": 1.5}, "seed"),
        ({"logprobs": 21}, "logprobs"),
        ({"logit_bias": {"5": 1.0}}, "logit_bias"),
        ({"suffix": "The end"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"model": None}, "model"),
        ({"model": "../../etc/passwd"}, "model"),
    ],
)
def test_a_wrong_field_is_named(server: Served, body: dict[str, Any], field: str | None) -> None:
    response = server.client.post("/v1/completions", content=json.dumps({"model": "fox", "prompt": "One day", **body}))
    assert response.status_code == (404 if body.get("model") else 400)
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == field and error["message"]


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"null", b"[]", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"model": "fox", "seed": ' + b"9" * 5000 + b"}"],
)
def test_what_is_no_request_is_refused(server: Served, content: bytes) -> None:
    for path in ("/v1/completions", "/v1/chat/completions"):
        response = server.client.post(path, content=content)
        assert response.status_code == 400 and response.json()["error"]["type"] == "invalid_request_error"
    for path in ("/api/generate", "/api/chat", "/api/show"):
        response = server.client.post(path, content=content)
        assert response.status_code == 400 and isinstance(response.json()["error"], str)


def test_other_content_paths_and_methods_are_refused_in_the_same_shape(server: Served) -> None:
    client = server.client
    body = b'{"model": "fox", "prompt": "One day"}'
    assert client.post("/v1/completions", content=body, headers={"content-type": "text/plain"}).status_code == 400
    for method, path, status in (
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/completions", 405),
        ("PUT", "/v1/models", 405),
    ):
        response = client.request(method, path)
        assert response.status_code == status
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    for path, first in (("/api/embed", "/api/version"), ("/v1/models/", "/v1/models"), ("/completions", "/v1/models")):
        assert f"{path} not found; there are: {first}, " in str(client.get(path).json()["error"])
    for path in ("/v1/models", "/api/tags", "/api/version", "/health"):
        assert (client.head(path).status_code, client.head(path).content) == (200, b"")


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b'{"prompt": 3}', "prompt: must be a text, token ids, or a list of texts or of lists of ids"),
        (b'{"prompt": [1, "a"]}', "prompt: must be a text, token ids, or a list of texts or of lists of ids"),
        (b'{"prompt": [[1], [-1]]}', "prompt.1.0: Input should be greater than or equal to 0"),
        (b'{"prompt": %s}' % (b"[" * 900 + b"]" * 900), "prompt: must be a text, token ids, or a list"),
        (b'{"metadata": %s}' % (b"[" * 90_000 + b"]" * 90_000), "the body is nested too deeply"),
        (b'{"stop": [null]}', "stop: must be a text or a list of texts"),
        (b'{"logit_bias": {"50": 1}}', "logit_bias: is not supported by this server: omit it, or leave it empty"),
        (b'{"prompt": "B\xe4r"}', "the body is not JSON: it is not UTF-8"),
        (b'{"prompt": "One" "day"}', "the body is not valid JSON (Expecting ',' delimiter, character"),
        (b"[1]", "the body must be a JSON object, and its content type application/json"),
    ],
)
def test_what_is_wrong_is_said_in_words(server: Served, body: bytes, told: str) -> None:
    content = body.replace(b"{", b'{"model": "fox", ', 1)
    error = server.client.post("/v1/completions", content=content).json()["error"]
    assert error["message"].startswith(told) and error["type"] == "invalid_request_error"


def test_parts_of_a_chat_that_are_no_text_are_named(server: Served) -> None:
    image = [{"type": "image_url", "image_url": {"url": "http://localhost/fox.png"}}]
    for fields, told in (
        ({"messages": [{"role": "user", "content": image}]}, "messages.0.content.0.type: Input should be 'text'"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content: must be a text or a list of parts"),
        ({"modalities": ["text", "audio"]}, "modalities.1: Input should be 'text'"),
        ({"function_call": {"name": "clock"}}, "function_call: Input should be 'none' or 'auto'"),
    ):
        body = {"model": "fox", "messages": [{"role": "user", "content": "One day"}], "max_tokens": 1, **fields}
        response = server.client.post("/v1/chat/completions", json=body)
        assert (response.status_code, response.json()["error"]["message"]) == (400, told)


def test_a_body_that_is_too_large_is_refused_unread(server: Served) -> None:
    def chunks() -> Any:
        for _ in range(40):
            yield b" " * 2**15

    for content in (b" " * (2**20 + 1), chunks()):
        try:
            response = server.client.post("/v1/completions", content=content)
        except httpx.WriteError:
            continue  # the server closed while we were still sending
        assert response.status_code == 413 and "1,048,576" in response.json()["error"]["message"]
