"""``tiny-lm generate RUN --interactive``: type a beginning, get a story, change how it is told."""

import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from difflib import get_close_matches
from pathlib import Path
from random import randrange
from typing import Any

from tiny_lm.cli.generate import tell_dropped
from tiny_lm.console import print_error, print_message, print_result
from tiny_lm.errors import UserError
from tiny_lm.files import write_text
from tiny_lm.inference import GenerationConfig, SamplingParams, TextGenerator

_HELP = """\
Type the beginning of a story and press Enter; Enter alone leaves the beginning to the model.
Ctrl-C stops the story; Ctrl-D or /quit leaves.
  /again              tell the last story once more, with other random numbers
  /more               go on with the last story
  /history            what was told so far          /save FILE   write it to a file
  /settings           how stories are told          /NAME VALUE  change it, such as /temperature 0.7 or /top-k off
  /seed N             the same seed tells the same story, until /seed off
  /help               this text"""

_MOST_SEED = 2**62
_OFF: dict[str, float] = {
    "top-k": 0,
    "top-p": 1.0,
    "min-p": 0.0,
    "repetition-penalty": 1.0,
    "presence-penalty": 0.0,
    "frequency-penalty": 0.0,
}
"""Settings that can be off, with the value that says so."""


class Session:
    """Reads beginnings and commands from standard input and tells stories on standard output.

    Attributes:
        history: the stories so far, each with its beginning.
    """

    def __init__(self, generator: TextGenerator, request: GenerationConfig, seed: int | None) -> None:
        self._generator = generator
        self._request = request
        self._seed = seed
        self._prompt = ""
        self.history: list[str] = []
        self._commands: dict[str, Callable[[str], None]] = {
            "again": self._again,
            "more": self._more,
            "history": self._show_history,
            "save": self._save,
            "settings": self._show_settings,
            "help": lambda _: print_message(_HELP),
            "quit": self._leave,
            "exit": self._leave,
            **{name: self._setter(name) for name in self._settings()},
        }

    def run(self, prompts: Sequence[str] = ()) -> None:
        """Tell the stories of ``prompts``, then those of the lines that are typed, until the input ends."""
        if isinstance(sys.stdin, io.TextIOWrapper):  # a key that is not UTF-8 is no reason to leave
            sys.stdin.reconfigure(encoding="utf-8", errors="replace")
        if sys.stdin.isatty():
            import readline  # noqa: F401 (gives input() its editing keys and its memory)
        print_message(_HELP)
        for prompt in prompts:
            self.handle(prompt)
        while True:
            try:
                self.handle(input("> " if sys.stdin.isatty() else ""))
            except EOFError:
                return
            except KeyboardInterrupt:  # at the prompt, or twice in a story
                print_message("\n(/quit or Ctrl-D leaves)")

    def handle(self, line: str) -> None:
        """Do what a line says: a command, or the beginning of a story. A mistake costs one line on standard error.

        Raises:
            EOFError: it asks to leave.
        """
        if line.strip() in ("quit", "exit"):  # rather than the beginning of a story
            self._leave("")
        try:
            if not line.startswith("/"):
                self._tell(line if line.strip() else "")
                return
            name, _, argument = line[1:].strip().partition(" ")
            name = name.replace("_", "-")
            if name not in self._commands:
                close = get_close_matches(name, self._commands, n=1)
                raise UserError(f"/{name} is no command; " + (f"did you mean /{close[0]}?" if close else "see /help"))
            self._commands[name](argument.strip())
        except UserError as error:
            print_error(error)

    # --- stories -----------------------------------------------------------------------------------------------------

    def _tell(self, prompt: str) -> None:
        """Tell a story as it is made; Ctrl-C ends it, and what was told is kept."""
        seed = randrange(2**31) if self._seed is None else self._seed
        tell_dropped(self._generator, prompt, self._request)
        pieces = self._generator.stream(prompt, self._request, seed=seed)
        self._prompt = prompt
        story = prompt
        try:
            print_result(prompt, end="")
            for piece in pieces:
                print_result(piece, end="")
                story += piece
        except KeyboardInterrupt:
            print_message(" (stopped)", end="")
        print_result()
        self.history.append(story)

    def _leave(self, _: str) -> None:
        raise EOFError

    def _again(self, _: str) -> None:
        self._need_a_story()
        self._tell(self._prompt)

    def _more(self, _: str) -> None:
        self._need_a_story()
        self._tell(self.history[-1])

    def _need_a_story(self) -> None:
        if not self.history:
            raise UserError("there is no story yet: type a beginning")

    def _show_history(self, _: str) -> None:
        self._need_a_story()
        for number, story in enumerate(self.history, start=1):
            print_result(f"--- {number}\n{story}")

    def _save(self, name: str) -> None:
        self._need_a_story()
        if not name:
            raise UserError("/save needs the name of a file, such as /save stories.txt")
        if os.path.lexists(name):  # a link that leads nowhere is somebody's file, too
            raise UserError(f"{name}: is there already; choose another name")
        write_text(Path(name), "".join(f"{story}\n<|endoftext|>\n" for story in self.history))
        stories = f"{len(self.history)} stories" if len(self.history) > 1 else "1 story"
        print_message(f"{name}: {stories}")

    # --- settings ----------------------------------------------------------------------------------------------------

    def _settings(self) -> dict[str, Any]:
        """Return what can be changed, by the name of its command."""
        names = ["max_new_tokens", "min_new_tokens", "stop", *(field.name for field in fields(SamplingParams))]
        return {**{name.replace("_", "-"): getattr(self._request, name) for name in names}, "seed": self._seed}

    def _show_settings(self, _: str) -> None:
        for name in self._settings():
            self._show_setting(name)

    def _show_setting(self, name: str) -> None:
        value = self._settings()[name]
        if name == "stop":
            value = " ".join(json.dumps(stop, ensure_ascii=False) for stop in value)
        is_off = value is None or value == "" or (name in _OFF and value == _OFF[name])
        print_message(f"/{name} {'off' if is_off else value}")

    def _setter(self, name: str) -> Callable[[str], None]:
        """Return the command that changes a setting, or tells it where no value is given."""

        def change(value: str) -> None:
            if value:
                self._set(name, value)
            self._show_setting(name)

        return change

    def _set(self, name: str, value: str) -> None:
        key = name.replace("-", "_")
        if name == "seed":
            seed = None if value == "off" else _number(value, int, name)
            if seed is not None and not 0 <= seed <= _MOST_SEED:
                raise UserError(f"seed must be between 0 and {_MOST_SEED:,} (it is {seed})")
            self._seed = seed
        elif name == "stop":
            stops = () if value == "off" else (value.replace("\\n", "\n"),)
            self._request = replace(self._request, stop=stops)
        elif name in ("max-new-tokens", "min-new-tokens"):
            self._request = replace(self._request, **{key: _number(value, int, name)})
        else:
            value = str(_OFF[name]) if value == "off" and name in _OFF else value
            parsed = _number(value, int if name == "top-k" else float, name)
            self._request = replace(self._request, **{key: parsed})


def _number(value: str, kind: type[int] | type[float], name: str) -> Any:
    try:
        return kind(value)
    except ValueError:
        kinds = {int: "a whole number", float: "a number"}
        raise UserError(f"/{name} needs {kinds[kind]}, such as /{name} {kind(1)} (it got {value!r})") from None
