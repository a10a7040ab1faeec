"""Paths and machines as people have them: what they break ends in one line, and nothing waits for ever."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tiny_lm.dataset.stories import generate_stories
from tiny_lm.errors import UserError
from tiny_lm.files import check_name, write_text
from tiny_lm.reading import read_text
from tiny_lm.runs import new_run_name, read_metrics

LONG = "a" * 300


@pytest.mark.parametrize(
    "words",
    [
        ("train", "--model-config", LONG, "--training-config", "quickstart", "--data-config", "quickstart"),
        ("quickstart", "--text", LONG),
        ("generate", "/".join(["a"] * 3000)),
        ("report", LONG),
    ],
)
def test_an_overlong_path_is_one_line(words: tuple[str, ...], workplace: Path, cli: Callable[..., object]) -> None:
    result = cli(*words)
    assert result.code == 2
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in result.stderr


def test_an_empty_text_is_not_the_working_directory(workplace: Path, cli: Callable[..., object]) -> None:
    (workplace / "mine.txt").write_text("One day.\n")
    result = cli("quickstart", "--text", "")
    assert result.code == 2
    assert '--text "": is empty' in result.stderr


def test_a_working_directory_that_was_deleted_is_named(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    code = f"import os, sys; os.chdir({str(gone)!r}); os.rmdir({str(gone)!r}); from tiny_lm.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, "profiles"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr == "error: the working directory no longer exists; change to another one\n"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_under_the_name_of_a_file_is_not_waited_for(
    tmp_path: Path, workplace: Path, cli: Callable[..., object]
) -> None:
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(UserError, match=r"metrics.jsonl: is not a regular file"):
        read_metrics(tmp_path / "metrics.jsonl")
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    with pytest.raises(UserError, match=r"zero.json: is not a regular file"):
        read_text(tmp_path / "zero.json")
    (workplace / "corpus").mkdir()
    os.mkfifo(workplace / "corpus" / "pipe.txt")
    (workplace / "corpus" / "real.txt").write_text("\n<|endoftext|>\n".join(generate_stories(60)))
    (workplace / "bpe.yaml").write_text("name: bpe\nvocab_size: 300\ndataset_config: text.yaml\nval_split: 0.2\n")
    (workplace / "text.yaml").write_text("name: corpus\nsource: local\n")
    result = cli("tokenizer", "train", "--config", "bpe.yaml")
    assert result.code == 0, result.stderr
    assert "60 documents, 1 file" in result.stderr


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    name = os.fsdecode(b"m\xe9")
    assert new_run_name(name, "data").startswith("m_-data-")
    write_text(tmp_path / "a.md", f"# {name}\n")
    assert (tmp_path / "a.md").read_text() == "# m\\udce9\n"
    with pytest.raises(UserError, match="rename it"):
        check_name(tmp_path / name)


def test_too_many_events_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tiny_lm.runs._MAX_EVENTS", 3)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' * 4)
    with pytest.raises(UserError, match="has more than 3 events"):
        read_metrics(tmp_path / "metrics.jsonl")
