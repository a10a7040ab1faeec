"""JSON as it is written and read: one line for every reader of lines, and a byte order mark that does no harm."""

import json
from pathlib import Path

import pytest

from tiny_lm.config import read_yaml
from tiny_lm.files import to_json, write_json
from tiny_lm.reading import read_json
from tiny_lm.runs import read_metrics

ENDINGS = "a\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029\ud800x\udcff\x7f\x9b[31m\U0001f600é"


def test_json_stays_on_one_line_for_every_reader() -> None:
    text = to_json({"text": ENDINGS})
    assert len(text.splitlines()) == 1 and json.loads(text.encode()) == {"text": ENDINGS}
    assert "é" in text and "\U0001f600" in text
    assert json.loads(to_json([ENDINGS], indent=2)) == [ENDINGS]
    with pytest.raises(ValueError, match="JSON"):
        to_json([float("nan")])


def test_a_name_that_is_not_utf8_can_be_written(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"file": "caf\udce9.txt"})  # as Python reads such a file name
    assert read_json(tmp_path / "a.json") == {"file": "caf\udce9.txt"}


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(b"\xef\xbb\xbf" + b'{"step": 1}\n')
    assert read_json(file) == {"step": 1}
    assert read_metrics(file) == [{"step": 1}]
    file.write_bytes(b"\xef\xbb\xbfname: x\n")
    assert read_yaml(file) == {"name": "x"}


def test_metrics_are_read_by_lines_that_end_as_json_lines_do(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "note": "a\u2028b\x85c"}\r\n{"step": 2}\n{"st', encoding="utf-8", newline="")
    assert [event["step"] for event in read_metrics(file)] == [1, 2]
