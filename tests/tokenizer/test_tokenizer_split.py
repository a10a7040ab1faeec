"""The splits that a BPE config may name: the same pieces as in the tokenizers that they are named after."""

import json
import random
from pathlib import Path

import pytest
from tokenizer_samples import HARD, make_config

from tiny_lm.cli.data import load_corpus_configs
from tiny_lm.errors import UserError
from tiny_lm.tokenizer import SPLIT_PATTERNS, BPETokenizer, Tokenizer, load_tokenizer, train_tokenizer
from tiny_lm.tokenizer.train import matches_config

NUMBERS = [
    "in 1999 or 12345",
    "a  1",
    "x\n\n 7",
    "  ½²³ ٣٤٥",
    "1 2  3   4",
    "v1.2.3's 10's",
    "\u2028 9",
    "tab\t5",
    "\r\n1",
]


@pytest.fixture(scope="module")
def trained(corpus: list[str]) -> dict[str, Tokenizer]:
    return {name: train_tokenizer(make_config(split_pattern=name), corpus) for name in SPLIT_PATTERNS}


def texts() -> list[str]:
    rng = random.Random(3)
    parts = ["a", "Is", "1", "22", ".", "'s", "é", " ", "  ", "\n", "\r\n", "\t", "\u3000", "½", "漢"]
    return [*HARD, *NUMBERS, *("".join(rng.choices(parts, k=rng.randint(1, 14))) for _ in range(3000))]


@pytest.mark.parametrize("name", SPLIT_PATTERNS)
def test_tokenizer_json_and_tiktoken_agree_on_every_split(
    trained: dict[str, Tokenizer], name: str, tmp_path: Path
) -> None:
    import tokenizers

    ours = trained[name]
    assert isinstance(ours, BPETokenizer)
    assert (ours.pattern, ours.split_name) == (SPLIT_PATTERNS[name], name)
    ours.save(tmp_path)
    assert load_tokenizer(tmp_path).hash == ours.hash
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in texts():
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids, text
        assert ours.decode(ours.encode(text)) == text


def test_smollm_is_digits_first_and_then_gpt2(trained: dict[str, Tokenizer], tmp_path: Path) -> None:
    """SmolLM and StarCoder write their split as two steps; ours is one pattern."""
    import tokenizers

    content = trained["smollm"].to_json()
    content["pre_tokenizer"]["pretokenizers"] = [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in texts():
        assert trained["smollm"].encode(text) == theirs.encode(text, add_special_tokens=False).ids, text


def test_digits_are_split_as_the_name_says() -> None:
    import tokenizers

    longest = {}
    for name, pattern in SPLIT_PATTERNS.items():
        split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
        longest[name] = max(len(piece) for piece, _ in split.pre_tokenize_str("1234567"))
    assert longest == {"llama3": 3, "gpt2": 7, "qwen2": 1, "smollm": 1}


def test_a_tokenizer_of_another_split_is_not_that_of_the_config(trained: dict[str, Tokenizer]) -> None:
    assert matches_config(trained["qwen2"], make_config(split_pattern="qwen2"))
    assert not matches_config(trained["qwen2"], make_config())
    assert load_corpus_configs("quickstart", ["tokenizer.split_pattern=gpt2"])[0].split_pattern == "gpt2"
    with pytest.raises(UserError, match="split_pattern"):
        load_corpus_configs("quickstart", ["tokenizer.split_pattern=spaces"])
