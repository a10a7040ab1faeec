"""The YAML files and what they may say."""

import pytest
from tokenizer_samples import make_config

from tiny_lm.config import shipped_configs
from tiny_lm.errors import UserError
from tiny_lm.tokenizer import TokenizerConfig

STANDARD = {"pad": "<pad>", "eos": "<eos>", "bos": "<bos>", "unk": "<unk>"}


@pytest.mark.parametrize("file", sorted((shipped_configs() / "tokenizers").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_shipped_file_loads(file) -> None:
    config = TokenizerConfig.from_yaml(file)
    assert config.name == file.stem
    assert TokenizerConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("name", "kind", "size", "dataset"),
    [
        ("tinystories-8k", "BPE", 8192, "tinystories"),
        ("swallow-code-16k", "BPE", 16384, "swallow-code"),
        ("quickstart", "BPE", 2048, "quickstart"),
        ("tinystories-sp-16k", "sentencepiece", 16384, "tinystories"),
    ],
)
def test_the_documented_values(name: str, kind: str, size: int, dataset: str) -> None:
    config = TokenizerConfig.from_yaml(name)
    assert (config.type, config.vocab_size, config.dataset_config) == (kind, size, dataset)
    assert (config.val_split, config.num_threads) == (0.01, 16)
    assert config.special_tokens == STANDARD
    assert list(config.special_tokens) == list(STANDARD)
    assert (config.output_dir, config.tokenized_output_dir) == (f"tokenizers/{name}", f"data/{name}-tokenized")


def test_gpt2_has_its_own_specials() -> None:
    end = "<|endoftext|>"
    assert make_config("gpt2").special_tokens == {"eos": end, "bos": end}
    config = make_config("gpt2", special_tokens={"pad": "<pad>", "bos": end}, vocab_size=50258)
    assert list(config.special_tokens) == ["eos", "bos", "pad"]


def test_one_token_may_have_several_roles_and_bos_may_be_left_out() -> None:
    end = "<|endoftext|>"
    roles = {"pad": end, "eos": end, "bos": end, "unk": end}
    for kind in ("BPE", "sentencepiece", "gpt2"):
        assert make_config(kind, special_tokens=roles).special_tokens.items() >= {"pad": end, "eos": end}.items()
    assert make_config("BPE", vocab_size=257, special_tokens=roles).vocab_size == 257
    assert make_config("BPE", special_tokens={"eos": end}).special_tokens == {"eos": end}
    assert make_config("char", special_tokens={"eos": end, "pad": end, "unk": "<unk>"}).type == "char"


@pytest.mark.parametrize(
    ("kind", "values", "problem"),
    [
        (
            "BPE",
            {"vocab_size": 259},
            "vocab_size: a BPE tokenizer with 4 special tokens needs at least 260 (it is 259)",
        ),
        ("BPE", {"vocab_size": None}, "vocab_size: a BPE tokenizer needs one"),
        ("sentencepiece", {"vocab_size": 270}, "needs at least 293"),
        ("sentencepiece", {"vocab_size": None}, "needs one"),
        ("char", {"vocab_size": 4}, "needs at least 5"),
        ("gpt2", {"vocab_size": 8192}, "vocab_size: GPT-2's is fixed, 50257"),
        ("gpt2", {"special_tokens": {"eos": "<eos>"}}, "special_tokens.eos: is always <|endoftext|> in GPT-2"),
        (
            "gpt2",
            {"special_tokens": {"think": "<|endoftext|>"}},
            "special_tokens.think: the text '<|endoftext|>' is that of 'eos' too",
        ),
        ("BPE", {"vocab_size": 8192.0}, "vocab_size"),
        ("BPE", {"vocab_size": 2**21}, "vocab_size"),
        (
            "BPE",
            {"special_tokens": {**STANDARD, "x": "<eos>"}},
            "special_tokens.x: the text '<eos>' is that of 'eos' too",
        ),
        ("char", {"special_tokens": {"eos": "<e>", "unk": "<e>"}}, "and unk may not in a char tokenizer"),
        ("sentencepiece", {"split_pattern": "qwen2"}, "split_pattern: only for type: BPE"),
        ("BPE", {"split_pattern": "qwen3"}, "split_pattern"),
        ("BPE", {"special_tokens": {**STANDARD, "x": ""}}, "special_tokens.x: must be 1 to 256 characters"),
        ("BPE", {"special_tokens": {**STANDARD, "x": " \n"}}, "special_tokens.x: must be 1 to 256 characters"),
        ("BPE", {"special_tokens": {**STANDARD, "x": "a" * 257}}, "special_tokens.x: must be 1 to 256 characters"),
        ("BPE", {"special_tokens": {**STANDARD, "X y": "<x>"}}, "the role 'X y' must be a word"),
        ("BPE", {"special_tokens": {"bos": "<bos>"}}, "special_tokens: the role 'eos' is missing"),
        ("char", {"special_tokens": {"eos": "<eos>", "bos": "<bos>"}}, "the role 'unk' is missing"),
        ("char", {"special_tokens": {**STANDARD, "pad": "_"}}, "special_tokens.pad: a single character"),
        ("BPE", {"val_split": 1.0}, "val_split"),
        ("BPE", {"num_threads": 0}, "num_threads"),
        ("BPE", {"name": "../up"}, "name"),
        ("BPE", {"vocab_sise": 1000}, "unknown key 'vocab_sise'; did you mean 'vocab_size'?"),
        ("BPE", {"type": "bpe"}, "type"),
    ],
)
def test_contradictions(kind: str, values: dict, problem: str) -> None:
    settings = {"name": "t", "dataset_config": "d", "vocab_size": 8192 if kind in ("BPE", "sentencepiece") else None}
    with pytest.raises(UserError) as caught:
        TokenizerConfig.from_dict({**settings, "type": kind, **values}, source="x.yaml")
    assert problem in str(caught.value)
    assert str(caught.value).startswith("x.yaml: ")
