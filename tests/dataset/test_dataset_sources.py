"""The documents of any source: splits, counting, and text files that read back as they were written."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiny_lm.dataset import DatasetConfig, describe, download, iter_documents, write_documents
from tiny_lm.dataset.txt import HEAD
from tiny_lm.errors import UserError


def local(path: Path, **values: object) -> DatasetConfig:
    return DatasetConfig.from_dict({"name": str(path), "source": "local", **values})


def read(path: Path, **values: object) -> list[str]:
    return list(iter_documents(local(path, **values), "train", val_split=0))


# --- splits ----------------------------------------------------------------------------------------------------------


def test_the_held_out_documents_and_the_rest_are_the_whole(tmp_path: Path):
    texts = [f"story {number % 3000}" for number in range(6000)]  # each twice
    path = tmp_path / "a.txt"
    write_documents(texts, path)
    sides = [list(iter_documents(local(path), split, val_split=0.1, seed=3)) for split in ("train", "validation")]
    assert sorted(sides[0] + sides[1]) == sorted(texts)
    assert not set(sides[0]) & set(sides[1])
    assert 480 < len(sides[1]) < 720
    again = list(iter_documents(local(path), "validation", val_split=0.1, seed=3))
    other = list(iter_documents(local(path), "validation", val_split=0.1, seed=4))
    assert again == sides[1] != other


def test_max_documents_bounds_what_is_divided(tmp_path: Path):
    path = tmp_path / "a.txt"
    write_documents((f"story {number}" for number in range(500)), path)
    config = local(path, filters={"max_documents": 100})
    sides = [set(iter_documents(config, split, val_split=0.2)) for split in ("train", "validation")]
    assert sides[0] | sides[1] == {f"story {number}" for number in range(100)}


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_an_impossible_share(tmp_path: Path, share: float):
    with pytest.raises(UserError, match="val_split"):
        list(iter_documents(local(tmp_path), "train", val_split=share))


def test_the_built_in_stories():
    config = DatasetConfig(name="stories", source="stories", num_stories=40, num_validation=7, seed=5)
    train, held = (list(iter_documents(config, split)) for split in ("train", "validation"))
    assert (len(train), len(held)) == (40, 7)
    assert not set(train) & set(held)
    assert download(config) == {"train": 40, "validation": 7}
    assert describe(config) == "stories:40:seed5"


def test_origins():
    assert describe(DatasetConfig(name="a/b", config_name="c", revision="v1")) == "huggingface:a/b:c@v1"
    assert describe(DatasetConfig(name="data/*.txt", source="local")) == "local:data/*.txt"


# --- writing ---------------------------------------------------------------------------------------------------------

PRINTABLE = st.text(st.characters(codec="utf-8", exclude_characters="\0"))
LINES = st.lists(st.sampled_from(["a", "\n", "\r", "\r\n", " ", "\ufeff", "\x85", "<|endoftext|>", "<|"])).map("".join)


@pytest.mark.parametrize("separator", ["<|endoftext|>", "blank-line", "---"])
@settings(deadline=None)  # a write waits for the disk
@given(documents=st.lists(PRINTABLE | LINES, max_size=6))
def test_what_is_written_is_read_back(tmp_path_factory: pytest.TempPathFactory, separator: str, documents: list[str]):
    path = tmp_path_factory.mktemp("round-trip") / "a.txt"
    marker = "" if separator == "blank-line" else separator
    texts = [text.replace("\r", "").strip() for text in documents]
    try:
        count = write_documents(documents, path, separator=separator)
    except UserError:
        lines = [line.strip() for text in texts for line in text.split("\n")]
        assert marker in (" ".join(lines) if marker.startswith("<") else lines)
        assert not path.exists()
        return
    back = read(path, separator=separator)
    assert [text.replace("\r", "") for text in back] == [text for text in texts if text]
    assert count == len(back)
    write_documents(back, path, separator=separator)
    assert read(path, separator=separator) == back


def test_a_first_document_longer_than_the_look_ahead(tmp_path: Path):
    texts = ["x\n" * HEAD + "\nx", "y\n\ny"]
    write_documents(texts, tmp_path / "a.txt")
    assert read(tmp_path / "a.txt") == texts


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\n <|endoftext|>\nb", "document 1: contains '<|endoftext|>'"),
        ("a\0", "document 1: contains a NUL"),
        ("a\ud83d", "document 1: contains a lone surrogate at character 1"),
    ],
)
def test_what_could_not_be_read_back_is_refused_and_nothing_written(tmp_path: Path, text: str, message: str):
    path = tmp_path / "a.txt"
    path.write_text("as it was")
    with pytest.raises(UserError) as caught:
        write_documents(["fine", text], path)
    assert message in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_text() == "as it was"
