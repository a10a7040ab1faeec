"""Importing an old tokenizer.pkl, and refusing everything else that is pickled."""

import os
import pickle
import struct
from pathlib import Path

import pytest
import tiktoken
from tokenizer_samples import HARD

from tiny_lm.errors import UserError
from tiny_lm.tokenizer import BPETokenizer, Tokenizer, bpe, import_pickled_tokenizer, load_tokenizer

RUSTBPE_DEFAULT = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
SPECIALS = ["<pad>", "<eos>", "<bos>", "<unk>"]


def encoding(tokenizer: Tokenizer, pattern: str = RUSTBPE_DEFAULT, specials: list[str] = SPECIALS) -> tiktoken.Encoding:
    return tiktoken.Encoding(
        "old",
        pat_str=pattern,
        mergeable_ranks={token: rank for rank, token in enumerate(tokenizer.base)},
        special_tokens={text: len(tokenizer.base) + i for i, text in enumerate(specials)},
    )


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize(
    "pattern",
    [RUSTBPE_DEFAULT, RUSTBPE_DEFAULT.replace("{1,3}", "{1,2}"), bpe.LLAMA3_PATTERN, bpe.GPT2_PATTERN],
)
def test_an_old_tokenizer_keeps_its_ids(tokenizers, tmp_path: Path, protocol: int, pattern: str, corpus) -> None:
    old = encoding(tokenizers["BPE"], pattern)
    file = tmp_path / "tokenizer.pkl"
    file.write_bytes(pickle.dumps(old, protocol=protocol))
    tokenizer = import_pickled_tokenizer(file)
    for text in [*HARD, *corpus[:30]]:
        assert tokenizer.encode(text) == old.encode_ordinary(text)
    assert tokenizer.special_tokens == {"pad": 396, "eos": 397, "bos": 398, "unk": 399}
    tokenizer.save(tmp_path / "new")
    assert load_tokenizer(tmp_path / "new").hash == tokenizer.hash
    # The folder of the pickle is a fine place too.
    tokenizer.save(tmp_path)
    assert load_tokenizer(file).hash == tokenizer.hash


def test_an_imported_tokenizer_equals_the_trained_one(tokenizers, tmp_path: Path) -> None:
    (tmp_path / "t.pkl").write_bytes(pickle.dumps(encoding(tokenizers["BPE"])))
    assert import_pickled_tokenizer(tmp_path / "t.pkl").hash == tokenizers["BPE"].hash


def test_roles_of_other_specials(tokenizers, tmp_path: Path) -> None:
    texts = ["<|bos|>", "<think>", "</think>", "<|THINK|>", "<|1|>", "<|eos|>"]
    (tmp_path / "t.pkl").write_bytes(pickle.dumps(encoding(tokenizers["BPE"], specials=texts)))
    with pytest.raises(UserError, match=r"none of its special tokens \('<\|bos\|>', .* is the eos token '<eos>'"):
        import_pickled_tokenizer(tmp_path / "t.pkl")
    tokenizer = import_pickled_tokenizer(tmp_path / "t.pkl", {"eos": "<|eos|>", "bos": "<|bos|>"})
    assert list(tokenizer.special_tokens) == ["bos", "think", "think_2", "think_3", "token_1", "eos"]
    assert tokenizer.bos_id == 396


# --- refusals --------------------------------------------------------------------------------------------------------


class Evil:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("inside", [False, True])
def test_a_malicious_pickle_is_refused_and_not_run(tokenizers, tmp_path: Path, protocol: int, inside: bool) -> None:
    made = tmp_path / "made"
    thing: object = Evil(made)
    if inside:
        thing = encoding(tokenizers["BPE"])
        thing._mergeable_ranks = {b"a": Evil(made)}
    data = pickle.dumps(thing, protocol=protocol)
    file = tmp_path / "tokenizer.pkl"
    file.write_bytes(data)
    with pytest.raises(UserError) as caught:
        import_pickled_tokenizer(file)
    assert not made.exists()
    assert "\n" not in str(caught.value)
    if not inside or protocol >= 3:  # older protocols need other names for the encoding itself
        assert f"tried to load '{os.mkdir.__module__}.mkdir'" in str(caught.value)
    function, arguments = Evil(made).__reduce__()  # what Python's own loader would call
    function(*arguments)
    assert made.is_dir()


def frame(name: str, state: bytes = b"}") -> bytes:
    """A hand-made pickle of an object of class ``name`` (module and name) with a state."""
    return b"\x80\x04c" + name.encode() + b"\n)\x81" + state + b"b."


