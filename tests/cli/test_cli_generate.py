"""`tiny-lm generate`: what it prints, its session, and what becomes of bad input."""

import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from story_runs import train_story_run

from tiny_lm.inference import TextGenerator

Cli = Callable[..., Any]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory, stream_folder: Path) -> Path:
    """A run of a model with a context of 32 tokens that has seen a few stories."""
    return train_story_run(tmp_path_factory.mktemp("runs") / "told", stream_folder, steps=30)


def test_prompt_and_continuation_and_nothing_more(cli: Cli, run_folder: Path) -> None:
    result = cli("generate", run_folder, "--prompt", "One day", "--max-new-tokens", "12", "--seed", "1")
    expected = TextGenerator.from_run(run_folder).generate("One day", 12, seed=1)
    assert (result.code, result.stdout, result.stderr) == (0, expected + "\n", "")


def test_an_export_tells_what_the_run_tells(cli: Cli, run_folder: Path, tmp_path: Path) -> None:
    assert cli("export", "huggingface", run_folder, "--output-dir", tmp_path / "hf").code == 0
    options = ["--prompt", "One day", "--max-new-tokens", "12", "--seed", "1"]
    weights = tmp_path / "hf" / "model.safetensors"
    told = [
        cli(*model, *options).stdout
        for model in (
            ["generate", run_folder],
            ["generate", tmp_path / "hf"],
            [
                "generate-from-checkpoint",
                "--checkpoint",
                weights,
                "--tokenizer",
                run_folder / "tokenizer",
            ],
        )
    ]
    assert told[0].startswith("One day") and told[0] == told[1] == told[2]


def test_a_compiled_step_tells_the_same(cli: Cli, run_folder: Path) -> None:
    options = ["generate", run_folder, "--prompt", "One day", "--max-new-tokens", "20", "--temperature", "0"]
    compiled = cli(*options, "--compile")
    assert (compiled.code, compiled.stdout) == (0, cli(*options).stdout)
    assert compiled.stderr == "compiling the decoding step, which takes some seconds\n"


def test_several_samples_of_several_prompts(cli: Cli, run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("A bear\n\nOne day\\nhe went\n")
    options = ["--prompt", "The fox", "--num-samples", "2", "--seed", "7", "--max-tokens", "9"]
    result = cli("generate", run_folder, "--prompt-file", tmp_path / "prompts.txt", *options)
    generator = TextGenerator.from_run(run_folder)
    expected = [
        generator.generate(prompt, 9, seed=seed)
        for prompt in ("The fox", "A bear", "One day\nhe went")
        for seed in (7, 8)
    ]
    assert result.stdout == "\n---\n".join(expected) + "\n"
    lines = cli("generate", run_folder, *options, "--json").stdout.splitlines()
    assert [json.loads(line)["seed"] for line in lines] == [7, 8]
    first = json.loads(lines[0])
    assert first["prompt"] + first["text"] == expected[0]
    assert first["finish_reason"] == "length" and first["tokens"] == 9


def test_a_prompt_beyond_the_context_is_told_or_refused(cli: Cli, run_folder: Path) -> None:
    prompt = "The bear and the fox went home. " * 8
    told = cli("generate", run_folder, "--prompt", prompt, "--max-new-tokens", "3")
    assert told.code == 0 and told.stdout.startswith(prompt)
    assert re.search(r"longer than the context of 32 tokens: its first \d+ characters are dropped \('The ", told.stderr)
    strict = cli("generate", run_folder, "--prompt", prompt, "--strict")
    assert strict.code == 2 and re.fullmatch(
        r"error: the prompt has \d+ tokens and the context 32: shorten it, or .*\n", strict.stderr
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--temperature", "-1"], "temperature must be between 0 and 100"),
        (["--top-p", "0"], "top-p must be above 0 and at most 1"),
        (["--prompt", "", "--no-add-bos"], "the prompt is empty"),
        (["--stop", ""], "a stop string must have 1 to 256 characters"),
        (["--stop-token", "<|im_end|>"], r"'<\|im_end\|>' is not a special token of this model; it has"),
        (["--prompt-file", "nowhere.txt"], "nowhere.txt: could not be read"),
        (["--checkpoint", "x.ckpt"], "No such option: --checkpoint"),
        (["--num-samples", "0"], "Invalid value for '--num-samples'"),
        (["--device", "tpu"], "device 'tpu': not available on this machine or in this torch; available: cpu"),
        (["--device", "meta"], "device 'meta': not available on this machine"),
        (["--interactive", "--json"], "--interactive generates one story at a time"),
    ],
)
def test_bad_input_is_one_line(words: list[str], message: str, cli: Cli, run_folder: Path) -> None:
    result = cli("generate", run_folder, *words)
    assert (result.code, result.stdout) == (2, "")
    assert re.fullmatch(f"error: .*{message}.*\n", result.stderr)


