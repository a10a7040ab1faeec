"""What holds for every kind of tokenizer."""

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizer_samples import HARD, KINDS, gpt2_style, make_config

from tiny_lm.errors import UserError
from tiny_lm.tokenizer import BPETokenizer, Tokenizer, load_tokenizer, train_tokenizer

LOSSLESS = [kind for kind in KINDS if kind != "char"]

# Unicode at large, and what tokenizers trip over: white space, contractions, runs, marks of their own.
any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=80)
tricky = st.lists(
    st.sampled_from(
        [*"aeth '.!1\n\r\t\x00", "  ", "\u2581", "<eos>", "<0x41>", "'ll", "é", "漢", "😀", "\u0301", "\x85"]
    ),
    max_size=40,
).map("".join)
fuzz = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("kind", LOSSLESS)
@fuzz
@given(text=any_text | tricky)
@example(text="\u2581 \u2581\u2581a\u2581")
def test_every_text_survives(tokenizers: dict[str, Tokenizer], kind: str, text: str) -> None:
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode(text)
    assert tokenizer.lossless
    assert tokenizer.decode(ids) == text
    assert b"".join(tokenizer.token_bytes(i) for i in ids) == text.encode()
    assert not set(ids) & set(tokenizer.special_tokens.values())


@pytest.mark.parametrize("kind", KINDS)
@fuzz
@given(data=st.data())
def test_the_stream_adds_up_to_decode(tokenizers: dict[str, Tokenizer], kind: str, data: st.DataObject) -> None:
    tokenizer = tokenizers[kind]
    random_ids = st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=60)
    ids = data.draw(random_ids | tricky.map(tokenizer.encode))
    skip = data.draw(st.booleans())
    decoder = tokenizer.stream_decoder(skip_special=skip)
    assert "".join([*(decoder.push(i) for i in ids), decoder.flush()]) == tokenizer.decode(ids, skip_special=skip)
    assert decoder.flush() == ""


