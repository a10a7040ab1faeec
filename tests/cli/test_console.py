"""Nobody reads what is printed, or a terminal does: real pipes, terminals, full disks and signals."""

import ast
import contextlib
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest

from tiny_lm.console import make_console, one_line, shell_command, styled, visible
from tiny_lm.dataset.stories import generate_stories

PACKAGE = Path(__file__).parent.parent.parent / "tiny_lm"
pty = pytest.importorskip("pty")  # there is none on Windows

WORK = """
import sys
from tiny_lm.console import guard_streams
guard_streams()
for number in range(3000):
    print("result", number)
    print("message", number, file=sys.stderr)
with open("whole", "w") as file:
    file.write("whole")
"""


def shell(command: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    words = ["bash", "-c", f"set -o pipefail; {command}"]
    variables = {**os.environ, "PY": sys.executable, **environment}
    return subprocess.run(words, cwd=folder, capture_output=True, env=variables, timeout=120)


@pytest.mark.parametrize(
    "redirection",
    [
        "2>&1 >/dev/null | head -n 1",
        "2>/dev/null | head -n 1",
        "2>&1 | head -c 0",
        ">&-",
        "2>&-",
        "<&- >&- 2>&-",
        ">/dev/full 2>/dev/full",
        ">/dev/full 2>&-",
    ],
)
def test_work_goes_on_without_a_reader(redirection: str, tmp_path: Path) -> None:
    (tmp_path / "work.py").write_text(WORK)
    result = shell(f"$PY work.py {redirection}", tmp_path)
    assert (tmp_path / "whole").read_text() == "whole"
    assert result.returncode == 0
    assert b"Error" not in result.stderr and b"Exception ignored" not in result.stderr


def test_work_goes_on_when_its_terminal_is_closed(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", WORK], cwd=tmp_path, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    )
    os.close(theirs)
    os.read(ours, 10)
    os.close(ours)
    assert child.wait(timeout=60) == 0
    assert (tmp_path / "whole").read_text() == "whole"


def test_a_full_pipe_that_does_not_block_loses_nothing(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    child = subprocess.Popen([sys.executable, "-c", WORK], cwd=tmp_path, stdout=writer, stderr=writer)
    os.close(writer)
    time.sleep(0.5)  # until the pipe is full
    with os.fdopen(reader, "rb") as file:
        lines = file.read().splitlines()
    assert child.wait(timeout=60) == 0
    assert len([line for line in lines if line.startswith(b"message")]) == 3000


def test_no_file_gets_the_number_of_a_closed_stream(tmp_path: Path) -> None:
    (tmp_path / "work.py").write_text(
        "from tiny_lm.console import guard_streams\nguard_streams()\nimport os, sys\n"
        "file = open('data', 'w')\nprint('lost')\nos.write(1, b'lost')\nos.write(2, b'lost')\nfile.write('data')\n"
        "assert sys.stdin.read() == ''\nassert file.fileno() > 2\n"
    )
    assert shell("$PY work.py <&- >&- 2>&-", tmp_path).returncode == 0
    assert (tmp_path / "data").read_text() == "data"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_terminal_that_knows_few_characters_costs_nothing(encoding: str, tmp_path: Path) -> None:
    code = (
        "from tiny_lm.console import *; guard_streams(); "
        r"print_result('Zo\u00eb\ud800\udce9'); print_message('\u201c\udce9')"
    )
    result = shell(f"$PY -c {shlex.quote(code)}", tmp_path, LANG="C", LC_ALL="C", PYTHONIOENCODING=encoding)
    assert result.stdout == "Zoë\ufffd".encode() + b"\xe9\n"  # the byte of a name that is not UTF-8
    assert result.stderr == "“\\udce9\n".encode()


def on_terminal(code: str) -> bytes:
    """Return what a terminal gets from a program."""
    ours, theirs = pty.openpty()
    start = "from tiny_lm.console import *; import sys; guard_streams()\n"
    child = subprocess.Popen([sys.executable, "-c", start + code], stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # Linux: the other side is closed
        while piece := os.read(ours, 4096):
            shown += piece
    os.close(ours)
    assert child.wait(timeout=60) == 0
    return shown.replace(b"\r\n", b"\n")


def test_a_terminal_gets_no_control_character_of_a_text() -> None:
    story = "print_result('a\\x1b', end=''); print_result(']0;owned\\x07\\x9b2J\\u202eb\\U000e0041')"
    assert on_terminal(story).decode() == "a␛]0;owned␇\\u009b2J\\u202eb\\udb40\\udc41\n"
    assert on_terminal("print('plain\\x1b[2J')").decode() == "plain␛[2J\n"
    assert on_terminal("print_error('x.bin: tensor \\x1b[31m\\n\\r\\u2028end')").decode() == (
        "error: x.bin: tensor ␛[31m ␍\\u2028end\n"
    )
    # What other libraries print on standard error passes as far as progress bars need it.
    assert on_terminal("print('\\x1b[1A\\x1b[2Kbar\\x1b]0;owned\\x1b[6n', file=sys.stderr)") == (
        "\x1b[1A\x1b[2Kbar␛]0;owned␛[6n\n".encode()
    )


def test_a_pipe_gets_a_text_as_it_is(tmp_path: Path) -> None:
    code = r"from tiny_lm.console import *; guard_streams(); print_result('a\x1b[2J\u202e\x00\r')"
    assert shell(f"$PY -c {shlex.quote(code)}", tmp_path).stdout == "a\x1b[2J\u202e\x00\r\n".encode()


def test_tables_and_lines_take_names_literally() -> None:
    from rich.table import Table

    output = io.StringIO()
    console = make_console(file=output, width=80, force_terminal=True, color_system=None)
    console.print("run folder c[blink]/r b[/x] :smile: \x1b[2J")
    table = Table("a[/b]", title="t[/u]")
    table.add_row("b[/x]", styled("c[red]", "bold"))
    console.print(table)
    for name in ("c[blink]/r", "b[/x]", ":smile:", "␛[2J", "a[/b]", "t[/u]", "c[red]"):
        assert name in output.getvalue()


@pytest.mark.parametrize(
    "words",
    [
        ["tiny-lm", "generate", "runs/my run", "--prompt", "it's 5 $HOME `id` \\ é"],
        ["tiny-lm", "runs/a\nb", "c\x1b[2J\x07", "\u202ed'\\", "e\udce9f"],
        ["tiny-lm", "", "*", "~", "a;b", "c[blink]"],
    ],
)
def test_a_printed_command_is_read_by_a_shell_as_it_is_meant(words: list[str], tmp_path: Path) -> None:
    command = shell_command(*words)
    assert one_line(command) == command
    read = shell(f"printf '%s\\0' {command}", tmp_path).stdout
    assert read == b"".join(os.fsencode(word) + b"\0" for word in words)
    assert shell_command("tiny-lm", Path("-r")) == "tiny-lm ./-r"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_paths_in_printed_commands_are_quoted(path: Path) -> None:
    for text in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        for before, value in pairwise(text.values if isinstance(text, ast.JoinedStr) else []):
            is_command = isinstance(before, ast.Constant) and re.search(r"tiny-lm( -*[a-z-]+)+ $", before.value)
            assert not (is_command and isinstance(value, ast.FormattedValue)), f"{path}:{text.lineno}: shell_command"


def test_visible_leaves_json_the_same_document() -> None:
    value = {"text": "\x7f\u202e\U000e0041\ud800 \x1b"}
    shown = visible(json.dumps(value, ensure_ascii=False))
    assert json.loads(shown) == value
    assert shown.isprintable()


# --- commands --------------------------------------------------------------------------------------------------------

TINY_LM = "$PY -c 'from tiny_lm.cli import main; main()'"


@pytest.mark.parametrize("words", ["--version", "params --model-config gpt2-8k-2l"])
def test_a_result_that_could_not_be_written_is_an_error(words: str, tmp_path: Path) -> None:
    result = shell(f"{TINY_LM} {words} >/dev/full", tmp_path)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(b"error: standard output: could not be written (No space left on device)")


def test_an_error_is_one_line_whatever_the_user_typed(tmp_path: Path) -> None:
    result = shell(f"{TINY_LM} $'a\\x1b]0;x\\x07\\nb\\xe9'", tmp_path)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert not set(line) & {0x07, 0x1B, 0xE9}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with configs, a stream, and the run `x y`, whose training lost the reader of both its streams."""
    folder = tmp_path_factory.mktemp("lost reader")
    (folder / "text.txt").write_text("\n<|endoftext|>\n".join(generate_stories(60)))
    (folder / "text.yaml").write_text("name: text.txt\nsource: local\n")
    (folder / "bpe.yaml").write_text("name: bpe\nvocab_size: 400\ndataset_config: text.yaml\nval_split: 0.2\n")
    (folder / "model.yaml").write_text("vocab_size: 400\ncontext_length: 64\nd_model: 32\nn_layers: 1\nn_heads: 2\n")
    (folder / "training.yaml").write_text(
        "max_steps: 40\nlearning_rate: 0.001\nprecision: 32-true\nval_every_n_steps: 2\nlog_every_n_steps: 2\n"
    )
    (folder / "data.yaml").write_text(
        "train_path: data/bpe-tokenized/train.bin\nval_path: data/bpe-tokenized/val.bin\n"
        "block_size: 32\nbatch_size: 2\n"
    )
    shell(f"{TINY_LM} tokenizer train --config bpe.yaml >/dev/full 2>&1", folder)
    assert shell(f"{TINY_LM} tokenize --config bpe.yaml 2>&1 | head -c 0", folder).returncode == 0
    configs = "--model-config model.yaml --training-config training.yaml --data-config data.yaml"
    result = shell(f"{TINY_LM} train {configs} --set training.run_name=x 2>&1 | head -n 1", folder)
    assert result.returncode == 0
    (folder / "runs/x").rename(folder / "runs/x y")
    return folder


def test_training_goes_on_without_a_reader(trained: Path) -> None:
    record = json.loads((trained / "runs/x y/run.json").read_text())
    assert (record["status"], record["steps"]) == ("finished", 40)
    assert (trained / "runs/x y/report.html").is_file()


@pytest.mark.parametrize("options", ["", "--num-samples 3", "--json"])
def test_generating_for_nobody_ends_quietly(options: str, trained: Path) -> None:
    result = shell(f"{TINY_LM} generate 'runs/x y' --max-new-tokens 20 {options} | head -c 0", trained)
    assert (result.returncode, result.stderr) == (141, b"")


def test_generating_onto_a_full_disk_is_an_error(trained: Path) -> None:
    result = shell(f"{TINY_LM} generate 'runs/x y' --max-new-tokens 20 >/dev/full", trained)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(b"error: standard output: ")
    assert shell(f"{TINY_LM} generate 'runs/x y' --max-new-tokens 20 2>&- >story.txt", trained).returncode == 0
    assert (trained / "story.txt").read_text().startswith("Once upon a time")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("options", [[], ["--interactive"]])
def test_a_second_signal_is_no_traceback(number: int, options: list[str], trained: Path) -> None:
    words = ["generate", "runs/x y", "--max-new-tokens", "100000", "--min-new-tokens", "90000", *options]
    child = subprocess.Popen(
        [sys.executable, "-c", f"from tiny_lm.cli import main; main(*{words!r})"],
        cwd=trained,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert child.stdin and child.stdout
    child.stdin.write(b"One day\n")
    child.stdin.flush()
    os.read(child.stdout.fileno(), 20)
    for _ in range(2):
        child.send_signal(number)
        time.sleep(0.02)
    _, errors = child.communicate(timeout=60)
    assert b"Traceback" not in errors and b"Exception ignored" not in errors, errors
    assert child.returncode in (-number, 128 + number, 0 if options else 130)
    if options and number == signal.SIGINT:  # in the story, or before its first or after its last token
        assert b"(stopped)" in errors or b"(/quit or Ctrl-D leaves)" in errors


def test_the_next_command_names_the_run(trained: Path) -> None:
    result = shell(f"{TINY_LM} export huggingface 'runs/x y' --output-dir 'out [/b] z'", trained)
    assert result.returncode == 0, result.stderr
    assert b"next: tiny-lm generate 'out [/b] z' --prompt 'Once upon a time'" in result.stderr
