from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_lm.data import BinDataConfig
from tiny_lm.errors import UserError
from tiny_lm.inference import Request, Sampling, TextGenerator
from tiny_lm.model import build_model, model_config_from_dict
from tiny_lm.runs import Run
from tiny_lm.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer
from tiny_lm.training import TrainingConfig
from tiny_lm.training.fit import train

FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_heads": 2, "d_ff": 64},
    "smalllm": {"n_heads": 2, "d_ff": 64},
    "llama3": {"n_heads": 4, "n_kv_heads": 2},
    "qwen3": {"n_heads": 4, "n_kv_heads": 2},
}
GREEDY = Sampling(temperature=0)


def make(tokenizer: Tokenizer, family: str = "gpt2", **values: Any) -> TextGenerator:
    size = {"vocab_size": tokenizer.vocab_size, "context_length": 64, "d_model": 32, "n_layers": 2}
    config = model_config_from_dict({"architecture": family, **size, **FAMILIES[family], **values}, source="test")
    torch.manual_seed(0)
    model = build_model(config)
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            parameter.data *= 5  # a fresh model repeats one token; this one has opinions
    return TextGenerator(model, tokenizer)


def never_drawn(generator: TextGenerator) -> torch.Tensor:
    """The mask of tokens that are never drawn, and eos."""
    forbidden = generator._never_drawn(Request())
    forbidden[generator.tokenizer.eos_id] = True
    return forbidden


def generated_ids(generator: TextGenerator, prompt: str, count: int) -> list[int]:
    """The ids of the prompt and of ``count`` tokens after it, the likeliest ones but for eos."""
    [generated] = generator.generate_batch([prompt], Request(count, count, GREEDY))
    return generator.tokenizer.encode(prompt, bos=True) + generated.ids


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_generation_equals_reading_everything_again(family: str, tokenizer: Tokenizer) -> None:
    generator = make(tokenizer, family)
    prompt = "Once upon a time, there was a bear"
    ids = generator.tokenizer.encode(prompt, bos=True)
    forbidden = never_drawn(generator)
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
    forbidden = never_drawn(generator)
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
    forbidden = never_drawn(generator)
    expected = int(logits.masked_fill(forbidden, float("-inf")).argmax())
    assert generated_ids(generator, prompt, 1)[-1] == expected


def test_same_seed_same_text(tokenizer: Tokenizer) -> None:
    generator = make(tokenizer)
    texts = [generator.generate("One day", 30, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("One day")
    assert generator.generate("One day", 30, temperature=1.0) != generator.generate("One day", 30, temperature=1.0)


def test_the_stream_adds_up_to_the_text(tokenizer: Tokenizer) -> None:
    generator = make(tokenizer)
    pieces = list(generator.stream("One day", Request(60, sampling=Sampling(1.0)), seed=3))
    assert "One day" + "".join(pieces) == generator.generate("One day", 60, temperature=1.0, seed=3)
    assert len(pieces) > 10


def test_control_tokens_and_rows_beyond_the_tokenizer_are_never_drawn(tokenizer: Tokenizer) -> None:
    generator = make(tokenizer, vocab_size=tokenizer.vocab_size + 100)
    [generated] = generator.generate_batch([""], Request(300, sampling=Sampling(temperature=50.0)), seed=0)
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
    [generated] = changed.generate_batch(["One day"], Request(20, 5, GREEDY))
    assert len(generated.ids) == 5 and generated.finish_reason == "stop"


def test_bad_requests_are_one_line(tokenizer: Tokenizer) -> None:
    generator = make(tokenizer)
    with pytest.raises(UserError, match="max-new-tokens must be between 0 and"):
        generator.generate("x", -1)
    with pytest.raises(UserError, match="the prompt is empty"):
        generator.generate("", 5, add_bos=False)
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
    with pytest.raises(UserError, match="is no run folder"):
        TextGenerator.from_run(tmp_path)
    for checkpoint in trained.checkpoints.iterdir():
        checkpoint.unlink()
    with pytest.raises(UserError, match="has no checkpoint yet"):
        TextGenerator.from_run(trained.folder)


def test_tokenizer_of_another_run_is_refused(trained: Run, tmp_path: Path, stories: list[str]) -> None:
    other = train_tokenizer(TokenizerConfig(name="o", vocab_size=512, dataset_config="x"), stories[:5])
    other.save(tmp_path / "other")
    with pytest.raises(UserError, match=r"other: is not the tokenizer that .*best.ckpt was trained with"):
        TextGenerator.from_checkpoint(trained.best_checkpoint, tmp_path / "other")
