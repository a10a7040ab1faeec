import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from generators import FAMILIES, GREEDY, generated_ids, make, suppressed_tokens

from tiny_lm.data import BinDataConfig
from tiny_lm.errors import UserError
from tiny_lm.inference import GenerationConfig, SamplingParams, TextGenerator
from tiny_lm.model import KVCache, Transformer, model_config_from_dict
from tiny_lm.runs import Run
from tiny_lm.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer
from tiny_lm.training import TrainingConfig
from tiny_lm.training.fit import train


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_generation_equals_reading_everything_again(family: str, tokenizer: Tokenizer) -> None:
    generator = make(tokenizer, family)
    prompt = "Once upon a time, there was a bear"
    ids = generator.tokenizer.encode(prompt, bos=True)
    forbidden = suppressed_tokens(generator)
    expected = list(ids)
    with torch.no_grad():
        for _ in range(30):
            logits = generator.model(torch.tensor([expected]))[0, -1]
            expected.append(int(logits.masked_fill(forbidden, float("-inf")).argmax()))
    assert generated_ids(generator, prompt, 30) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_text_goes_on_beyond_the_context(family: str, tokenizer: Tokenizer) -> None:
    generator = make(tokenizer, family)
    assert len(generated_ids(generator, "A bear", 200)) == 200 + len(tokenizer.encode("A bear", bos=True))


def test_the_window_slides_by_reading_its_later_half_again(tokenizer: Tokenizer) -> None:
    generator = make(tokenizer)
    ids = generated_ids(generator, "", 65)  # bos and 63 tokens fill the context; the 64th makes the window slide
    forbidden = suppressed_tokens(generator)
    with torch.no_grad():
        logits = generator.model(torch.tensor([ids[65 - 32 : 65]]))[0, -1]
    assert ids[65] == int(logits.masked_fill(forbidden, float("-inf")).argmax())


def test_prompt_longer_than_the_context_keeps_its_end(tokenizer: Tokenizer) -> None:
    generator = make(tokenizer)
    prompt = "The bear and the fox went home. " * 20
    ids = tokenizer.encode(prompt, bos=True)
    assert len(ids) > 64
    with torch.no_grad():
        logits = generator.model(torch.tensor([ids[-64:]]))[0, -1]
    forbidden = suppressed_tokens(generator)
    expected = int(logits.masked_fill(forbidden, float("-inf")).argmax())
    assert generated_ids(generator, prompt, 1)[-1] == expected


@pytest.mark.parametrize(("prompts", "new", "held"), [(["One day", "A bear"], 20, 32), (["One day"], 200, 64)])
def test_memory_is_taken_for_the_longest_text_only(
    prompts: list[str], new: int, held: int, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator, lengths = make(tokenizer), []
    new_cache = Transformer.new_cache

    def spied(model: Transformer, batch_size: int, max_length: int | None = None) -> KVCache:
        lengths.append(max_length)
        return new_cache(model, batch_size, max_length)

    monkeypatch.setattr(Transformer, "new_cache", spied)
    generator.generate_batch(prompts, GenerationConfig(max_new_tokens=new, min_new_tokens=new))
    assert lengths == [held]


SPECIALS = {"pad": "<pad>", "eos": "<eos>", "bos": "<bos>", "unk": "<unk>"}
PROMPTS = ["", "One day", "Once upon a time, there was a bear and a fox", "The bear", "One day"]


@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams(temperature=1.0, top_p=0.9, repetition_penalty=1.2)])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_gives_each_prompt_the_text_that_it_gets_alone(
    family: str, sampling: SamplingParams, tokenizer: Tokenizer
) -> None:
    generator = make(tokenizer, family)
    request = GenerationConfig(max_new_tokens=90, **asdict(sampling))  # the windows of all slide, each at its own step
    seeds = [5, 6, 7, 8, 6]
    together = generator.generate_batch(PROMPTS, request, seed=seeds)
    alone = [generator.generate_batch([p], request, seed=s)[0] for p, s in zip(PROMPTS, seeds, strict=True)]
    assert together == alone
    assert together[1] == together[4] != together[2]  # equal prompts with equal seeds get equal texts
    if sampling.temperature:
        assert together[0].text == "".join(generator.stream("", request, seed=5))


