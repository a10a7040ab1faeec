"""The user's own files: every format read from real files, and every fault named."""

import csv
import gzip
import json
import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from tiny_lm.dataset import DatasetConfig, ReadingNotes, download, iter_documents
from tiny_lm.dataset.local import read_local
from tiny_lm.dataset.names import name_from_path, path_from_name
from tiny_lm.dataset.text_file import DOCUMENT_LIMIT
from tiny_lm.dataset.txt import HEAD
from tiny_lm.errors import UserError

STORIES = Path(__file__).parents[2] / "../shared/data/tinystories"
TEXTS = ["Once upon a time,\nthere was a cat.", "Zoë said “hi”, \n and left 🐢", "The end."]


def config(name: Path | str, **values: object) -> DatasetConfig:
    return DatasetConfig.from_dict({"name": str(name), "source": "local", **values})


def read(name: Path | str, errors: str = "strict", **values: object) -> list[str]:
    return list(iter_documents(config(name, **values), "train", val_split=0, errors=errors))


def fault(name: Path | str, errors: str = "strict", **values: object) -> str:
    with pytest.raises(UserError, match=r"^[^\n]+$") as caught:
        read(name, errors, **values)
    return str(caught.value)


@pytest.fixture
def file(tmp_path: Path):
    def write(name: str, content: bytes | str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = content.encode() if isinstance(content, str) else content
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return path

    return write


def write_parquet(path: Path, column: pyarrow.Array) -> Path:
    pyarrow.parquet.write_table(pyarrow.table({"id": range(len(column)), "text": column}), path)
    return path


# --- real stories ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not STORIES.is_dir(), reason="the shared TinyStories sample is not here")
def test_the_real_stories_are_all_there():
    named = config(STORIES, splits={"train": "train.txt", "validation": "valid.txt"})
    assert download(named) == {"train": 4540, "validation": 300}
    assert download(config(STORIES)) == {"train": 4840}
    train, held = list(iter_documents(named, "train")), list(iter_documents(named, "validation"))
    assert held[0].startswith("Once upon a time, there was a famous sandwich.")
    assert held[0].endswith("And they all lived happily ever after.")
    assert not set(train) & set(held)
    assert not any("<|endoftext|>" in text or text != text.strip() for text in train + held)


# --- formats ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "A.TXT"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_txt_with_separator_lines(file, name: str, end: str, mark: str):
    content = mark + "<|endoftext|>\n\n" + "\n<|endoftext|>\n".join([*TEXTS, "  \n", "last"])
    assert read(file(name, content.replace("\n", end))) == [*TEXTS, "last"]


def test_a_separator_in_brackets_divides_wherever_it_stands_and_is_counted(file):
    notes = ReadingNotes()
    path = file("a.txt", "one\n\nmore<|endoftext|>\ntwo<|endoftext|>three\n<|endoftext|>\nfour")
    assert list(read_local(config(path), "train", "strict", notes)) == ["one\n\nmore", "two", "three", "four"]
    assert "divided by <|endoftext|>, 2 of the separators inside a line" in notes.describe()
    assert read(file("b.txt", "one<|endoftext|>" * 3)) == ["one"] * 3


def test_another_separator_needs_a_line_of_its_own(file):
    assert read(file("a.txt", "one --- one\n---\n---\n two ---\n"), separator="---") == ["one --- one", "two ---"]


def test_hidden_folders_are_left_out(file, tmp_path: Path):
    for name in ("a.txt", ".git/b.txt", "x/.ipynb_checkpoints/c.txt", "x/d.txt", "x/.e.txt"):
        file(f"corpus/{name}", name)
    assert read(tmp_path / "corpus") == ["a.txt", "x/d.txt"]
    assert read(tmp_path / "corpus" / "**" / "*.txt") == ["a.txt", "x/d.txt"]


def test_brackets_in_the_name_of_a_folder_are_literal(file, tmp_path: Path):
    for name in ("train-1.txt", "train-2.txt", "val.txt"):
        file(f"corpus [2024]/{name}", name)
    splits = {"train": "train-*.txt", "validation": "val.txt"}
    assert read(tmp_path / "corpus [2024]", splits=splits) == ["train-1.txt", "train-2.txt"]
    assert read(tmp_path / "corpus [2024]" / "val.txt") == ["val.txt"]


def test_a_file_that_two_links_lead_to_is_read_once(file, tmp_path: Path):
    path = file("corpus/a.txt", "one")
    (tmp_path / "corpus" / "b.txt").symlink_to(path)
    (tmp_path / "corpus" / "c.txt").hardlink_to(path)
    assert read(tmp_path / "corpus") == ["one"]


def test_a_name_that_is_not_utf8(tmp_path: Path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt"))
    path.write_text("one")
    assert name_from_path(path).endswith("caf\\xe9.txt")
    assert path_from_name(name_from_path(path)) == path
    assert read(name_from_path(path)) == ["one"]


def test_another_separator(file):
    assert read(file("a.txt", "one\n\nmore\n---\ntwo"), separator="---") == ["one\n\nmore", "two"]


def test_blank_lines_separate_when_asked(file):
    path = file("a.txt", "one\n<|endoftext|>\n \t\n\n\ntwo\r\n\r\nthree")
    assert read(path, separator="blank-line") == ["one\n<|endoftext|>", "two", "three"]


def test_blank_lines_separate_when_there_is_no_separator_line(file):
    notes = ReadingNotes()
    path = file("a.txt", "one\nmore\n\ntwo\n")
    assert list(read_local(config(path), "train", "strict", notes)) == ["one\nmore", "two"]
    assert "by blank lines, since <|endoftext|> does not occur" in notes.describe()


def test_a_separator_line_counts_only_near_the_start(file):
    far = "x" * HEAD + "\n\n"
    assert read(file("far.txt", far + "a\n<|endoftext|>\nb"))[1:] == ["a\n<|endoftext|>\nb"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_json_lines_are_read_exactly(file, name: str, mark: str):
    texts = [*TEXTS, " kept \n"]
    records = [{"story": text, "n": 1} for text in [*texts, "", None]]
    content = mark + "\n\n".join(json.dumps(record) for record in records)
    assert read(file(name, content), text_field="story") == texts


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
def test_csv_with_quotes_line_breaks_and_large_fields(tmp_path: Path, file, name: str):
    texts = [*TEXTS, 'He said, "no".\r\n', "large " * 100_000]
    plain = tmp_path / "plain.csv"
    with plain.open("w", newline="", encoding="utf-8-sig") as out:
        csv.writer(out).writerows([["id", "text"], *enumerate(texts)])
    assert read(file(name, plain.read_bytes())) == texts


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string()])
def test_parquet(tmp_path: Path, kind: pyarrow.DataType):
    path = write_parquet(tmp_path / "a.parquet", pyarrow.array([*TEXTS, None, " "], kind))
    assert read(path) == TEXTS


def test_parquet_with_a_dictionary_and_inside_gzip(tmp_path: Path, file):
    path = write_parquet(tmp_path / "a.parquet", pyarrow.array(TEXTS * 50).dictionary_encode())
    assert read(path) == TEXTS * 50
    assert read(file("b.parquet.gz", path.read_bytes())) == TEXTS * 50


# --- which files -----------------------------------------------------------------------------------------------------


def test_a_folder_gives_all_supported_files_in_order(file, tmp_path: Path):
    for name in ("b.txt", "a/z.txt", "c.txt.gz"):
        file(name, f"{name}\n<|endoftext|>\n")
    for name in ("notes.md", ".hidden.txt", "README"):
        file(name, "never read")
    assert read(tmp_path) == ["a/z.txt", "b.txt", "c.txt.gz"]


def test_a_glob_is_sorted_and_a_name_with_brackets_is_a_file(file, tmp_path: Path):
    for name in ("deep/2.txt", "1.txt", "x.md", "odd [1].txt"):
        file(name, name)
    assert read(tmp_path / "**/[12].*") == ["1.txt", "deep/2.txt"]
    assert read(tmp_path / "odd [1].txt") == ["odd [1].txt"]


def test_relative_names_start_at_the_working_directory(file, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file("data/1.txt", "one")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read("data") == read("data/*.txt") == read("~/data/1.txt") == ["one"]


def test_symbolic_link_loops_end(file, tmp_path: Path):
    path = file("data/1.txt", "one")
    (path.parent / "loop").symlink_to(path.parent, target_is_directory=True)
    (path.parent / "again").symlink_to(tmp_path, target_is_directory=True)
    assert read(tmp_path / "data") == ["one"]
    assert set(read(str(tmp_path / "data/**/*.txt"))) == {"one"}
    (tmp_path / "self.txt").symlink_to(tmp_path / "self.txt")
    assert "self.txt: could not be read" in fault(tmp_path / "self.txt")


def test_splits_are_files_folders_or_globs_inside(file, tmp_path: Path):
    for name in ("train/1.txt", "train/2.txt", "valid.txt", "unused.txt"):
        file(name, name)
    both = config(tmp_path, splits={"train": "train", "validation": "val*.txt"})
    assert list(iter_documents(both, "train")) == ["train/1.txt", "train/2.txt"]
    assert list(iter_documents(both, "validation")) == ["valid.txt"]
    assert read(tmp_path, splits={"train": "train/*.txt"}) == ["train/1.txt", "train/2.txt"]


def test_a_file_in_both_splits_is_refused(file, tmp_path: Path):
    file("train.txt", "a")
    file("valid.txt", "b")
    message = fault(tmp_path, splits={"train": "*.txt", "validation": "valid.txt"})
    assert "valid.txt: belongs to both" in message


def test_the_home_directory_of_nobody():
    assert "not a valid path" in fault("~no-such-user-here/a.txt")


def test_splits_of_a_file_are_refused(file):
    assert "not a folder" in fault(file("a.txt", "a"), splits={"train": "train.txt"})


# --- faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.txt", "none.txt: no such file or folder"),
        ("none", "none: no such file or folder"),
        ("*.txt", "no supported file matches"),
        ("empty", "no supported file below this folder"),
        ("a.pdf", "a.pdf: not one of .txt, .jsonl"),
        ("a**.txt[", "a**.txt["),
        ("a\0.txt", "a\\x00.txt': not a valid path"),
        ("x" * 5000, "could not be read (File name too long)"),
    ],
)
def test_nothing_to_read(tmp_path: Path, name: str, message: str):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.pdf").write_bytes(b"%PDF")
    assert message in fault(tmp_path / name)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_no_permission(file, tmp_path: Path):
    file("secret/a.txt", "a").chmod(0)
    assert "a.txt: could not be read (Permission denied)" in fault(tmp_path / "secret/a.txt")
    (tmp_path / "secret").chmod(0)
    assert "secret: could not be read (Permission denied)" in fault(tmp_path)
    (tmp_path / "secret").chmod(0o700)


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl", "a.csv"])
def test_invalid_utf8_is_named_by_its_byte(file, name: str):
    first = {"a.jsonl": b'{"text": "ok"}\n{"text": "', "a.csv": b"text\nok\n"}.get(name, b"ok\n<|endoftext|>\n")
    last = b'"}' if name == "a.jsonl" else b""
    path = file(name, first + "é".encode() + b"\xff." + last)
    assert fault(path).endswith(f"invalid UTF-8 at byte {len(first) + 2}; fix the file, or pass --errors replace")
    assert read(path, "replace") == ["ok", "é\ufffd."]