ENCODING = "tiktoken.core\nEncoding"
BOMB = b")" + b"2\x86" * 60  # nested pairs, of which hashing takes 2^60 steps
MADE_BY_HAND = {
    "another class": frame("tiktoken.core\nCoreBPE"),
    "an attribute": frame("tiktoken.core\nEncoding.__init__"),
    "builtins": frame("builtins\nobject"),
    "registry by code": b"\x80\x02\x82\x01.",
    "persistent id": b"\x80\x04Pevil\n.",
    "call": b"\x80\x04c" + ENCODING.encode() + b"\n)R.",
    "nested tuples as a key": frame(ENCODING, b"}" + BOMB + b"Ns"),
    "a place of a billion": b"\x80\x04}r" + struct.pack("<I", 2**31 - 1) + b".",
    "bytes without end": b"\x80\x04B" + struct.pack("<I", 2**32 - 1) + b"abc.",
    "a frame without end": b"\x80\x04\x95" + struct.pack("<Q", 2**40) + b"}.",
    "no state": b"\x80\x04c" + ENCODING.encode() + b"\n)\x81.",
    "empty state": frame(ENCODING),
    "a class for a state": frame(ENCODING, b"c" + ENCODING.encode() + b"\n"),
    "an encoding by name": frame(ENCODING, b"\x8c\x04gpt2"),
    "a dict": pickle.dumps({"a": 1}),
    "the class": b"\x80\x04c" + ENCODING.encode() + b"\n.",
    "empty": b"",
    "text": b"hello",
    "json": b'{"version": "1.0"}',
    "stop": b".",
    "stack underflow": b"\x80\x04s.",
    "missing memo": b"\x80\x04h\x07.",
    "keys that cannot be": frame(ENCODING, b"}}Ns"),
}


@pytest.mark.parametrize("name", MADE_BY_HAND)
def test_pickles_made_by_hand(tmp_path: Path, name: str) -> None:
    file = tmp_path / "tokenizer.pkl"
    file.write_bytes(MADE_BY_HAND[name])
    with pytest.raises(UserError, match=r"could not be imported: (it|its|not a pickle)") as caught:
        import_pickled_tokenizer(file)
    assert "\n" not in str(caught.value)


def test_the_second_net_holds_without_the_first(monkeypatch, tmp_path: Path) -> None:
    from tiny_lm.tokenizer import pickle_import

    monkeypatch.setattr(pickle_import, "_scan", lambda data: None)
    file = tmp_path / "tokenizer.pkl"
    file.write_bytes(pickle.dumps(Evil(tmp_path / "made")))
    with pytest.raises(UserError, match="mkdir"):
        import_pickled_tokenizer(file)
    assert not (tmp_path / "made").exists()


BYTES = {bytes([i]): i for i in range(256)}
GOOD = {
    "name": "x",
    "pat_str": RUSTBPE_DEFAULT,
    "mergeable_ranks": BYTES,
    "special_tokens": {"<eos>": 256, "<bos>": 257},
}
WRONG_STATES = {
    "unknown pattern": ({"pat_str": "(a*)*b"}, "unknown split pattern"),
    "pattern is no text": ({"pat_str": 3}, "unknown split pattern"),
    "no ranks": ({"mergeable_ranks": {}}, "no vocabulary"),
    "ranks of text": ({"mergeable_ranks": {"a": 0}}, "not a table of bytes and ranks"),
    "ranks with a hole": ({"mergeable_ranks": {**BYTES, b"ab": 300}}, "not 0 to 256"),
    "missing bytes": ({"mergeable_ranks": {b"a": 0}, "special_tokens": {"<eos>": 1, "<bos>": 2}}, "all 256 bytes"),
    "no specials": ({"special_tokens": None}, "no table of special tokens"),
    "specials elsewhere": ({"special_tokens": {"<eos>": 0, "<bos>": 1}}, "do not follow the base vocabulary"),
    "no bos": ({"special_tokens": {"<eos>": 256}}, "is the bos token"),
}


@pytest.mark.parametrize("name", WRONG_STATES)
def test_states_that_are_no_tokenizer(tmp_path: Path, name: str) -> None:
    change, problem = WRONG_STATES[name]
    for state, expected in ((GOOD, None), ({**GOOD, **change}, problem)):
        thing = tiktoken.Encoding.__new__(tiktoken.Encoding)
        plain = pickle.dumps(state, protocol=4)[:-1]  # without its stop; frames apart, it is the state's instructions
        assert isinstance(thing, tiktoken.Encoding)
        body = plain[2 + 9 :] if plain[2:3] == b"\x95" else plain[2:]
        (tmp_path / "t.pkl").write_bytes(frame(ENCODING, body))
        if expected is None:
            assert isinstance(import_pickled_tokenizer(tmp_path / "t.pkl"), BPETokenizer)
        else:
            with pytest.raises(UserError, match=expected):
                import_pickled_tokenizer(tmp_path / "t.pkl")


def test_files_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="could not be read"):
        import_pickled_tokenizer(tmp_path / "none.pkl")
    with pytest.raises(UserError, match="could not be read"):
        import_pickled_tokenizer(tmp_path)
    with (tmp_path / "big.pkl").open("wb") as file:
        file.truncate(2**25 + 1)
    with pytest.raises(UserError, match="larger than"):
        import_pickled_tokenizer(tmp_path / "big.pkl")
