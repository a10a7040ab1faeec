"""The API of Ollama, asked by its official client."""

import json
from collections.abc import Iterator

import httpx
import ollama
import pytest
from served import Served

from tiny_lm.inference import GenerationConfig, TextGenerator


@pytest.fixture
def client(server: Served) -> Iterator[ollama.Client]:
    with ollama.Client(host=server.url) as client:
        yield client


def test_the_client_finds_the_server_and_its_models(server: Served, client: ollama.Client) -> None:
    assert httpx.get(server.url).text == "Ollama is running"
    assert httpx.head(server.url).status_code == 200
    assert tuple(map(int, httpx.get(f"{server.url}/api/version").json()["version"].split("."))) >= (0, 6, 4)
    assert [model.model for model in client.list().models] == ["fox:latest", "bear:latest"]
    assert [model.model for model in client.ps().models] == ["fox:latest", "bear:latest"]
    shown = client.show("fox")
    assert shown.details and shown.details.family == "gpt2"
    assert shown.modelinfo and shown.modelinfo["gpt2.context_length"] == 64
    with pytest.raises(ollama.ResponseError, match="model 'wolf' not found") as refused:
        client.show("wolf")
    assert refused.value.status_code == 404


def test_a_generation_is_what_the_generator_tells(client: ollama.Client, generator: TextGenerator) -> None:
    options = {"num_predict": 20, "temperature": 0.7, "top_k": 30, "top_p": 0.8, "seed": 4, "repeat_penalty": 1.3}
    config = GenerationConfig(max_new_tokens=20, temperature=0.7, top_k=30, top_p=0.8, repetition_penalty=1.3)
    [expected] = generator.generate_batch(["One day"], config, seed=4)
    whole = client.generate("fox:latest", "One day", options=options)
    assert whole.response == expected.text
    assert (whole.done, whole.done_reason) == (True, expected.finish_reason)
    assert whole.prompt_eval_count == 1 + len(generator.tokenizer.encode("One day"))
    assert whole.eval_count and whole.eval_duration and whole.total_duration
    assert whole.total_duration >= whole.eval_duration
    *pieces, last = client.generate("fox", "One day", options=options, stream=True)
    assert "".join(piece.response for piece in pieces) == expected.text
    assert last.done and not last.response and last.eval_count == whole.eval_count
    assert not any(piece.done for piece in pieces)


def test_the_defaults_are_ollamas_and_raw_changes_nothing_without_a_template(
    client: ollama.Client, generator: TextGenerator
) -> None:
    config = GenerationConfig(max_new_tokens=64, temperature=0.8, top_k=40, top_p=0.9, repetition_penalty=1.1)
    [expected] = generator.generate_batch(["One day"], config, seed=1)
    for raw in (False, True):
        assert client.generate("fox", "One day", raw=raw, options={"seed": 1}).response == expected.text


def test_a_chat_goes_on_with_the_story(client: ollama.Client, generator: TextGenerator) -> None:
    messages = [{"role": "user", "content": "One day"}, {"role": "assistant", "content": " he"}]
    [expected] = generator.generate_batch(["One day he"], GenerationConfig(max_new_tokens=20, temperature=0))
    options = {"temperature": 0, "num_predict": 20, "repeat_penalty": 1.0, "num_ctx": 2048}
    answer = client.chat("fox", messages, options=options)
    assert answer.message.role == "assistant" and answer.message.content == expected.text
    pieces = list(client.chat("fox", messages, options=options, stream=True))
    assert "".join(piece.message.content or "" for piece in pieces) == expected.text
    assert pieces[-1].done_reason == expected.finish_reason
    stopped = client.chat("fox", messages, options={**options, "stop": [expected.text[4:6]]})
    assert stopped.message.content == expected.text[: expected.text.index(expected.text[4:6])]
    assert stopped.done_reason == "stop"


def test_what_means_nothing_here_is_passed_over(client: ollama.Client, generator: TextGenerator) -> None:
    [expected] = generator.generate_batch(
        ["One day"], GenerationConfig(max_new_tokens=9, temperature=0.0, top_k=40, top_p=0.9, repetition_penalty=1.1)
    )
    options = {"num_predict": 9, "temperature": 0, "num_ctx": 4096, "mirostat": 1, "num_thread": 3}
    told = client.generate("fox", "One day", options=options, keep_alive="5m", raw=True, format="", context=[])
    assert told.response == expected.text


def test_an_older_name_of_the_model_field_is_understood(server: Served) -> None:
    assert server.client.post("/api/show", json={"name": "fox"}).json()["details"]["family"] == "gpt2"


def test_an_empty_request_loads_the_model(client: ollama.Client) -> None:
    assert client.generate("fox").done_reason == "load"
    assert client.chat("fox").done_reason == "load"


def test_a_line_of_ollamas_documentation_works_without_a_content_type(server: Served) -> None:
    response = httpx.post(
        f"{server.url}/api/generate",
        content=json.dumps({"model": "fox", "prompt": "One day", "options": {"num_predict": 4}}),
        headers={"content-type": "application/x-www-form-urlencoded"},  # what curl -d sends
    )
    lines = [json.loads(line) for line in response.text.splitlines()]
    assert response.headers["content-type"] == "application/x-ndjson"
    assert lines[-1]["done"] and lines[-1]["eval_count"] == 4


def test_what_cannot_be_honoured_is_refused(client: ollama.Client) -> None:
    with pytest.raises(ollama.ResponseError, match="format") as refused:
        client.generate("fox", "One day", format="json")
    assert refused.value.status_code == 400
    for field in ({"format": {"type": "object"}}, {"template": "{{ .Prompt }}!"}, {"context": [1, 2]}):
        with pytest.raises(ollama.ResponseError, match=f"{next(iter(field))}: is not supported by this server"):
            client.generate("fox", "One day", **field)
    with pytest.raises(ollama.ResponseError, match="/api/embed not found"):
        client.embed("fox", "One day")
    with pytest.raises(ollama.ResponseError, match="suffix"):
        client.generate("fox", "One day", suffix="the end")
    with pytest.raises(ollama.ResponseError, match="think"):
        client.chat("fox", [{"role": "user", "content": "One day"}], think=True)
