"""Prompts told with their log-probabilities (`echo` and `logprobs`), and lm-eval's own client, which lives on them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch
from served import Served

from tiny_lm.errors import UserError
from tiny_lm.evaluation.harness import run_harness
from tiny_lm.export.huggingface import write_huggingface
from tiny_lm.export.source import load_source
from tiny_lm.inference import GenerationConfig, TextGenerator
from tiny_lm.serving.scheduler import Scheduler

TASKS = Path(__file__).parent.parent / "fixtures" / "harness_tasks"
TEXT = "Once upon a time there was a fox. Der Bär 🦊"


@pytest.fixture
def client(server: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0, timeout=60) as client:
        yield client


def test_a_text_is_told_with_the_log_probability_of_each_token(client: openai.OpenAI, generator: TextGenerator) -> None:
    tokenizer = generator.tokenizer
    ids = tokenizer.encode(TEXT, bos=True)
    expected = generator.score(TEXT).logprobs  # of all but bos
    with torch.no_grad():
        logits = generator.model(torch.tensor([ids]))[0]
    options: dict[str, Any] = {"model": "fox", "echo": True, "logprobs": 3, "max_tokens": 0}
    for prompt, told_ids, told in ((TEXT, ids[1:], expected[1:]), (ids, ids, expected)):
        answer = client.completions.create(prompt=prompt, **options)
        [choice] = answer.choices
        assert (choice.text, choice.finish_reason) == (TEXT, "length")
        assert answer.usage and (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), 0)
        found = choice.logprobs
        assert found and found.tokens and found.token_logprobs and found.top_logprobs and found.text_offset
        assert found.tokens == [tokenizer.token_text(token) for token in told_ids]
        assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
        assert found.token_logprobs[1:] == pytest.approx(told, abs=1e-4)
        begins = [tokenizer.decode(ids[:end]) for end in range(len(ids) - len(told_ids), len(ids))]
        assert found.text_offset == [len(begin.removesuffix("\ufffd")) for begin in begins]
        for place, (token, top) in enumerate(zip(told_ids, found.top_logprobs, strict=True)):
            if top is not None:
                row = logits[len(ids) - len(told_ids) + place - 1].log_softmax(dim=-1)
                assert max(top.values()) == pytest.approx(float(row.max()), abs=1e-4)
                assert 3 <= len(top) <= 4 and tokenizer.token_text(token) in top


def test_prompts_of_every_form_have_their_own_and_a_stream_adds_up(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "fox", "echo": True, "logprobs": 1, "n": 2, "seed": 3, "max_tokens": 20}
    prompts = ["One day", TEXT, ""]
    whole = client.completions.create(prompt=prompts, **options)
    alone = [choice for prompt in prompts for choice in client.completions.create(prompt=prompt, **options).choices]
    texts, tokens, offsets = [""] * 6, [[] for _ in range(6)], [[] for _ in range(6)]
    for event in client.completions.create(prompt=prompts, **options, stream=True):
        for choice in event.choices:
            assert choice.logprobs
            texts[choice.index] += choice.text
            tokens[choice.index] += choice.logprobs.tokens or []
            offsets[choice.index] += choice.logprobs.text_offset or []
    for index, choice in enumerate(whole.choices):
        assert choice.logprobs and alone[index].logprobs
        assert choice.text == alone[index].text == texts[index] and choice.text.startswith(prompts[index // 2])
        assert choice.logprobs.tokens == alone[index].logprobs.tokens == tokens[index]
        assert choice.logprobs.text_offset == offsets[index]


def test_the_token_that_ends_a_text_is_told_as_usage_counts_it(client: openai.OpenAI, generator: TextGenerator) -> None:
    """Who reads tokens by their places (as lm-eval does) would else take the prompt's last one for a generated one."""
    answer = client.completions.create(
        model="fox", prompt=["One day"] * 4, n=16, max_tokens=60, temperature=2, seed=1, logprobs=1, echo=True
    )
    ended = [choice for choice in answer.choices if choice.finish_reason == "stop"]
    assert 0 < len(ended) < 64
    for choice in answer.choices:
        assert choice.logprobs and choice.logprobs.tokens
        assert (choice.logprobs.tokens[-1] == "<eos>") == (choice in ended)
    prompt = len(generator.tokenizer.encode("One day"))
    told = [len(choice.logprobs.tokens) - prompt for choice in answer.choices if choice.logprobs]
    assert answer.usage and answer.usage.completion_tokens == sum(told)


