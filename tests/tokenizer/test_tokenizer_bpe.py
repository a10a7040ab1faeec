"""Byte-level BPE: training, long runs, merges."""

import json
import logging
import os
import random
import re
import subprocess
import sys

import pytest
from tokenizer_samples import gpt2_style, make_config

from tiny_lm.errors import UserError
from tiny_lm.tokenizer import LLAMA3_PATTERN, BPETokenizer, Tokenizer, bpe, train_tokenizer


@pytest.fixture
def tokenizer(tokenizers: dict[str, Tokenizer]) -> BPETokenizer:
    made = tokenizers["BPE"]
    assert isinstance(made, BPETokenizer)
    return made


def test_the_default_ids() -> None:
    # Every word new: enough pairs for the full vocabulary of the documented tokenizer.
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=9)) for _ in range(12_000)]
    tokenizer = train_tokenizer(make_config(vocab_size=8192), [" ".join(words)])
    assert tokenizer.vocab_size == 8192
    assert tokenizer.special_tokens == {"pad": 8188, "eos": 8189, "bos": 8190, "unk": 8191}


def test_the_number_of_threads_plays_no_part(corpus: list[str], tokenizer: BPETokenizer) -> None:
    program = (
        "import sys, json; from tiny_lm.tokenizer import TokenizerConfig, train_tokenizer\n"
        "config = TokenizerConfig.from_dict(dict(name='t', vocab_size=400, dataset_config='d'))\n"
        "print(train_tokenizer(config, json.load(sys.stdin)).hash)"
    )
    for threads in ("1", "3"):
        done = subprocess.run(
            [sys.executable, "-c", program],
            input=json.dumps(corpus),
            env={**os.environ, "RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == tokenizer.hash


def test_a_small_corpus_yields_a_smaller_vocabulary(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        tokenizer = train_tokenizer(make_config(vocab_size=4096), ["abc abc", "", "abc"])
    assert 260 < tokenizer.vocab_size < 300
    assert tokenizer.special_tokens["unk"] == tokenizer.vocab_size - 1
    assert f"only {tokenizer.vocab_size} tokens" in caplog.text
    facts = tokenizer.training
    assert (facts["documents"], facts["bytes"], facts["requested_vocab_size"]) == (2, 10, 4096)


def test_training_counts_bytes_and_density(corpus: list[str], tokenizer: BPETokenizer) -> None:
    assert tokenizer.training["documents"] == len(corpus)
    assert tokenizer.training["bytes"] == sum(len(text.encode()) for text in corpus)
    assert tokenizer.training["bytes_per_token"] > 2


@pytest.mark.parametrize("documents", [[], [""], iter(())])
@pytest.mark.parametrize("kind", ["BPE", "sentencepiece", "char"])
def test_an_empty_corpus(kind: str, documents) -> None:
    with pytest.raises(UserError, match="'d' is empty"):
        train_tokenizer(make_config(kind), documents)


@pytest.mark.parametrize("kind", ["BPE", "sentencepiece", "char"])
def test_an_error_of_the_reader_comes_through(kind: str) -> None:
    def documents():
        yield "a story"
        raise UserError("story 2 is no UTF-8")

    with pytest.raises(UserError, match="story 2 is no UTF-8"):
        train_tokenizer(make_config(kind), documents())
    with pytest.raises(UserError, match="lone surrogate"):
        train_tokenizer(make_config(kind), ["fine", "\udc80"])


@pytest.mark.parametrize("pattern", BPETokenizer.patterns)
def test_cutting_long_runs_changes_no_id(tokenizer: BPETokenizer, pattern: str, monkeypatch) -> None:
    # With a low threshold every run is cut by us, and tiktoken's own split is still there to compare with.
    monkeypatch.setattr(bpe, "_LONG_RUN", 2)
    monkeypatch.setattr(bpe, "_LONG_SPACE", re.compile(f"[{bpe._SPACE}]{{2,}}"))
    texts = {role.role: role.text for role in tokenizer.specials}
    # Pieces of spaces longer than a byte, or a wrong cut could go unnoticed.
    spaces = [b"  ", b"   ", b"\n\n", b" \n", b".\n", b" a", b"\n "]
    base = [*tokenizer.base[:256], *spaces]
    cut = BPETokenizer(base, texts, pattern=pattern)
    rng = random.Random(5)
    parts = ["a", "1", ".", "'s", "é", "\u0301", " ", "  ", "\n", "\r", "\t", "\u3000", "\x1c"]
    for _ in range(20_000):
        text = "".join(rng.choices(parts, [1, 1, 2, 1, 1, 1, 8, 8, 6, 2, 1, 1, 1], k=rng.randint(0, 16)))
        assert cut.encode(text) == cut._encoding.encode_ordinary(text), (text, pattern)


@pytest.mark.parametrize("kind", ["BPE", "gpt2", "sentencepiece"])
@pytest.mark.parametrize(
    "text",
    [
        pytest.param("x" + " " * 1_200_000 + "y", id="spaces"),
        pytest.param("." + "\n" * 1_200_000 + "\t" * 1_200_000, id="lines, tabs"),
        pytest.param(" \n" * 700_000 + "  b", id="alternating"),
        pytest.param("a" * 1_200_000, id="letters"),
        pytest.param("!" * 1_200_000, id="punctuation"),
    ],
)
def test_very_long_runs(tokenizers: dict[str, Tokenizer], kind: str, text: str) -> None:
    tokenizer = tokenizers[kind]
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_very_long_runs_in_training() -> None:
    tokenizer = train_tokenizer(make_config(vocab_size=300), ["the " * 50, "x" + " " * 1_500_000 + "y"])
    assert tokenizer.decode(tokenizer.encode("the x")) == "the x"
    assert 256 < len(tokenizer.base) < 298
    assert max(map(len, tokenizer.base)) == 512  # longer runs of spaces are left out
    assert len(tokenizer.merges) == len(tokenizer.base) - 256


@pytest.mark.parametrize("text", ["." * 60_000, "\N{DNA DOUBLE HELIX}" * 20_000, "ab" * 40_000])
def test_a_rule_in_the_corpus_gives_no_endless_tokens(text: str) -> None:
    tokenizer = train_tokenizer(make_config(vocab_size=400), ["the end " * 20, text])
    assert max(map(len, tokenizer.base)) <= 512
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_merges_rebuild_the_vocabulary(tokenizer: BPETokenizer) -> None:
    merges = tokenizer.merges
    assert [left + right for left, right in merges] == tokenizer.base[256:]
    known = set(tokenizer.base[:256])
    for left, right in merges:
        assert left in known
        assert right in known
        known.add(left + right)
    with pytest.raises(UserError, match=r"token 256 \(b'abc'\) is not a merge"):
        bpe.recover_merges([*tokenizer.base[:256], b"abc"])


def test_byte_level_text_is_reversible() -> None:
    everything = bytes(range(256))
    shown = bpe.byte_level(everything)
    assert len(set(shown)) == 256
    assert not any(character.isspace() for character in shown)
    assert bpe.from_byte_level(shown) == everything
    assert bpe.byte_level(b" the\n") == "ĠtheĊ"


@pytest.mark.parametrize(
    ("base", "problem"),
    [
        ([bytes([i]) for i in range(255)], "all 256 bytes"),
        ([*(bytes([i]) for i in range(256)), b"a"], "no duplicates"),
    ],
)
def test_an_impossible_table(base: list[bytes], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        BPETokenizer(base, {"eos": "<eos>", "bos": "<bos>"})


def test_a_special_token_that_is_an_ordinary_one(tokenizer: BPETokenizer) -> None:
    with pytest.raises(UserError, match="'the' is also a token of the base vocabulary"):
        BPETokenizer([*tokenizer.base[:256], b"th", b"the"], {"eos": "the", "bos": "<bos>"})


def test_other_patterns_are_refused(tokenizer: BPETokenizer) -> None:
    with pytest.raises(UserError, match="cannot split"):
        BPETokenizer(tokenizer.base, {"eos": "<eos>", "bos": "<bos>"}, pattern=".")
    with pytest.raises(UserError, match="cannot split"):
        type(gpt2_style(tokenizer))(
            tokenizer.base, {"eos": "<|endoftext|>", "bos": "<|endoftext|>"}, pattern=LLAMA3_PATTERN
        )
