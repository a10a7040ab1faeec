"""What is particular to SentencePiece, characters and GPT-2."""

import random

import pytest
import tiktoken
import tiktoken.registry
from tokenizer_samples import GPT2_BYTES, make_config

from tiny_lm.errors import UserError
from tiny_lm.tokenizer import CharTokenizer, GPT2Tokenizer, SentencePieceTokenizer, Tokenizer, sentencepiece
from tiny_lm.tokenizer import load_tokenizer as load
from tiny_lm.tokenizer import train_tokenizer as train

# --- SentencePiece ---------------------------------------------------------------------------------------------------


@pytest.fixture
def pieces(tokenizers: dict[str, Tokenizer]) -> SentencePieceTokenizer:
    made = tokenizers["sentencepiece"]
    assert isinstance(made, SentencePieceTokenizer)
    return made


def test_newlines_and_words_are_learned(pieces: SentencePieceTokenizer) -> None:
    assert pieces.vocab_size == 512
    assert any("\n" in piece for piece in pieces.pieces[257:])
    assert "▁the" in pieces.pieces
    assert "".join(pieces.token_text(i) for i in pieces.encode("Mia found the ball\n")) == "Mia found the ball\n"


def test_the_space_mark_goes_through_bytes(pieces: SentencePieceTokenizer) -> None:
    ids = pieces.encode("a\u2581b")
    assert [pieces.token_bytes(i) for i in ids] == [b"a", b"\xe2", b"\x96", b"\x81", b"b"]
    assert pieces.encode("\u2581\u2581") == ids[1:4] * 2


@pytest.mark.parametrize("alphabet", ["ab", "a ", "ab \n", "abc\t ●é"])
def test_repetitive_text_is_merged_as_in_hugging_face(alphabet: str, tmp_path) -> None:
    # Pieces with several splits, whose merges could be ordered otherwise; and corpora without a space.
    from tokenizers import Tokenizer as HuggingFace

    rng = random.Random(3)
    corpus = ["".join(rng.choices(alphabet, k=rng.randint(1, 60))) for _ in range(300)]
    tokenizer = train(make_config("sentencepiece", vocab_size=600), corpus)
    tokenizer.save(tmp_path)
    other = HuggingFace.from_file(str(tmp_path / "tokenizer.json"))
    for _ in range(2000):
        text = "".join(rng.choices(alphabet + " ", k=rng.randint(0, 50)))
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert other.encode(text).ids == ids


def test_training_takes_a_bounded_sample(corpus: list[str], monkeypatch) -> None:
    monkeypatch.setattr(sentencepiece, "_SEGMENTS", 150)  # the library wants more than 100
    first = train(make_config("sentencepiece", vocab_size=400), corpus)
    again = train(make_config("sentencepiece", vocab_size=400), iter(corpus))
    assert first.hash == again.hash
    assert first.training["documents"] == len(corpus)


def test_segments_lose_nothing() -> None:
    rng = random.Random(1)
    documents = ["".join(rng.choices("ab \n", [40, 40, 3, spread], k=9000)) for spread in (0, 0.2, 5)]
    documents += ["x" * 5000, "\n" * 5000, "short", "x" * 2048]
    for document in documents:
        parts = list(sentencepiece._segments([document], []))
        assert "".join(parts) == document
        assert max(map(len, parts)) <= 2048
    parts = list(sentencepiece._segments([("word " * 300 + "\n") * 4], []))
    assert all(part.startswith("\n") for part in parts[1:])


def test_long_texts_are_cut_without_changing_ids(pieces: SentencePieceTokenizer, corpus, monkeypatch) -> None:
    text = "   ".join(corpus[:100])
    whole = pieces.encode(text)
    monkeypatch.setattr(sentencepiece, "_PART", 16)
    assert len(list(sentencepiece._parts(text))) > 500
    assert pieces.encode(text) == whole


def test_too_many_characters_for_the_vocabulary() -> None:
    hanzi = "".join(chr(0x4E00 + i) for i in range(1000))
    with pytest.raises(UserError, match=r"vocab_size=400: .*Increase vocab_size$"):
        train(make_config("sentencepiece", vocab_size=400), [hanzi] * 3)


