"""Reading takes the same memory whatever the size of the corpus."""

import gzip
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

resource = pytest.importorskip("resource", reason="memory limits need a POSIX system")

ROW = "Once upon a time there was a small turtle. " * 24  # 1 KiB
READ = """
import resource, sys
from tiny_lm.dataset import DatasetConfig, iter_documents
config = DatasetConfig(name=sys.argv[1], source="local")
if sys.argv[2] != "0":
    in_use = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + int(sys.argv[2]),) * 2)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(sum(1 for _ in iter_documents(config, "train", val_split=0)))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def run(path: Path, limit: int) -> tuple[int, int]:
    """Return the documents read and the KiB of memory that reading took, by a process with ``limit`` more bytes."""
    result = subprocess.run([sys.executable, "-c", READ, path, str(limit)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    count, grown = result.stdout.split()
    return int(count), int(grown)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="address space is read from /proc")
@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("a.txt.gz", f"{ROW}\n<|endoftext|>\n"),
        ("a.jsonl.gz", f'{{"text": "{ROW}"}}\n'),
        ("a.csv.gz", f'1,"{ROW}"\n'),
    ],
)
def test_200_mb_of_gzip_in_24_mb(tmp_path: Path, name: str, row: str):
    path = tmp_path / name
    block = gzip.compress(row.encode() * 1000, 1)
    path.write_bytes(gzip.compress(b"id,text\n" if "csv" in name else b"") + block * 200)
    count, _ = run(path, 24 * 2**20)
    assert count == 200_000


def test_200_mb_of_parquet_in_96_mb(tmp_path: Path):
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": [f"{number} {ROW}" for number in range(5000)]})
    with pyarrow.parquet.ParquetWriter(path, table.schema, use_dictionary=False) as writer:
        for _ in range(40):
            writer.write_table(table)
    count, grown = run(path, 0)
    assert count == 200_000
    assert grown < 96 * 1024  # most of it is the Arrow library itself
