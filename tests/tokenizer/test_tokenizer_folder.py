"""The folder on disk: paths, interrupted saves, damage."""

import json
import pickle
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizer_samples import make_config

from tiny_lm.errors import UserError
from tiny_lm.tokenizer import Tokenizer, load_tokenizer, train_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    train_tokenizer(make_config(vocab_size=280), ["the cat and the hat " * 5]).save(tmp_path / "tok.v1")
    return tmp_path / "tok.v1"


def test_the_folder_or_any_file_in_it(folder: Path) -> None:
    expected = load_tokenizer(folder).hash
    for name in ("tokenizer.json", "metadata.json", "tokenizer_config.json", "tokenizer.pkl", "tokenizer.model"):
        assert load_tokenizer(str(folder / name)).hash == expected
    with pytest.raises(UserError, match=r"has no tokenizer \(metadata\.json is missing\)"):
        load_tokenizer(folder.parent)
    for missing in (folder.parent / "none", folder.parent / "none.pkl", folder / "a" / "b"):
        with pytest.raises(UserError, match="no such tokenizer folder; `tiny-lm tokenizer train` writes one"):
            load_tokenizer(missing)


def test_an_old_pickle_is_named_but_not_read(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.pkl").write_bytes(b"anything")
    for path in (tmp_path, tmp_path / "tokenizer.pkl"):
        with pytest.raises(UserError, match="tokenizer import"):
            load_tokenizer(path)


def test_what_the_folder_holds(folder: Path) -> None:
    metadata = json.loads((folder / "metadata.json").read_text())
    tokenizer = load_tokenizer(folder)
    assert {file.name for file in folder.iterdir()} == {"tokenizer.json", "tokenizer_config.json", "metadata.json"}
    assert (metadata["kind"], metadata["vocab_size"], metadata["hash"]) == ("BPE", tokenizer.vocab_size, tokenizer.hash)
    assert metadata["special_tokens"]["eos"] == {"text": "<eos>", "id": tokenizer.eos_id}
    assert set(metadata["versions"]) == {"rustbpe", "tiktoken"}
    assert metadata["training"]["bytes"] == 100
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["add_bos_token"] is False
    assert (config["bos_token"], config["pad_token"]) == ("<bos>", "<pad>")


def test_an_interrupted_save_never_looks_whole(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer_config.json").mkdir()  # so that writing it fails half-way
    with pytest.raises(UserError, match="could not be written"):
        tokenizer.save(folder)
    with pytest.raises(UserError, match=r"metadata\.json is missing"):
        load_tokenizer(folder)


def test_saving_replaces_another_kind(folder: Path, tokenizers: dict[str, Tokenizer]) -> None:
    (folder / "README.md").write_text("mine")
    for kind in ("sentencepiece", "char"):
        tokenizers[kind].save(folder)
        assert load_tokenizer(folder).hash == tokenizers[kind].hash
        assert (folder / "tokenizer.model").exists() == (kind == "sentencepiece")
    assert (folder / "README.md").read_text() == "mine"


def edit(file: Path, change) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


DAMAGE = {
    "no metadata": lambda f: (f / "metadata.json").unlink(),
    "no tokenizer.json": lambda f: (f / "tokenizer.json").unlink(),
    "truncated": lambda f: (f / "tokenizer.json").write_bytes((f / "tokenizer.json").read_bytes()[:500]),
    "a pickle in disguise": lambda f: (f / "tokenizer.json").write_bytes(pickle.dumps({"model": {}})),
    "metadata is a list": lambda f: (f / "metadata.json").write_text("[]"),
    "metadata is a pickle": lambda f: (f / "metadata.json").write_bytes(pickle.dumps({"kind": "BPE"})),
    "other format": lambda f: edit(f / "metadata.json", lambda m: m.update(format=99)),
    "unknown kind": lambda f: edit(f / "metadata.json", lambda m: m.update(kind="bpe")),
    "kind is no text": lambda f: edit(f / "metadata.json", lambda m: m.update(kind=[1])),
    "another kind": lambda f: edit(f / "metadata.json", lambda m: m.update(kind="char")),
    "gpt2": lambda f: edit(f / "metadata.json", lambda m: m.update(kind="gpt2")),
    "sentencepiece": lambda f: edit(f / "metadata.json", lambda m: m.update(kind="sentencepiece")),
    "wrong hash": lambda f: edit(f / "metadata.json", lambda m: m.update(hash="0" * 64)),
    "no specials": lambda f: edit(f / "metadata.json", lambda m: m.pop("special_tokens")),
    "specials without text": lambda f: edit(f / "metadata.json", lambda m: m["special_tokens"].update(pad=3)),
    "no eos": lambda f: edit(f / "metadata.json", lambda m: m["special_tokens"].pop("eos")),
    "other special": lambda f: edit(f / "metadata.json", lambda m: m["special_tokens"]["eos"].update(text="<e>")),
    "surrogate": lambda f: edit(f / "metadata.json", lambda m: m["special_tokens"]["eos"].update(text="\ud800")),
    "added tokens": lambda f: edit(f / "tokenizer.json", lambda t: t["added_tokens"].pop()),
    "added id": lambda f: edit(f / "tokenizer.json", lambda t: t["added_tokens"][0].update(id=7)),
    "a list": lambda f: (f / "tokenizer.json").write_text("[]"),
    "no model": lambda f: edit(f / "tokenizer.json", lambda t: t.pop("model")),
    "no vocabulary": lambda f: edit(f / "tokenizer.json", lambda t: t["model"].update(vocab=["a"])),
    "a hole": lambda f: edit(f / "tokenizer.json", lambda t: t["model"]["vocab"].pop("!")),
    "an id out of range": lambda f: edit(f / "tokenizer.json", lambda t: t["model"]["vocab"].update({"!": 10**9})),
    "an id that is no number": lambda f: edit(f / "tokenizer.json", lambda t: t["model"]["vocab"].update({"!": "33"})),
    "a foreign character": lambda f: edit(f / "tokenizer.json", lambda t: t["model"]["vocab"].update({"漢": 276})),
    "swapped ids": lambda f: edit(f / "tokenizer.json", lambda t: t["model"]["vocab"].update({"!": 34, '"': 33})),
    "foreign pre-tokenizer": lambda f: edit(f / "tokenizer.json", lambda t: t.update(pre_tokenizer=None)),
    "another pattern": lambda f: edit(
        f / "tokenizer.json", lambda t: t["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex="(a*)*b")
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_one_clear_line(folder: Path, damage: str) -> None:
    DAMAGE[damage](folder)
    with pytest.raises(UserError) as caught:
        load_tokenizer(folder)
    message = str(caught.value)
    assert message.startswith(str(folder))
    assert "\n" not in message
    assert len(message) < 400 + len(str(folder))


def test_files_of_two_sentencepiece_tokenizers(tokenizers: dict[str, Tokenizer], tmp_path: Path, corpus) -> None:
    tokenizers["sentencepiece"].save(tmp_path / "a")
    train_tokenizer(make_config("sentencepiece", vocab_size=400), corpus).save(tmp_path / "b")
    (tmp_path / "b" / "tokenizer.model").replace(tmp_path / "a" / "tokenizer.model")
    with pytest.raises(UserError, match=r"other tokens than tokenizer\.model"):
        load_tokenizer(tmp_path / "a")
    (tmp_path / "a" / "tokenizer.model").unlink()
    with pytest.raises(UserError, match=r"tokenizer\.model: could not be read"):
        load_tokenizer(tmp_path / "a")


def varint(number: int) -> bytes:
    return bytes([number & 0x7F | (0x80 if number > 0x7F else 0)]) + (varint(number >> 7) if number > 0x7F else b"")


def field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda model: b"", "tokenizer.model is empty"),
        (lambda model: model[:-3], "is damaged or not a SentencePiece model"),
        (lambda model: model + field(1, field(1, b"x" * 2000)), "a piece of 2,000 bytes"),
        (lambda model: model + field(1, field(1, b"\xff\xfe")), "a piece is not UTF-8"),
        (lambda model: model + field(1, field(1, b"ab") + b"\x15\x00\x00\xc0\x7f"), "a score that is not finite"),
        (lambda model: model + field(1, field(1, b"ab") + b"\x10\x01"), "a score that is not finite"),
        (lambda model: model + field(1, b"\x0a\xff\xff\xff\xff\x0f"), "leads beyond the end"),
        (lambda model: model + b"\x0a" + b"\xff" * 11, "a number is too long"),
        (lambda model: model + b"\x0f", "a field of the unknown type 7"),
        (lambda model: model + b"\x08\x01", "a number where text is expected"),
        (lambda model: model + field(3, field(2, b"\xff" * 40)), "normalizes text"),
        (lambda model: model + field(5, field(2, b"\xff" * 40)), "normalizes text"),
        (lambda model: model + field(4, field(1, b"")), "holds texts to test itself with"),
        (lambda model: model + field(2, b"\x18\x01"), "not of the type BPE"),
    ],
)
def test_a_sentencepiece_model_is_checked_before_the_library_reads_it(
    tokenizers: dict[str, Tokenizer], change, problem: str, tmp_path: Path
) -> None:
    tokenizers["sentencepiece"].save(tmp_path)
    file = tmp_path / "tokenizer.model"
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(UserError, match=problem) as caught:
        load_tokenizer(tmp_path)
    assert str(file) in str(caught.value) or str(caught.value).startswith(f"{tmp_path}: tokenizer.model")
    assert "\n" not in str(caught.value)


def test_a_token_that_would_take_forever_to_merge_is_refused(folder: Path) -> None:
    edit(folder / "tokenizer.json", lambda t: t["model"]["vocab"].update({"x" * 20_000: len(t["model"]["vocab"])}))
    with pytest.raises(UserError, match=r"too long for a BPE tokenizer \(the longest has 20,000 bytes\)"):
        load_tokenizer(folder)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_changed_byte_is_noticed_or_harmless(folder: Path, data: st.DataObject) -> None:
    expected = load_tokenizer(folder).hash
    file = folder / data.draw(st.sampled_from(["tokenizer.json", "metadata.json"]))
    content = file.read_bytes()
    place = data.draw(st.integers(0, len(content) - 1))
    changed = data.draw(st.binary(max_size=3))
    file.write_bytes(content[:place] + changed + content[place + data.draw(st.integers(0, 3)) :])
    try:
        assert load_tokenizer(folder).hash == expected
    except UserError as error:
        assert "\n" not in str(error)
    finally:
        file.write_bytes(content)