def test_a_session_through_a_pipe(cli: Cli, run_folder: Path, tmp_path: Path) -> None:
    saved = tmp_path / "stories.txt"
    typed = ["/history", "/save x", "One day", "/again", "/temprature 3", "/temperature hot", "/temperature -1"]
    typed += ["/seed -1", "/top-k 5", "/top-k off", "/top-p 0.5", "/top-p off", "/temperature 0", "/stop .", "/stop"]
    typed += ["A bear", "/settings", f"/save {saved}", "exit", "this is read by nobody"]
    code = "from tiny_lm.cli import main; main()"
    words = [sys.executable, "-c", code, "generate", str(run_folder), "--interactive"]
    result = subprocess.run(
        [*words, "--seed", "4", "--max-new-tokens", "10"],
        input="\n".join(typed), capture_output=True, text=True, check=True,
    )  # fmt: skip
    generator = TextGenerator.from_run(run_folder)
    story = generator.generate("One day", 10, seed=4)
    bear = generator.generate("A bear", 10, temperature=0, stop=["."])
    assert result.stdout == f"{story}\n{story}\n{bear}\n"
    assert result.stderr.count("error: no story yet: type a prompt\n") == 2
    assert "error: /temprature is not a command; did you mean /temperature?\n" in result.stderr
    assert "error: /temperature needs a number, such as /temperature 1.0 (it got 'hot')" in result.stderr
    assert "error: temperature must be between 0 and 100 (it is -1.0)" in result.stderr
    assert "error: seed must be between 0 and " in result.stderr
    told = result.stderr.partition("error: seed")[2].splitlines()[1:]
    changes = ["/top-k 5", "/top-k off", "/top-p 0.5", "/top-p off", "/temperature 0.0", '/stop "."', '/stop "."']
    assert told[: len(changes)] == changes  # each is told
    assert "/seed 4\n" in result.stderr and "/repetition-penalty off\n" in result.stderr
    assert result.stderr.endswith(f"{saved}: 3 stories\n")
    assert saved.read_text() == "".join(f"{text}\n<|endoftext|>\n" for text in (story, story, bear))


def test_a_session_is_not_saved_through_a_link(run_folder: Path, workplace: Path) -> None:
    """Nor in the place of one that leads nowhere."""
    (workplace / "real.txt").write_text("mine")
    (workplace / "link.txt").symlink_to("real.txt")
    (workplace / "broken.txt").symlink_to("missing.txt")
    code = "from tiny_lm.cli import main; main()"
    words = [sys.executable, "-c", code, "generate", str(run_folder), "--interactive", "--max-new-tokens", "2"]
    typed = "One day\n/save link.txt\n/save broken.txt\n/save real.txt/x\n"
    result = subprocess.run(words, input=typed, capture_output=True, text=True, check=True)
    for name in ("link.txt", "broken.txt"):
        assert f"error: {name}: exists already; choose another name\n" in result.stderr
    assert "error: real.txt/x: could not be written" in result.stderr
    assert (workplace / "broken.txt").is_symlink() and not (workplace / "missing.txt").exists()
    assert (workplace / "real.txt").read_text() == "mine"


class Terminal:
    """A session in a terminal of its own, and the terminal's other end."""

    def __init__(self, words: list[str]) -> None:
        self._end, theirs = pty.openpty()
        self.process = subprocess.Popen(
            words, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, preexec_fn=_own_terminal
        )
        os.close(theirs)
        self._unread = ""

    def type(self, keys: bytes) -> None:
        os.write(self._end, keys)

    def wait_for(self, wanted: str, seconds: float = 60) -> None:
        """Read until ``wanted`` has come; what follows it is left for the next call."""
        self._read_until(lambda: wanted in self._unread, repr(wanted), seconds)
        self._unread = self._unread.partition(wanted)[2]

    def wait_for_more(self, characters: int, seconds: float = 60) -> None:
        """Read until so many more characters have come."""
        self._read_until(lambda: len(self._unread) >= characters, f"{characters} characters", seconds)

    def interrupt_until(self, wanted: str) -> None:
        """Press Ctrl-C until ``wanted`` comes: just after its prompt, readline sees one only with the next key."""
        for _ in range(10):
            self.type(b"\x03")
            if self._comes(lambda: wanted in self._unread, 6):
                break
        self.wait_for(wanted, 0)

    def _read_until(self, come: Callable[[], bool], what: str, seconds: float) -> None:
        assert self._comes(come, seconds), f"{what} did not come: {self._unread[-500:]!r}"

    def _comes(self, come: Callable[[], bool], seconds: float) -> bool:
        end = time.monotonic() + seconds
        while not come() and time.monotonic() < end:
            if select.select([self._end], [], [], 1)[0]:
                self._unread += os.read(self._end, 65536).decode(errors="replace")
        return come()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._end)


def _own_terminal() -> None:
    """Make the terminal the one from which Ctrl-C comes."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture
def terminal(run_folder: Path) -> Iterator[Terminal]:
    code = "from tiny_lm.cli import main; main()"
    words = [sys.executable, "-c", code, "generate", str(run_folder), "--interactive"]
    terminal = Terminal([*words, "--max-new-tokens", "100000", "--min-new-tokens", "100000"])
    yield terminal
    terminal.close()


def test_ctrl_c_stops_the_story_and_not_the_session(terminal: Terminal) -> None:
    terminal.wait_for("> ")
    terminal.type(b"One day\n")
    terminal.wait_for("One day\r\n")  # the echo of what was typed, which readline may repeat
    terminal.wait_for_more(300)  # of the story
    terminal.type(b"\x03")  # Ctrl-C: the terminal makes a signal of it
    terminal.wait_for("(stopped)")
    terminal.wait_for("> ")
    terminal.interrupt_until("/quit or Ctrl-D leaves")
    for command in (b"/min-new-tokens 0\n", b"/max-new-tokens 5\n", b"A bear\n"):
        terminal.wait_for("> ")
        terminal.type(command)
    terminal.wait_for("A bear\r\n")
    terminal.wait_for("A bear")
    terminal.wait_for("> ")
    terminal.type(b"/quit\n")
    assert terminal.process.wait(timeout=60) == 0