def test_rows_that_end_give_their_places_back_and_leave_the_others_alone(tokenizer: Tokenizer) -> None:
    generator = make(tokenizer)
    prompts = [f"{word} went home" for word in ["one", "two", "three", "four", "five", "six", "seven", "eight"]]
    longest = generator.generate_batch(prompts, GenerationConfig(max_new_tokens=50, temperature=0))
    letters = sorted({text.text[10:12] for text in longest})
    stopped = generator.generate_batch(
        prompts, GenerationConfig(max_new_tokens=50, temperature=0, stop=tuple(letters[:6]))
    )
    assert {text.finish_reason for text in stopped} == {"stop", "length"}
    for whole, cut in zip(longest, stopped, strict=True):
        assert whole.text.startswith(cut.text)
        assert cut.finish_reason == "stop" or cut.text == whole.text


def test_options_are_keywords_or_a_config_and_an_unknown_one_names_the_nearest(tokenizer: Tokenizer) -> None:
    generator = make(tokenizer)
    config = GenerationConfig(max_new_tokens=9, temperature=1.0, top_p=0.9, stop="z", repetition_penalty=1.2)
    options = {"temperature": 1.0, "top_p": 0.9, "stop": "z", "repetition_penalty": 1.2}
    [expected] = generator.generate_batch(["One day"], config, seed=3)
    assert generator.generate_batch(["One day"], max_new_tokens=9, seed=3, **options) == [expected]
    assert generator.generate_batch(["One day"], config, max_new_tokens=2, seed=3)[0].ids == expected.ids[:2]
    assert "".join(generator.stream("One day", max_new_tokens=9, seed=3, **options)) == expected.text
    assert generator.generate("One day", 9, seed=3, **options) == "One day" + expected.text
    for method in (generator.generate, generator.stream):
        with pytest.raises(TypeError, match="unknown option 'max_tokens'; did you mean 'max_new_tokens'"):
            method("One day", max_tokens=9)
    with pytest.raises(TypeError, match="unknown option 'temprature'; did you mean 'temperature'"):
        generator.generate_batch(["One day"], temprature=0)


def test_many_prompts_are_continued_some_at_a_time(tokenizer: Tokenizer) -> None:
    generator = make(tokenizer)
    texts = generator.generate_batch(["One day"] * 150, GenerationConfig(max_new_tokens=4), seed=list(range(150)))
    assert texts[149] == generator.generate_batch(["One day"], GenerationConfig(max_new_tokens=4), seed=149)[0]
    assert generator.generate_batch([], GenerationConfig(max_new_tokens=4)) == []


def test_penalties_keep_tokens_from_coming_again(tokenizer: Tokenizer) -> None:
    generator = make(tokenizer)
    plain, repeated, present = (
        generator.generate_batch(
            ["One day"], GenerationConfig(max_new_tokens=60, min_new_tokens=60, **asdict(sampling))
        )[0].ids
        for sampling in (
            GREEDY,
            SamplingParams(temperature=0, repetition_penalty=100.0),
            SamplingParams(temperature=0, presence_penalty=100.0),
        )
    )
    assert len(set(plain)) < 60 == len(set(repeated)) == len(set(present))
    assert not set(repeated) & set(tokenizer.encode("One day"))


def test_logprobs_are_those_of_the_model_alone(tokenizer: Tokenizer) -> None:
    generator = make(tokenizer)
    request = GenerationConfig(
        max_new_tokens=12, min_new_tokens=12, temperature=2.0, top_k=5, frequency_penalty=1.0, logprobs=3
    )
    [text] = generator.generate_batch(["One day"], request, seed=1)
    ids = tokenizer.encode("One day", bos=True)
    with torch.no_grad():
        expected = generator.model(torch.tensor([ids + text.ids]))[0, len(ids) - 1 : -1].log_softmax(-1)
    for drawn, row in zip(text.logprobs, expected, strict=True):
        assert drawn.logprob == pytest.approx(float(row[drawn.id]), abs=1e-4)
        assert [token for token, _ in drawn.top] == row.topk(3).indices.tolist()
        assert [logprob for _, logprob in drawn.top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)


