"""What a corpus is read as, in one line before work begins; corpora of which nothing whole can be held out."""

from pathlib import Path

import pytest

from tiny_lm.dataset import DatasetConfig, iter_documents, survey_corpus
from tiny_lm.errors import UserError

LINES = "".join(f"the whale swam past ship number {number}\n" for number in range(400))


def local(path: Path, **values: object) -> DatasetConfig:
    return DatasetConfig.from_dict({"name": str(path), "source": "local", **values})


def test_the_line_names_documents_separator_encoding_and_skipped_files(tmp_path: Path):
    (tmp_path / "a.txt").write_text("".join(f"one {n}\n\nmore<|endoftext|>\n" for n in range(50)), encoding="utf-16")
    (tmp_path / "b.txt").write_bytes(b"".join(b"two %d\r\r" % n for n in range(50)))
    for name in ("notes.md", ".hidden.txt"):
        (tmp_path / name).write_text("never read")
    found = survey_corpus(local(tmp_path), val_split=0.1)
    assert found and not found.split_within
    assert found.description == (
        f"{tmp_path}: 100 documents, 2 files, UTF-16, UTF-8 with CR line ends, divided by <|endoftext|> and by blank "
        "lines, since <|endoftext|> does not occur, 50 of the separators inside a line, where they divide too, "
        "skipped 2 "
        "other files (.hidden.txt, notes.md)"
    )


@pytest.mark.parametrize("content", [LINES, f"{LINES}<|endoftext|>\n" * 300, "word " * 3000])
def test_few_different_documents_are_divided_within(tmp_path: Path, content: str):
    path = tmp_path / "novel.txt"
    path.write_text(content)
    found = survey_corpus(local(path), val_split=0.05)
    assert found and found.split_within
    assert "the last 5% of each is the validation text" in found.description
    train, held = (
        "".join(iter_documents(local(path), split, val_split=0.05, split_within=True))
        for split in ("train", "validation")
    )
    assert 0.03 < len(held) / len(train + held) < 0.08


def test_whole_documents_are_held_out_where_there_are_enough(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_text("".join(f"story {number}\n\n" for number in range(300)))
    found = survey_corpus(local(path), val_split=0.05)
    assert found and not found.split_within


@pytest.mark.parametrize(
    ("content", "values", "message"),
    [
        ("", {}, "a.txt: the file holds no text"),
        (" \n\n\t\n", {}, "a.txt: the file holds no text"),
        ("one\n\ntwo\n", {"filters": {"min_words": 9}}, "a.txt: none of its 2 documents passes the filters"),
    ],
)
def test_a_corpus_without_a_document_is_named_by_its_file(tmp_path: Path, content: str, values: dict, message: str):
    (tmp_path / "a.txt").write_text(content)
    with pytest.raises(UserError) as caught:
        survey_corpus(local(tmp_path / "a.txt", **values), val_split=0.05)
    assert message in str(caught.value)


def test_named_splits_are_counted_apart(tmp_path: Path):
    (tmp_path / "t.txt").write_text("a\n\nb\n")
    (tmp_path / "v.txt").write_text("")
    config = local(tmp_path, splits={"train": "t.txt", "validation": "v.txt"})
    with pytest.raises(UserError, match=r"splits\.validation: .* holds? no text"):
        survey_corpus(config, val_split=0.05)
    (tmp_path / "v.txt").write_text("c\n")
    found = survey_corpus(config, val_split=0.05)
    assert found and "2 documents to train on and 1 to validate, 2 files" in found.description


def test_a_carriage_return_ends_lines_of_jsonl_and_csv_too(tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\r{"text": "two"}\r')
    (tmp_path / "b.csv").write_bytes(b"text\rthree\r")
    assert list(iter_documents(local(tmp_path), "train", val_split=0)) == ["one", "two", "three"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv"])
def test_a_nul_far_down_is_named_by_its_byte(tmp_path: Path, name: str):
    begin = {"a.txt": b"", "a.jsonl": b'{"text": "', "a.csv": b"text\n"}[name]
    path = tmp_path / name
    path.write_bytes(begin + b"x" * 20_000 + b"\0" + (b'"}' if name == "a.jsonl" else b""))
    with pytest.raises(UserError, match=rf"{name}: NUL at byte {len(begin) + 20_000},"):
        list(iter_documents(local(path), "train", val_split=0))
    texts = list(iter_documents(local(path), "train", val_split=0, errors="replace"))
    assert texts == ["x" * 20_000 + "\ufffd"]


def test_blank_lines_inside_a_quoted_field_stay(tmp_path: Path):
    field = "a\n\n\n" + "\n" * 3_000_000 + "b\n c"
    path = tmp_path / "a.csv"
    path.write_text(f'text\n"{field}"\n\n\nlast\n')
    assert list(iter_documents(local(path), "train", val_split=0)) == [field, "last"]
