"""Small files that unpack to gigabytes: each is read, or refused in one line, within a gigabyte of memory."""

import gzip
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

MIB = 2**20
READ = """
import sys
from tiny_lm.dataset import DatasetConfig, iter_documents
from tiny_lm.errors import UserError
count, message = 0, ""
try:
    for _ in iter_documents(DatasetConfig(name=sys.argv[1], source="local"), "train", val_split=0):
        count += 1
except UserError as error:
    message = str(error)
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(count, peak, message)
"""


def parts(name: str) -> Iterator[bytes]:
    """Yield what is inside a bomb."""
    if name == "row.csv.gz":
        yield b"text\n"
        for _ in range(40):
            yield b'"' + b"x\n" * (4 * MIB) + b'",'
    elif name == "columns.csv.gz":
        yield from [b"text\n", *[b"ab," * MIB] * 20]
    elif name == "lists.jsonl.gz":
        yield from [b'{"text": "a", "b": [', *[b"[]," * MIB] * 20, b"1]}"]
    elif name == "nested.jsonl.gz":
        yield from [b'{"text": "a", "b": ', *[b"[" * MIB] * 60]
    elif name == "strings.jsonl.gz":
        yield from [b'{"text": "a", "b": [', *[b'"ab",' * MIB] * 11, b"1]}"]
    elif name == "text.jsonl.gz":
        yield from [b'{"text": "', *[b"x, [" * (MIB // 4)] * 62, '🐢"}'.encode()]
    elif name == "text.csv.gz":
        yield from [b'text\n"', *[b"x,\n" * (MIB // 3)] * 62, b'"\n']
    elif name == "zeros.parquet.gz":
        yield from [b"\0" * MIB] * 300
    else:
        yield from [b"text\n" if "csv" in name else b"", *[b"\n" * MIB] * 200, b"\n"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from /proc")
@pytest.mark.parametrize(
    ("name", "count", "message"),
    [
        ("row.csv.gz", 0, "larger than 64 MiB"),
        ("columns.csv.gz", 0, "a.csv.gz:2: the row has more than 1,048,576 columns"),
        ("lists.jsonl.gz", 0, "a.jsonl.gz:1: has more than 1,048,576 JSON values"),
        ("nested.jsonl.gz", 0, "has more than 1,048,576 JSON values"),
        ("strings.jsonl.gz", 0, "has more than 1,048,576 JSON values"),
        ("text.jsonl.gz", 1, ""),
        ("text.csv.gz", 1, ""),
        ("zeros.parquet.gz", 0, "unpacks to more than 256 MiB"),
        ("lines.txt.gz", 0, ""),
        ("lines.jsonl.gz", 0, ""),
        ("lines.csv.gz", 0, ""),
    ],
)
def test_a_bomb_in_gzip(tmp_path: Path, name: str, count: int, message: str):
    path = tmp_path / f"a.{name.partition('.')[2]}"
    with gzip.open(path, "wb", 1) as file:
        for part in parts(name):
            file.write(part)
    check(path, count, message)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from /proc")
@pytest.mark.parametrize(
    ("rows", "is_dictionary", "count", "message"),
    [(30, True, 30, ""), (6, False, 6, ""), (14, False, 0, "a page of row group 0 unpacks to more than 512 MiB")],
)
def test_a_bomb_in_parquet(tmp_path: Path, rows: int, is_dictionary: bool, count: int, message: str):
    path = tmp_path / "a.parquet"
    text = pyarrow.array(["x" * (40 * MIB)])
    if is_dictionary:
        column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * rows, pyarrow.int32()), text)
    else:
        column = pyarrow.concat_arrays([text] * rows)
    table = pyarrow.table({"text": column})
    pyarrow.parquet.write_table(
        table, path, compression="zstd", use_dictionary=is_dictionary, dictionary_pagesize_limit=2**30
    )
    assert path.stat().st_size < 200_000
    check(path, count, message)


def check(path: Path, count: int, message: str) -> None:
    """Read a file in a process of its own."""
    done = subprocess.run([sys.executable, "-c", READ, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    read, peak, said = done.stdout.strip("\n").split(" ", 2)
    assert (int(read), message in said, bool(message)) == (count, True, bool(said)), said
    assert int(peak) < 1000 * 1024  # KiB
