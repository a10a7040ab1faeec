"""Model configs: the shipped files, defaults, counts in closed form, and what a wrong value is told."""

import re
from pathlib import Path

import pytest
from families import SHAPE

from tiny_lm.errors import UserError
from tiny_lm.model import (
    GPT2Config,
    Llama3Config,
    Qwen3Config,
    SmallLMConfig,
    build_model,
    load_model_config,
    model_config_from_dict,
    num_parameters,
    parameter_table,
)

SHIPPED = sorted((Path(__file__).parents[2] / "configs" / "models").glob("*.yaml"))
GPT2 = {**SHAPE, "architecture": "gpt2"}
LLAMA3 = {**SHAPE, "architecture": "llama3"}


def test_documented_names_are_shipped():
    documented = {"gpt2-8k-2l", "gpt2-8k-2l-speed", "gpt2-8k-2l-enhanced", "gpt2-8k-1l-ultra", "llama3-16k"}
    ours = {"smalllm-16k", "basic", "quickstart", "qwen3-8k", "llama3-8k"}
    assert documented | ours <= {file.stem for file in SHIPPED}


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_shipped_config_has_the_count_that_its_comment_and_the_formula_say(file):
    config = load_model_config(file)
    printed = re.search(r"^# .*?([\d,]+) parameters", file.read_text(encoding="utf-8"))
    assert printed, "the first line tells the parameter count"
    counted = {"embedding": 0, "positions": 0, "attention": 0, "feed-forward": 0, "norms": 0, "head": 0}
    parts = {"token_emb": "embedding", "pos_emb": "positions", "attn": "attention", "ffn": "feed-forward"}
    for name, parameter in build_model(config, device="meta").named_parameters():
        assert parameter.is_meta
        part = "norms" if "norm" in name else next(parts[key] for key in name.split(".") if key in parts)
        counted[part] += parameter.numel()
    assert parameter_table(config) == counted
    assert num_parameters(config) == sum(counted.values()) == int(printed[1].replace(",", ""))


@pytest.mark.parametrize(
    "values",
    [
        {**GPT2, "qkv_bias": True, "d_ff": 50},
        {**GPT2, "architecture": "smalllm", "qkv_bias": False},
        {**LLAMA3, "qkv_bias": True, "ffn_bias": True, "n_kv_heads": 2},
        {**LLAMA3, "architecture": "qwen3", "qkv_bias": True, "head_dim": 10, "n_kv_heads": 1},
    ],
)
def test_count_with_every_option(values):
    config = model_config_from_dict(values)
    model = build_model(config, device="meta")
    assert num_parameters(config) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "d_model", "layers", "heads", "ffn", "context"),
    [
        ("gpt2-8k-2l-speed", 384, 2, 4, 1536, 256),
        ("gpt2-8k-2l-enhanced", 512, 2, 4, 2048, 512),
        ("gpt2-8k-2l", 768, 2, 4, 3072, 1024),
        ("gpt2-8k-1l-ultra", 128, 1, 4, 512, 128),
        ("llama3-16k", 384, 12, 12, 1024, 1024),
        ("smalllm-16k", 384, 8, 6, 1536, 512),
        ("basic", 256, 8, 8, 1024, 512),
    ],
)
def test_documented_values(name, d_model, layers, heads, ffn, context):
    config = load_model_config(name)
    assert (config.d_model, config.n_layers, config.n_heads) == (d_model, layers, heads)
    assert (config.ffn_size, config.context_length) == (ffn, context)


def test_quickstart_has_about_a_million_parameters():
    assert 950_000 <= num_parameters(load_model_config("quickstart")) <= 1_350_000


def test_architecture_chooses_the_class_and_gpt2_is_the_default():
    kinds = {"gpt2": GPT2Config, "llama3": Llama3Config, "smalllm": SmallLMConfig, "qwen3": Qwen3Config}
    for architecture, kind in kinds.items():
        assert type(model_config_from_dict({**SHAPE, "architecture": architecture})) is kind
    assert type(model_config_from_dict(SHAPE)) is GPT2Config


def test_dump_loads_again(tmp_path):
    for architecture in ("gpt2", "llama3", "smalllm", "qwen3"):
        config = model_config_from_dict({**SHAPE, "architecture": architecture, "attn_dropout": 0.2})
        config.save(tmp_path / "model.yaml")
        assert load_model_config(tmp_path / "model.yaml") == config