def test_the_byte_counts_a_byte_order_mark(file):
    assert "at byte 4;" in fault(file("a.txt", b"\xef\xbb\xbfa\xff"))


def test_invalid_utf8_in_parquet_is_named_by_its_row(tmp_path: Path):
    array = pyarrow.array([b"ok", b"a\xff"], pyarrow.binary()).view(pyarrow.string())
    path = write_parquet(tmp_path / "a.parquet", array)
    assert "invalid UTF-8 at byte 1 of row 1" in fault(path)
    assert read(path, "replace") == ["ok", "a\ufffd"]


def test_half_a_surrogate_pair_in_json(file):
    path = file("a.jsonl", '{"text": "a\\ud83d"}\n{"text": "\\ud83d\\udc22"}')
    assert "a.jsonl:1: contains a lone surrogate" in fault(path)
    assert read(path, "replace") == ["a\ufffd", "🐢"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.txt.gz"])
def test_a_binary_file(file, name: str):
    for content in (b"\x7fELF\n\1\0\0\0", "story".encode("utf-16-le")):
        assert "is a binary file" in fault(file(name, content), "replace")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops", "a.jsonl:3: invalid JSON"),
        ("[" * 100_000, "a.jsonl:3: invalid JSON"),
        ('["a"]', "one JSON object per line"),
        ('{"txt": "a"}', "a.jsonl:3: has no field 'text', set text_field; did you mean 'txt'?"),
        ('{"text": 7}', "a.jsonl:3: the field 'text' is not text but 7"),
    ],
)
def test_faulty_json_lines(file, line: str, message: str):
    assert message in fault(file("a.jsonl", f'{{"text": "ok"}}\n\n{line}\n'))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "a.csv: has no column 'text'"),
        ("id,story\n1,a", "has no column 'text', set text_field"),
        ("id,text\n1,a\n2\n", "a.csv:3: has 1 of 2 columns"),
        ('text\n"never closed\n', "invalid CSV"),
    ],
)
def test_faulty_csv(file, content: str, message: str):
    assert message in fault(file("a.csv", content))


