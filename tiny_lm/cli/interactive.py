"""``tiny-lm generate RUN --interactive``: type a beginning, get a story, change how it is told."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from random import randrange
from typing import Any

from tiny_lm.cli.generate import tell_dropped
from tiny_lm.config import nearest
from tiny_lm.errors import UserError
from tiny_lm.files import write_text
from tiny_lm.inference import Request, Sampling, TextGenerator

_HELP = """\
Type the beginning of a story and press Enter. Ctrl-C stops the story; Ctrl-D or /quit leaves.
  /again              tell the last story once more, with other random numbers
  /more               go on with the last story
  /history            what was told so far          /save FILE   write it to a file
  /settings           how stories are told          /NAME VALUE  change it, such as /temperature 0.7
  /seed N | /seed off the same seed tells the same story
  /help               this text"""


class Session:
    """Reads beginnings and commands from standard input and tells stories on standard output.

    Attributes:
        history: the stories so far, each with its beginning.
    """

    def __init__(self, generator: TextGenerator, request: Request, seed: int | None) -> None:
        self._generator = generator
        self._request = request
        self._seed = seed
        self._prompt: str | None = None
        self.history: list[str] = []
        self._commands: dict[str, Callable[[str], None]] = {
            "again": self._again,
            "more": self._more,
            "history": self._show_history,
            "save": self._save,
            "settings": self._show_settings,
            "help": lambda _: print(_HELP, file=sys.stderr),
            "seed": self._set_seed,
            **{name: self._setter(name) for name in self._settings()},
        }

    def run(self, prompts: Sequence[str] = ()) -> None:
        """Tell the stories of ``prompts``, then those of the lines that are typed, until the input ends."""
        if sys.stdin.isatty():
            import readline  # noqa: F401 (gives input() its editing keys and its memory)
        print(_HELP, file=sys.stderr)
        for prompt in prompts:
            self.handle(prompt)
        while True:
            try:
                line = input("> " if sys.stdin.isatty() else "")
                if line.strip() in ("/quit", "/exit"):
                    return
                self.handle(line)
            except EOFError:
                return
            except KeyboardInterrupt:  # at the prompt, or twice in a story
                print("\n(/quit or Ctrl-D leaves)", file=sys.stderr)

    def handle(self, line: str) -> None:
        """Do what a line says: a command, or the beginning of a story. A mistake costs one line on standard error."""
        try:
            if not line.startswith("/"):
                self._tell(line)
                return
            name, _, argument = line[1:].strip().partition(" ")
            name = name.replace("_", "-")
            if name not in self._commands:
                raise UserError(f"/{name} is no command{nearest(name, self._commands)}; /help lists them")
            self._commands[name](argument.strip())
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)

    # --- stories -----------------------------------------------------------------------------------------------------

    def _tell(self, prompt: str) -> None:
        """Tell a story as it is made; Ctrl-C ends it, and what was told is kept."""
        seed = randrange(2**31) if self._seed is None else self._seed
        tell_dropped(self._generator, prompt, self._request)
        pieces = self._generator.stream(prompt, self._request, seed=seed)
        self._prompt = prompt
        story = prompt
        sys.stdout.write(prompt)
        try:
            for piece in pieces:
                sys.stdout.write(piece)
                sys.stdout.flush()
                story += piece
        except KeyboardInterrupt:
            print(" (stopped)", file=sys.stderr, end="")
        sys.stdout.write("\n")
        sys.stdout.flush()
        self.history.append(story)

    def _again(self, _: str) -> None:
        if self._prompt is None:
            raise UserError("there is no story yet: type a beginning")
        self._tell(self._prompt)

    def _more(self, _: str) -> None:
        if not self.history:
            raise UserError("there is no story yet: type a beginning")
        self._tell(self.history[-1])

    def _show_history(self, _: str) -> None:
        for number, story in enumerate(self.history, start=1):
            print(f"--- {number}\n{story}")

    def _save(self, name: str) -> None:
        if not name:
            raise UserError("/save needs the name of a file, such as /save stories.txt")
        if Path(name).exists():
            raise UserError(f"{name}: is there already; choose another name")
        write_text(Path(name), "".join(f"{story}\n<|endoftext|>\n" for story in self.history))
        print(f"{name}: {len(self.history)} stories", file=sys.stderr)

    # --- settings ----------------------------------------------------------------------------------------------------

    def _settings(self) -> dict[str, Any]:
        """Return what can be changed, by the name of its command."""
        request = {name: getattr(self._request, name) for name in ("max_new_tokens", "min_new_tokens", "stop")}
        sampling = {field.name: getattr(self._request.sampling, field.name) for field in fields(Sampling)}
        return {name.replace("_", "-"): value for name, value in {**request, **sampling}.items()}

    def _show_settings(self, _: str) -> None:
        for name, value in {**self._settings(), "seed": self._seed}.items():
            print(f"/{name} {'off' if value is None or value == () else value}", file=sys.stderr)

    def _set_seed(self, value: str) -> None:
        self._seed = None if value == "off" else _number(value, int, "seed")

    def _setter(self, name: str) -> Callable[[str], None]:
        def change(value: str) -> None:
            key = name.replace("-", "_")
            if key == "stop":
                stops = () if value in ("", "off") else (value.replace("\\n", "\n"),)
                self._request = replace(self._request, stop=stops)
            elif key in ("max_new_tokens", "min_new_tokens"):
                self._request = replace(self._request, **{key: _number(value, int, name)})
            else:
                parsed = _number(value, int if key == "top_k" else float, name)
                self._request = replace(self._request, sampling=replace(self._request.sampling, **{key: parsed}))

        return change


def _number(value: str, kind: type[int] | type[float], name: str) -> Any:
    try:
        return kind(value)
    except ValueError:
        kinds = {int: "a whole number", float: "a number"}
        raise UserError(f"/{name} needs {kinds[kind]}, such as /{name} {kind(1)} (it got {value!r})") from None
