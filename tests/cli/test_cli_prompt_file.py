"""Prompt files as people have them: only line ends end a line, a BOM is dropped, bad bytes are one line."""

import io
from pathlib import Path
from types import SimpleNamespace

import pytest

from tiny_lm.cli.generate import _read_prompts
from tiny_lm.errors import UserError


def test_only_line_ends_end_a_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data = "\ufeffone\u2028still one\x0b\x0c\x85\x1c.\r\ntwo\\nlines\rthree\n\n  \nfour".encode()
    prompts = ["one\u2028still one\x0b\x0c\x85\x1c.", "two\nlines", "three", "four"]
    (tmp_path / "p.txt").write_bytes(data)
    assert _read_prompts(tmp_path / "p.txt") == prompts
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(data)))
    assert _read_prompts(Path("-")) == prompts


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"ok\n\xff", "p.txt: is not UTF-8 text (byte 3 is invalid)"),
        ("one".encode("utf-16"), "p.txt: is not UTF-8 text (byte 0 is invalid)"),
        (b"\xef\xbb\xbf\r\n \n", "p.txt: contains no prompt"),
        (b"x" * (16 * 2**20 + 1), "p.txt: larger than 16 MiB"),
        (None, "p.txt: could not be read (No such file or directory)"),
    ],
)
def test_a_prompt_file_that_cannot_be_used_is_one_line(tmp_path: Path, data: bytes | None, message: str):
    if data is not None:
        (tmp_path / "p.txt").write_bytes(data)
    with pytest.raises(UserError, match=r"^[^\n]+$") as caught:
        _read_prompts(tmp_path / "p.txt")
    assert message in str(caught.value)