def test_faulty_parquet(tmp_path: Path, file):
    whole = write_parquet(tmp_path / "a.parquet", pyarrow.array([f"story {n}" for n in range(5000)]))
    data = whole.read_bytes()
    assert "damaged or incomplete parquet file" in fault(file("cut.parquet", data[:-9]))
    assert "damaged or incomplete parquet file" in fault(
        file("bad.parquet", data[:-9000] + b"\xff" * 4000 + data[-5000:])
    )
    assert "damaged or incomplete parquet file" in fault(file("empty.parquet", b""))
    assert "is not text but int64" in fault(whole, text_field="id")
    assert "has no column 'story', set text_field; there are: id, text" in fault(whole, text_field="story")


@pytest.mark.parametrize("name", ["a.txt.gz", "a.parquet.gz"])
def test_faulty_gzip(tmp_path: Path, name: str):
    path = tmp_path / name
    whole = gzip.compress(os.urandom(50_000).hex().encode(), mtime=0)
    for data in (whole[:-1000], whole[:9000] + b"\0" * 9000 + whole[18000:], b"no gzip"):
        path.write_bytes(data)
        assert f"{name}: damaged or incomplete gzip file" in fault(path)


def test_a_document_above_the_limit_is_refused_where_it_starts(tmp_path: Path):
    line = b"x" * (2**20 - 1) + b"\n"
    path = tmp_path / "a.txt.gz"
    body = gzip.compress(line, 1) * (DOCUMENT_LIMIT // len(line) + 1)
    path.write_bytes(gzip.compress(b"ok\n<|endoftext|>\n") + body)
    assert "the document at byte 17 is larger than 64 MiB; put a line <|endoftext|>" in fault(path)
    path.write_bytes(gzip.compress(b"x" * 2**20, 1) * (DOCUMENT_LIMIT // 2**20 + 1))
    assert "the document at byte 0 is larger than 64 MiB; break it into lines" in fault(path)
