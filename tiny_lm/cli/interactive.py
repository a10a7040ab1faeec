"""``tiny-lm generate RUN --interactive``: type a prompt, get a story, change the sampling parameters."""

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

from tiny_lm.cli.options import warn_if_truncated
from tiny_lm.console import print_error, print_message, print_result
from tiny_lm.errors import UserError
from tiny_lm.files import write_text
from tiny_lm.inference import GenerationConfig, SamplingParams, TextGenerator

_HELP = """\
Type the start of a story and press Enter; an empty line lets the model start.
Ctrl-C stops the story; Ctrl-D or /quit leaves.
  /again              generate the last story again, with another seed
  /more               continue the last story
  /history            show all stories              /save FILE   write them to a file
  /settings           show all settings             /NAME VALUE  change one, such as /temperature 0.7 or /top-k off
  /seed N             same seed, same story, until /seed off
  /help               this text"""

_MAX_SEED = 2**62
_OFF_VALUES: dict[str, float] = {
    "top-k": 0,
    "top-p": 1.0,
    "min-p": 0.0,
    "repetition-penalty": 1.0,
    "presence-penalty": 0.0,
    "frequency-penalty": 0.0,
}
"""Settings that can be switched off, with the value that does so."""


class Session:
    """Reads prompts and commands from standard input and prints stories to standard output.

    Attributes:
        history: the stories so far, each with its prompt.
    """

    def __init__(self, generator: TextGenerator, config: GenerationConfig, seed: int | None) -> None:
        self._generator = generator
        self._config = config
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
        """Generate stories for ``prompts``, then for the lines of the input until it ends."""
        if isinstance(sys.stdin, io.TextIOWrapper):  # a key that is not UTF-8 must not end the session
            sys.stdin.reconfigure(encoding="utf-8", errors="replace")
        if sys.stdin.isatty():
            import readline  # noqa: F401 (gives input() editing keys and history)
        print_message(_HELP)
        for prompt in prompts:
            self.handle(prompt)
        while True:
            try:
                self.handle(input("> " if sys.stdin.isatty() else ""))
            except EOFError:
                return
            except KeyboardInterrupt:  # at the prompt, or twice during a story
                print_message("\n(/quit or Ctrl-D leaves)")

    def handle(self, line: str) -> None:
        """Run a command, or generate a story for a prompt. A mistake prints one line to standard error.

        Raises:
            EOFError: the command is to leave.
        """
        if line.strip() in ("quit", "exit"):  # rather than a prompt
            self._leave("")
        try:
            if not line.startswith("/"):
                self._generate(line if line.strip() else "")
                return
            name, _, argument = line[1:].strip().partition(" ")
            name = name.replace("_", "-")
            if name not in self._commands:
                close = get_close_matches(name, self._commands, n=1)
                raise UserError(
                    f"/{name} is not a command; " + (f"did you mean /{close[0]}?" if close else "see /help")
                )
            self._commands[name](argument.strip())
        except UserError as error:
            print_error(error)

    # --- stories -----------------------------------------------------------------------------------------------------

    def _generate(self, prompt: str) -> None:
        """Print a story while it is generated; Ctrl-C ends it and keeps the text so far."""
        seed = randrange(2**31) if self._seed is None else self._seed
        warn_if_truncated(self._generator, prompt, self._config)
        chunks = self._generator.stream(prompt, self._config, seed=seed)
        self._prompt = prompt
        story = prompt
        try:
            print_result(prompt, end="")
            for chunk in chunks:
                print_result(chunk, end="")
                story += chunk
        except KeyboardInterrupt:
            print_message(" (stopped)", end="")
        print_result()
        self.history.append(story)

    def _leave(self, _: str) -> None:
        raise EOFError

    def _again(self, _: str) -> None:
        self._require_story()
        self._generate(self._prompt)

    def _more(self, _: str) -> None:
        self._require_story()
        self._generate(self.history[-1])

    def _require_story(self) -> None:
        if not self.history:
            raise UserError("no story yet: type a prompt")

    def _show_history(self, _: str) -> None:
        self._require_story()
        for number, story in enumerate(self.history, start=1):
            print_result(f"--- {number}\n{story}")

    def _save(self, name: str) -> None:
        self._require_story()
        if not name:
            raise UserError("/save needs a file name, such as /save stories.txt")
        if os.path.lexists(name):  # even a dangling link belongs to the user
            raise UserError(f"{name}: exists already; choose another name")
        write_text(Path(name), "".join(f"{story}\n<|endoftext|>\n" for story in self.history))
        stories = f"{len(self.history)} stories" if len(self.history) > 1 else "1 story"
        print_message(f"{name}: {stories}")

    # --- settings ----------------------------------------------------------------------------------------------------

    def _settings(self) -> dict[str, Any]:
        """Return the settings, by the name of their commands."""
        names = ["max_new_tokens", "min_new_tokens", "stop", *(field.name for field in fields(SamplingParams))]
        return {**{name.replace("_", "-"): getattr(self._config, name) for name in names}, "seed": self._seed}

    def _show_settings(self, _: str) -> None:
        for name in self._settings():
            self._show_setting(name)

    def _show_setting(self, name: str) -> None:
        value = self._settings()[name]
        if name == "stop":
            value = " ".join(json.dumps(stop, ensure_ascii=False) for stop in value)
        is_off = value is None or value == "" or (name in _OFF_VALUES and value == _OFF_VALUES[name])
        print_message(f"/{name} {'off' if is_off else value}")

    def _setter(self, name: str) -> Callable[[str], None]:
        """Return the command that shows a setting, and changes it if a value is given."""

        def change(value: str) -> None:
            if value:
                self._set(name, value)
            self._show_setting(name)

        return change

    def _set(self, name: str, value: str) -> None:
        key = name.replace("-", "_")
        if name == "seed":
            seed = None if value == "off" else _number(value, int, name)
            if seed is not None and not 0 <= seed <= _MAX_SEED:
                raise UserError(f"seed must be between 0 and {_MAX_SEED:,} (it is {seed})")
            self._seed = seed
        elif name == "stop":
            stops = () if value == "off" else (value.replace("\\n", "\n"),)
            self._config = replace(self._config, stop=stops)
        elif name in ("max-new-tokens", "min-new-tokens"):
            self._config = replace(self._config, **{key: _number(value, int, name)})
        else:
            value = str(_OFF_VALUES[name]) if value == "off" and name in _OFF_VALUES else value
            parsed = _number(value, int if name == "top-k" else float, name)
            self._config = replace(self._config, **{key: parsed})


def _number(value: str, kind: type[int] | type[float], name: str) -> Any:
    try:
        return kind(value)
    except ValueError:
        names = {int: "a whole number", float: "a number"}
        raise UserError(f"/{name} needs {names[kind]}, such as /{name} {kind(1)} (it got {value!r})") from None