@pytest.mark.parametrize("kind", LOSSLESS)
def test_the_stream_holds_back_half_characters(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = tokenizers[kind]
    decoder = tokenizer.stream_decoder()
    ids = tokenizer.encode("a🦊b")
    pieces = [decoder.push(i) for i in ids]
    assert len(ids) >= 5  # the fox is not in the corpus, so it comes in bytes
    assert [piece for piece in pieces if piece] == ["a", "🦊", "b"]
    assert decoder.push(ids[1]) == ""
    assert decoder.flush() == "\ufffd"


@pytest.mark.parametrize("kind", KINDS)
def test_bos_and_eos_only_where_asked_for(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = tokenizers[kind]
    plain = tokenizer.encode("Mia found")
    assert tokenizer.encode("Mia found", bos=True) == [tokenizer.bos_id, *plain]
    assert tokenizer.encode("Mia found", eos=True) == [*plain, tokenizer.eos_id]
    framed = tokenizer.encode("Mia found", bos=True, eos=True)
    assert tokenizer.decode(framed) == "Mia found"
    shown = tokenizer.decode(framed, skip_special=False)
    assert shown.endswith("Mia found" + tokenizer.token_text(tokenizer.eos_id))
    assert tokenizer.token_bytes(tokenizer.eos_id) == b""
    assert tokenizer.token_bytes(tokenizer.eos_id, skip_special=False) in (b"<eos>", b"<|endoftext|>")


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_equals_its_texts(tokenizers: dict[str, Tokenizer], kind: str, corpus: list[str]) -> None:
    tokenizer = tokenizers[kind]
    texts = [*corpus[:97], *HARD]
    expected = [tokenizer.encode(text, bos=True, eos=True) for text in texts]
    for threads in (1, 2, 16):
        assert tokenizer.encode_batch(texts, bos=True, eos=True, num_threads=threads) == expected
    assert tokenizer.encode_batch([]) == []


@pytest.mark.parametrize("kind", KINDS)
def test_ids_of_specials_follow_the_base_vocabulary(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = tokenizers[kind]
    base = len(tokenizer.base)
    if kind == "gpt2":
        assert tokenizer.special_tokens == {"eos": base, "bos": base}
        assert tokenizer.pad_id is None
        assert tokenizer.unk_id is None
    else:
        assert tokenizer.special_tokens == {"pad": base, "eos": base + 1, "bos": base + 2, "unk": base + 3}
        assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id, tokenizer.unk_id) == tuple(range(base, base + 4))
        assert tokenizer.vocab_size == base + 4


@pytest.mark.parametrize("kind", KINDS)
def test_extra_specials_survive_decoding(corpus: list[str], tokenizers: dict[str, Tokenizer], kind: str) -> None:
    extra = {"think_start": "<think>", "think_end": "</think>"}
    if kind == "gpt2":
        assert isinstance(tokenizers["BPE"], BPETokenizer)
        tokenizer: Tokenizer = gpt2_style(tokenizers["BPE"], **extra)
    else:
        standard = {"eos": "<eos>", "unk": "<unk>", "bos": "<bos>"}
        tokenizer = train_tokenizer(make_config(kind, special_tokens={**standard, **extra}), corpus[:50])
        assert [token.role for token in tokenizer.specials] == ["eos", "unk", "bos", "think_start", "think_end"]
    start, end = tokenizer.special_tokens["think_start"], tokenizer.special_tokens["think_end"]
    assert (start, end) == (tokenizer.vocab_size - 2, tokenizer.vocab_size - 1)
    ids = [tokenizer.bos_id, start, *tokenizer.encode("Mia"), end, tokenizer.eos_id]
    assert tokenizer.decode(ids) == "<think>Mia</think>"
    assert [token["special"] for token in tokenizer.added_tokens()][-3:] == [True, False, False]
    # Written by a user they are text.
    assert start not in tokenizer.encode("<think>")


@pytest.mark.parametrize("kind", KINDS)
def test_ids_outside_the_vocabulary(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = tokenizers[kind]
    for wrong in (-1, tokenizer.vocab_size, 10**12):
        for use in (tokenizer.token_bytes, tokenizer.token_text, lambda i: tokenizer.decode([0, i])):
            with pytest.raises(UserError, match="is out of range"):
                use(wrong)
        with pytest.raises(UserError, match="is out of range"):
            tokenizer.stream_decoder().push(wrong)


@pytest.mark.parametrize("kind", KINDS)
def test_a_lone_surrogate_is_refused(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    with pytest.raises(UserError, match=r"U\+D83D at character 3") as caught:
        tokenizers[kind].encode("abc\ud83d")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"U\+D83D"):
        tokenizers[kind].encode_batch(["fine"] * 30 + ["\ud83d"], num_threads=4)


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load(tokenizers: dict[str, Tokenizer], kind: str, tmp_path, corpus: list[str]) -> None:
    tokenizer = tokenizers[kind]
    tokenizer.save(tmp_path / "a")
    loaded = load_tokenizer(tmp_path / "a")
    assert type(loaded) is type(tokenizer)
    assert loaded.hash == tokenizer.hash
    assert loaded.special_tokens == tokenizer.special_tokens
    assert loaded.training == tokenizer.training
    assert loaded.encode_batch([*corpus[:20], *HARD]) == tokenizer.encode_batch([*corpus[:20], *HARD])
    loaded.save(tmp_path / "b")
    for file in (tmp_path / "a").iterdir():
        assert (tmp_path / "b" / file.name).read_bytes() == file.read_bytes()


def test_the_hash_tells_tokenizers_apart(tokenizers: dict[str, Tokenizer], corpus: list[str]) -> None:
    renamed = train_tokenizer(make_config(special_tokens={"eos": "<end>", "bos": "<bos>"}), corpus)
    smaller = train_tokenizer(make_config(vocab_size=399), corpus)
    hashes = {renamed.hash, smaller.hash, *(tokenizer.hash for tokenizer in tokenizers.values())}
    assert len(hashes) == 6
    assert all(len(value) == 64 for value in hashes)
    assert train_tokenizer(make_config(), corpus).hash == tokenizers["BPE"].hash


# --- parity with transformers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_yields_the_same_ids(tokenizers: dict[str, Tokenizer], kind: str, tmp_path, corpus) -> None:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    tokenizer = tokenizers[kind]
    tokenizer.save(tmp_path)
    auto = AutoTokenizer.from_pretrained(tmp_path)
    fast = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert len(auto) == tokenizer.vocab_size
    assert (auto.bos_token_id, auto.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
    assert (auto.pad_token_id, auto.unk_token_id) == (tokenizer.pad_id, tokenizer.unk_id)
    texts = [text for text in HARD if kind != "gpt2" or "<|endoftext|>" not in text] + corpus[:50]
    texts += [f"x{chr(code)}y {chr(code)} 1{chr(code)}2" for code in range(0, 0x3000, 3) if code != 0x2581]
    expected = [tokenizer.encode(text) for text in texts]
    assert auto(texts)["input_ids"] == expected
    assert fast(texts)["input_ids"] == expected
    if tokenizer.lossless:
        assert [auto.decode(ids) for ids in expected] == texts
    extra = [tokenizer.bos_id, *tokenizer.encode("Mia"), tokenizer.eos_id]
    assert auto.decode(extra, skip_special_tokens=True) == "Mia"


@pytest.mark.parametrize("kind", KINDS)
def test_real_stories(real_stories: list[str], kind: str, tokenizers: dict[str, Tokenizer], tmp_path) -> None:
    from tokenizers import Tokenizer as HuggingFace

    if kind == "gpt2":
        bpe = train_tokenizer(make_config(vocab_size=2048), real_stories)
        assert isinstance(bpe, BPETokenizer)
        tokenizer: Tokenizer = gpt2_style(bpe)
    else:
        size = None if kind == "char" else 2048
        tokenizer = train_tokenizer(make_config(kind, vocab_size=size), real_stories)
        assert tokenizer.vocab_size == (size or tokenizer.vocab_size)
    tokenizer.save(tmp_path)
    other = HuggingFace.from_file(str(tmp_path / "tokenizer.json"))
    expected = tokenizer.encode_batch(real_stories)
    assert [encoding.ids for encoding in other.encode_batch(real_stories)] == expected
    assert [tokenizer.decode(ids) for ids in expected] == real_stories