def test_null_dropouts_take_the_common_one():
    config = model_config_from_dict({**GPT2, "dropout": 0.3, "attn_dropout": 0.0, "resid_dropout": None})
    assert config.dropouts == (0.3, 0.0, 0.3)


def test_defaults_of_sizes():
    assert model_config_from_dict(GPT2).ffn_size == 4 * 32
    assert model_config_from_dict({**LLAMA3, "multiple_of": 16}).ffn_size == 96  # 2/3 x 4 x 32 = 85.3
    assert model_config_from_dict({**LLAMA3, "d_model": 384, "multiple_of": 256}).ffn_size == 1024  # just fits
    assert model_config_from_dict({**LLAMA3, "ffn_hidden_dim": 50}).ffn_size == 50
    assert model_config_from_dict(LLAMA3).kv_heads == 4
    assert model_config_from_dict({**SHAPE, "architecture": "qwen3"}).head_size == 8


def test_overrides_win_over_the_file():
    config = load_model_config("gpt2-8k-2l-speed", {"n_layers": 3, "dropout": 0.0})
    assert (config.n_layers, config.d_model) == (3, 384)
    assert isinstance(load_model_config("llama3-8k", {"architecture": "qwen3"}), Qwen3Config)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({**GPT2, "n_heads": 5}, "d_model 32 is not divisible by n_heads 5"),
        ({**LLAMA3, "n_kv_heads": 3}, "n_heads 4 is not divisible by n_kv_heads 3"),
        ({**LLAMA3, "n_kv_heads": 8}, "n_heads 4 is not divisible by n_kv_heads 8"),
        ({**LLAMA3, "d_model": 36}, "the head size is 9 .* need an even one"),
        ({**GPT2, "architecture": "qwen3", "head_dim": 7}, "the head size is 7"),
        ({**GPT2, "d_model": 0}, r"d_model: .*greater than or equal to 1 \(it is 0\)"),
        ({**GPT2, "context_length": 2**40}, "context_length: .*less than or equal"),
        ({**GPT2, "n_layers": 2.5}, "n_layers: .*valid integer"),
        ({**GPT2, "n_layers": "2"}, "n_layers: .*valid integer"),
        ({**GPT2, "qkv_bias": 1}, "qkv_bias: .*valid boolean"),
        ({**GPT2, "dropout": 1.0}, "dropout: .*less than 1"),
        ({**GPT2, "attn_dropout": -0.1}, "attn_dropout: .*greater than or equal to 0"),
        ({**LLAMA3, "rope_theta": 0}, "rope_theta: .*greater than 1"),
        ({**LLAMA3, "norm_eps": 0}, "norm_eps: .*greater than 0"),
        ({**GPT2, "d_model": 2**17, "n_layers": 100}, "parameters; the limit is 20,000,000,000"),
        ({**GPT2, "d_modle": 32}, "unknown key 'd_modle'; did you mean 'd_model'"),
        ({**GPT2, "n_kv_heads": 2}, "unknown key 'n_kv_heads'"),
        ({**SHAPE, "n_kv_heads": 2}, "which GPT-2 does not; add the line 'architecture: llama3'"),
        ({**LLAMA3, "architecture": "qwen3", "ffn_bias": True}, r"ffn_bias: .*False \(it is True\)"),
        ({**SHAPE, "architecture": "lama3"}, "unknown model family 'lama3'; did you mean 'llama3'"),
        ({**SHAPE, "architecture": 3}, "unknown model family 3; there are: gpt2, llama3, qwen3, smalllm"),
        ({**SHAPE, "architecture": None}, "architecture: unknown model family None"),
        ({"architecture": "gpt2"}, "the key 'vocab_size' is missing"),
    ],
)
def test_wrong_values_are_told_in_one_line(values, message):
    with pytest.raises(UserError, match=message) as caught:
        model_config_from_dict(values, source="my.yaml")
    assert str(caught.value).startswith("my.yaml: ")
    assert "\n" not in str(caught.value)


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(UserError, match="did you mean 'gpt2-8k-2l-speed'"):
        load_model_config("gpt2-8k-2l-sped")