@pytest.mark.parametrize("keep", [0, 3, 100, 5000])
def test_a_damaged_model(pieces: SentencePieceTokenizer, keep: int) -> None:
    with pytest.raises(UserError, match=r"tokenizer\.model is"):
        SentencePieceTokenizer(pieces.model[:keep], {"eos": "<eos>", "bos": "<bos>"})


def test_a_foreign_model_that_changes_text(corpus: list[str]) -> None:
    import io

    import sentencepiece as library

    def model(**options: object) -> bytes:
        target = io.BytesIO()
        library.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus),
            model_writer=target,
            vocab_size=400,
            model_type="bpe",
            minloglevel=2,
            **options,
        )
        return target.getvalue()

    as_it_is = {"normalization_rule_name": "identity"}
    cases = (
        (as_it_is, "no byte fallback"),
        ({"byte_fallback": True}, "normalizes text"),
        ({"byte_fallback": True, **as_it_is}, "would not survive"),  # it adds a space
    )
    for options, problem in cases:
        with pytest.raises(UserError, match=problem):
            SentencePieceTokenizer(model(**options), {"eos": "<eos>", "bos": "<bos>"})


# --- characters ------------------------------------------------------------------------------------------------------


def test_characters_by_frequency_then_code_point() -> None:
    tokenizer = train(make_config("char"), ["bba", "cabd"])
    assert isinstance(tokenizer, CharTokenizer)
    assert tokenizer.characters == ["b", "a", "c", "d"]
    assert tokenizer.encode("abx") == [1, 0, tokenizer.unk_id]
    assert tokenizer.decode(tokenizer.encode("abxd")) == "abd"
    assert tokenizer.decode(tokenizer.encode("abxd"), skip_special=False) == "ab<unk>d"
    assert not tokenizer.lossless
    capped = train(make_config("char", vocab_size=6), ["bba", "cabd"])
    assert capped.vocab_size == 6
    assert capped.encode("bacd") == [0, 1, capped.unk_id, capped.unk_id]


# --- GPT-2 -----------------------------------------------------------------------------------------------------------


def test_without_a_network_gpt2_says_what_to_do(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delitem(tiktoken.registry.ENCODINGS, "gpt2", raising=False)
    with pytest.raises(UserError, match=r"TIKTOKEN_CACHE_DIR.*type: BPE") as caught:
        train(make_config("gpt2"), [])
    assert "\n" not in str(caught.value)


def test_gpt2_ids_and_further_specials(monkeypatch, tmp_path) -> None:
    # A table of the true size stands in for the published one, which tests cannot download: bytes and pairs of bytes.
    base = [bytes([byte]) for byte in GPT2_BYTES]
    base += [left + right for left in base for right in base][:50_000]
    ranks = {token: rank for rank, token in enumerate(base)}
    pattern = r"'s| ?\p{L}+|\s+|."
    published = tiktoken.Encoding(
        "gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256}
    )
    monkeypatch.setitem(tiktoken.registry.ENCODINGS, "gpt2", published)
    plain = train(make_config("gpt2", vocab_size=50257), iter(["one story", "another"]))
    assert plain.vocab_size == 50257
    assert (plain.eos_id, plain.bos_id) == (50256, 50256)
    assert plain.training["documents"] == 2
    tokenizer = train(make_config("gpt2", special_tokens={"pad": "<pad>", "think_start": "<think>"}), [])
    assert isinstance(tokenizer, GPT2Tokenizer)
    assert tokenizer.special_tokens == {"eos": 50256, "bos": 50256, "pad": 50257, "think_start": 50258}
    assert tokenizer.vocab_size == 50259
    tokenizer.save(tmp_path)
    loaded = load(tmp_path)
    assert loaded.encode("We're <|endoftext|>!") == tokenizer.encode("We're <|endoftext|>!")
    assert loaded.hash == tokenizer.hash
    assert loaded.decode([50256, 50258, *loaded.encode("hi")]) == "<think>hi"