def test_a_stop_token_ends_the_text_and_an_unknown_one_is_refused(stories: list[str]) -> None:
    config = TokenizerConfig.from_dict(
        {"name": "t", "vocab_size": 512, "dataset_config": "x", "special_tokens": {**SPECIALS, "turn": "<|im_end|>"}}
    )
    tokenizer = train_tokenizer(config, stories)
    generator = make(tokenizer)
    told = generator.generate_batch(
        ["One day"] * 32, GenerationConfig(max_new_tokens=400, temperature=3.0), seed=list(range(32))
    )
    turn = tokenizer.special_tokens["turn"]
    seed, spoken = next((seed, text) for seed, text in enumerate(told) if turn in text.ids)
    ended = generator.generate_batch(
        ["One day"], GenerationConfig(max_new_tokens=400, stop_tokens=("<|im_end|>",), temperature=3.0), seed=seed
    )
    assert ended[0].ids == spoken.ids[: spoken.ids.index(turn)] and ended[0].finish_reason == "stop"
    with pytest.raises(UserError, match=r"'<\|end\|>' is not a special token of this model; it has .*<\|im_end\|>"):
        generator.generate_batch(["One day"], GenerationConfig(stop_tokens=("<|end|>",)))


@pytest.mark.parametrize("length", [20, 64, 65, 200])
def test_score_is_the_loss_of_the_model(length: int, tokenizer: Tokenizer, stories: list[str]) -> None:
    generator = make(tokenizer)
    text = tokenizer.decode(tokenizer.encode(" ".join(stories))[:length])
    ids = tokenizer.encode(text, bos=True)
    score = generator.score(text)
    assert score.ids == ids[1:]
    expected = []
    with torch.no_grad():
        for end in range(1, len(ids)):
            start = 0 if end <= 64 else 32 * -(-(end - 64) // 32)  # windows of 64 that overlap by 32
            logits = generator.model(torch.tensor([ids[start:end]]))[0, -1]
            expected.append(float(logits.log_softmax(-1)[ids[end]]))
    assert score.logprobs == pytest.approx(expected, abs=1e-4)
    assert score.loss == pytest.approx(-sum(expected) / len(expected), abs=1e-4)
    assert score.bits_per_byte == pytest.approx(-sum(expected) / math.log(2) / len(text.encode()), abs=1e-4)


def test_a_story_on_a_theme_names_it_and_is_the_same_for_the_same_seed(tokenizer: Tokenizer) -> None:
    generator = make(tokenizer)
    story = generator.generate_story(theme="  a lost\n dog ", max_length=20, seed=3)
    assert "a lost dog" in story
    assert (
        story
        == generator.generate_story("a lost dog", 20, seed=3)
        != generator.generate_story("a lost dog", 20, seed=4)
    )
    for theme in ("", "  ", "x" * 201):
        with pytest.raises(UserError, match="a theme has 1 to 200 characters"):
            generator.generate_story(theme)


def test_same_seed_same_text(tokenizer: Tokenizer) -> None:
    generator = make(tokenizer)
    texts = [generator.generate("One day", 30, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("One day")
    assert generator.generate("One day", 30, temperature=1.0) != generator.generate("One day", 30, temperature=1.0)


def test_the_stream_adds_up_to_the_text(tokenizer: Tokenizer) -> None:
    generator = make(tokenizer)
    pieces = list(generator.stream("One day", GenerationConfig(max_new_tokens=60, temperature=1.0), seed=3))
    assert "One day" + "".join(pieces) == generator.generate("One day", 60, temperature=1.0, seed=3)
    assert len(pieces) > 10


def test_control_tokens_and_rows_beyond_the_tokenizer_are_never_drawn(tokenizer: Tokenizer) -> None:
    generator = make(tokenizer, vocab_size=tokenizer.vocab_size + 100)
    [generated] = generator.generate_batch([""], GenerationConfig(max_new_tokens=300, temperature=50.0), seed=0)
    assert max(generated.ids) < tokenizer.vocab_size
    assert not {tokenizer.bos_id, tokenizer.pad_id, tokenizer.unk_id, tokenizer.eos_id} & set(generated.ids)


def test_generation_ends_at_eos_but_not_before_the_minimum(tokenizer: Tokenizer) -> None:
    generator = make(tokenizer)
    with torch.no_grad():
        # Every hidden state now points to eos.
        generator.model.token_emb.weight[tokenizer.eos_id] = 0.0
        generator.model.final_norm.weight.zero_()
        generator.model.final_norm.bias.fill_(1.0)  # type: ignore[union-attr]
        generator.model.token_emb.weight[tokenizer.eos_id] = 10.0
    changed = TextGenerator(generator.model, tokenizer)
    assert changed.generate("One day", 20, temperature=0) == "One day"
    [generated] = changed.generate_batch(
        ["One day"], GenerationConfig(max_new_tokens=20, min_new_tokens=5, temperature=0)
    )
    assert len(generated.ids) == 5 and generated.finish_reason == "stop"


def test_bad_requests_are_one_line(tokenizer: Tokenizer) -> None:
    generator = make(tokenizer)
    with pytest.raises(UserError, match="max-new-tokens must be between 0 and"):
        generator.generate("x", -1)
    with pytest.raises(UserError, match="the prompt is empty"):
        generator.generate("", 5, add_bos=False)
    with pytest.raises(UserError, match="the prompt is empty"):
        generator.stream("", GenerationConfig(add_bos=False))  # refused at the call, not at the first piece
    with pytest.raises(UserError, match=r"the prompt has \d+ tokens and the context 64: shorten it"):
        generator.generate_batch(["One day " * 100], GenerationConfig(max_new_tokens=5, strict=True))
    with pytest.raises(UserError, match="there are 1 seeds for 2 prompts"):
        generator.generate_batch(["x", "y"], seed=[1])
    with pytest.raises(UserError, match="a stop string must have 1 to 256 characters"):
        GenerationConfig(stop=("",))
    with pytest.raises(UserError, match="logprobs must be between 0 and 100"):
        GenerationConfig(logprobs=101)
    with pytest.raises(UserError, match="too short to be scored"):
        generator.score("")
    with pytest.raises(UserError, match="lone surrogate"):
        generator.generate("\ud800", 5)
    larger = train_tokenizer(
        TokenizerConfig(name="t", type="char", dataset_config="x"), [chr(c) for c in range(32, 900)]
    )
    with pytest.raises(UserError, match=r"the tokenizer has \d+ tokens and the model 512: they do not belong together"):
        TextGenerator(generator.model, larger)


@pytest.fixture
def trained(run: Run, data_config: Callable[..., BinDataConfig]) -> Run:
    config = model_config_from_dict(
        {
            "architecture": "gpt2",
            "vocab_size": 512,
            "context_length": 32,
            "d_model": 32,
            "n_layers": 1,
            **FAMILIES["gpt2"],
        },
        source="test",
    )
    training = TrainingConfig(max_steps=3, learning_rate=1e-3, precision="32-true", val_every_n_steps=2)
    train(config, training, data_config(), run)
    return run


def test_from_run_takes_the_best_checkpoint_or_a_given_one(trained: Run) -> None:
    texts = [
        TextGenerator.from_run(path).generate("One day", 20, temperature=0)
        for path in (trained.folder, trained.best_checkpoint, trained.checkpoints / "step-00000003.ckpt")
    ]
    assert texts[0] == texts[1]
    by_hand = TextGenerator.from_checkpoint(
        checkpoint_path=trained.last_checkpoint, tokenizer_path=trained.tokenizer / "tokenizer.json"
    )
    assert by_hand.generate("One day", 20, temperature=0) == texts[2]


def test_a_run_that_is_none_or_has_nothing_yet(trained: Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: no such run folder"):
        TextGenerator.from_run(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is not a run folder"):
        TextGenerator.from_run(tmp_path)
    for checkpoint in trained.checkpoints.iterdir():
        checkpoint.unlink()
    with pytest.raises(UserError, match="has no checkpoint yet"):
        TextGenerator.from_run(trained.folder)


def test_tokenizer_of_another_run_is_refused(trained: Run, tmp_path: Path, stories: list[str]) -> None:
    other = train_tokenizer(TokenizerConfig(name="o", vocab_size=512, dataset_config="x"), stories[:5])
    other.save(tmp_path / "other")
    with pytest.raises(UserError, match=r"other: tokenizer does not match .*best.ckpt"):
        TextGenerator.from_checkpoint(trained.best_checkpoint, tmp_path / "other")