def test_lm_evals_client_finds_what_our_own_harness_finds(
    server: Served, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.openai_completions import LocalCompletionsAPI
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.chdir(TASKS)  # the tasks name their questions relative to here
    tasks = ["tiny_endings", "tiny_perplexity", "tiny_continue"]
    ours = run_harness(run_folder, tasks, include_path=TASKS)["samples"]
    write_huggingface(load_source(run_folder), tmp_path / "fox")  # its tokenizer begins texts with bos, as training did
    theirs: dict[str, Any] = {}
    for names, options in (
        (["tiny_endings", "tiny_continue"], {"add_bos_token": True, "num_concurrent": 3}),
        (["tiny_perplexity"], {}),  # for which the harness itself begins a text with bos
    ):
        client = LocalCompletionsAPI(
            base_url=f"{server.url}/v1/completions", model="fox", tokenizer=str(tmp_path / "fox"), max_length=64,
            batch_size=3, **options,
        )  # fmt: skip
        manager = TaskManager(include_path=TASKS, include_defaults=False)
        theirs |= simple_evaluate(client, tasks=names, task_manager=manager, bootstrap_iters=0)["samples"]
    for task in tasks:
        found, expected = ([sample["resps"] for sample in samples[task]] for samples in (theirs, ours))
        assert np.array(found).shape == np.array(expected).shape and len(found) == 4
        for one, other in zip(np.array(found).flat, np.array(expected).flat, strict=True):
            assert one == other or float(one) == pytest.approx(float(other), abs=1e-3)


def test_long_prompts_are_scored_in_parts_while_others_go_on(generator: TextGenerator) -> None:
    ids = generator.tokenizer.encode(TEXT * 3, bos=True)[:64]
    whole, parts = generator.new_prompt_scorer(ids, top_logprobs=2), generator.new_prompt_scorer(ids, top_logprobs=2)
    whole.advance(64)
    for done in range(7, 64 + 7, 7):
        parts.advance(7)
        assert len(parts.tokens) == min(1 + done, 64)
    assert [token.logprob for token in parts.tokens[1:]] == pytest.approx(
        [token.logprob for token in whole.tokens[1:]], abs=1e-4
    )
    with pytest.raises(UserError, match="the prompt has 65 tokens"):
        generator.new_prompt_scorer([*ids, 1])
    with pytest.raises(UserError, match="is out of range"):
        generator.new_prompt_scorer([512])

    loop = Scheduler(generator, slots=2, max_prefill_tokens=8)
    greedy = GenerationConfig(max_new_tokens=60, min_new_tokens=60, temperature=0.0)
    other = loop.submit("One day", greedy)
    score = generator.new_prompt_scorer(ids)
    read = loop.submit(ids, GenerationConfig(max_new_tokens=0), prompt_scorer=score)
    waits = loop.submit("One day", greedy)  # until the prompt has been read
    loop.start()
    assert read.result().ids == [] and other.completion_tokens < 60
    assert other.result() == waits.result() == generator.generate_batch(["One day"], greedy)[0]
    left = loop.submit(ids, GenerationConfig(max_new_tokens=5), prompt_scorer=generator.new_prompt_scorer(ids))
    left.cancel()
    loop.stop(grace=60)
    assert loop.stats.running == 0 and loop.stats.finished + loop.stats.cancelled == 4
