"""Everything that is printed goes through here: streams that survive a lost reader, and text that is safe to show.

* :func:`guard_streams` is called once, by the command line. From then on a failed write (a closed pipe or terminal, a
  full disk, a descriptor that was closed from the start) raises nowhere, so ``print`` never ends or changes work.
* :func:`print_result` is for text that is the point of a command: there, a failed write ends the command.
* :func:`print_message` and :func:`print_error` write single lines to standard error; :func:`make_console` builds the
  consoles of rich, which take every string literally.
* :func:`visible` shows control characters instead of sending them to a terminal; :func:`shell_command` quotes commands.
"""

import codecs
import errno
import io
import os
import re
import select
import shlex
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiny_lm.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

READER_GONE = 128 + 13
"""Exit code of a command whose result nobody reads: what a shell reports for a program that SIGPIPE killed."""

# --- text that is safe to show ---------------------------------------------------------------------------------------

_INVISIBLE = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
    "\U000e0000-\U000e007f]"
)
_UNDECODABLE = re.compile("[\udc80-\udcff]")  # bytes of a file name that are not UTF-8
_PROGRESS_BAR = r"\r|\t|\x1b\[(?:\?25[hl]|\d*[AK]|[\d;]*m)"
"""What progress bars of rich and tqdm send to a terminal; none of it writes anywhere but to its own lines."""
_UNSAFE = re.compile(f"({_PROGRESS_BAR})|{_INVISIBLE.pattern}")


def visible(text: object) -> str:
    r"""Return ``text`` with control characters, marks of direction and the like shown, as ``\u202e``; line ends stay.

    In a JSON document the result is the same document: such characters stand inside its strings only.
    """
    return _INVISIBLE.sub(_escape, str(text))


def _escape(match: "re.Match[str]") -> str:
    code = ord(match[0])
    if code < 0x20:
        return chr(0x2400 + code)  # Unicode has pictures of the old control codes
    if code > 0xFFFF:  # as JSON writes it
        return f"\\u{0xD7C0 + (code >> 10):04x}\\u{0xDC00 + (code & 0x3FF):04x}"
    return f"\\u{code:04x}"


def one_line(text: object) -> str:
    """Return ``text`` as one line that is safe to print, whatever the names and foreign messages in it hold."""
    text = _UNDECODABLE.sub(lambda half: f"\\x{ord(half[0]) - 0xDC00:02x}", str(text))
    return visible(" ".join(text.replace("\r\n", "\n").split("\n")).strip())


def shell_command(*words: object) -> str:
    """Return a command as a user can paste it into a shell.

    Paths that begin with a dash are given as ``./-name``, and control characters as a shell's ``$'...'``.
    """
    return " ".join(map(_quote, words))


def _quote(word: object) -> str:
    text = f"./{word}" if isinstance(word, Path) and str(word).startswith("-") else str(word)
    if "\n" not in text and visible(text) == text:
        return shlex.quote(text)
    coded = "".join(
        character if character.isprintable() and character not in "'\\" else _shell_escape(character)
        for character in text
    )
    return f"$'{coded}'"


def _shell_escape(character: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in character.encode("utf-8", "surrogateescape"))


# --- streams that survive a lost reader ------------------------------------------------------------------------------


class GuardedFile(io.RawIOBase):
    """Writes to a file, and goes on as if all was well when that fails.

    Attributes:
        error: why a write failed first; None if none did.
        is_terminal: whether it was a terminal at first: one that is closed no longer says so.
    """

    def __init__(self, file: io.RawIOBase) -> None:
        self._file = file
        self.is_terminal = self.isatty()
        self.error: OSError | None = None

    def writable(self) -> bool:
        """Return True."""
        return True

    def isatty(self) -> bool:
        """Return whether the file is a terminal."""
        with suppress(OSError, ValueError):
            return self._file.isatty()
        return False

    def fileno(self) -> int:
        """Return the descriptor, which child processes get."""
        return self._file.fileno()

    def write(self, data: Any) -> int:
        """Write all of ``data``, or as much of it as the file takes; return its size in any case."""
        rest = memoryview(data).cast("B")
        size = len(rest)
        try:
            while rest:
                written = self._file.write(rest)
                if written is None:  # another process made the terminal non-blocking
                    select.select([], [self._file], [])
                else:
                    rest = rest[written:]
        except OSError as error:
            self.error = self.error or error
        except ValueError:  # the file was closed under us
            self.error = self.error or OSError(errno.EBADF, os.strerror(errno.EBADF))
        return size


class TerminalText(io.TextIOWrapper):
    """A text stream that shows control characters where it is a terminal, and writes text as it is elsewhere.

    Other libraries draw their progress bars on standard error, so there the few sequences that bars need are let
    through.
    """

    def __init__(self, file: Any, *, with_progress_bars: bool) -> None:
        super().__init__(file, encoding="utf-8", errors="tiny_lm.output", line_buffering=True)
        self._replace = (lambda match: match[1] or _escape(match)) if with_progress_bars else _escape
        self._pattern = _UNSAFE if with_progress_bars else _INVISIBLE
        self._is_terminal = file.isatty()

    def write(self, text: str) -> int:
        """Write ``text``; return its length."""
        super().write(self._pattern.sub(self._replace, text) if self._is_terminal else text)
        return len(text)


def _encode_rest(error: UnicodeError) -> tuple[str | bytes, int]:
    """Encode what UTF-8 cannot: names that are not UTF-8 get their bytes back, other lone surrogates become U+FFFD."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    coded = (bytes([ord(c) - 0xDC00]) if 0xDC80 <= ord(c) <= 0xDCFF else "\ufffd".encode() for c in text)
    return b"".join(coded), error.end


def guard_streams() -> None:
    """Make standard output and standard error survive whatever becomes of their readers, and Ctrl-C end quietly.

    Descriptors 0 to 2 that are closed are opened on the null device, or the next file opened would get their number
    and everything printed would go into it.
    """
    codecs.register_error("tiny_lm.output", _encode_rest)
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(opened, True)
    sys.stdin = sys.stdin or Path(os.devnull).open(encoding="utf-8")  # noqa: SIM115  # open as long as the process
    _silence_interrupts()
    sys.stdout = _guarded(sys.stdout, with_progress_bars=False)
    sys.stderr = _guarded(sys.stderr, with_progress_bars=True)


def _guarded(stream: Any, *, with_progress_bars: bool) -> Any:
    if stream is None:  # it was closed when Python started
        raw: Any = Path(os.devnull).open("wb", buffering=0)  # noqa: SIM115
    else:
        binary = getattr(stream, "buffer", None)
        raw = getattr(binary, "raw", binary)
        if isinstance(raw, GuardedFile) or not isinstance(raw, io.RawIOBase):
            return stream  # guarded already, or not a real file: a test or a notebook reads it
        with suppress(OSError, ValueError):
            stream.flush()
    file: Any = GuardedFile(raw)
    # Standard error has no buffer: signal handlers print, and a buffer cannot be entered twice.
    return TerminalText(file if with_progress_bars else io.BufferedWriter(file), with_progress_bars=with_progress_bars)


# --- printing --------------------------------------------------------------------------------------------------------


def print_result(*values: object, end: str = "\n") -> None:
    """Print what the command was asked for to standard output, at once.

    Raises:
        SystemExit: nobody reads it any more; without a message, as with other programs in a pipe.
        UserError: it could not be written.
    """
    print(*values, end=end, flush=True)
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    if not isinstance(raw, GuardedFile) or raw.error is None:
        return
    error = raw.error
    if error.errno in (errno.EPIPE, errno.ECONNRESET) or raw.is_terminal:
        raise SystemExit(READER_GONE)
    raise UserError(f"standard output: could not be written ({error.strerror or error}); nothing more is printed")


def print_message(text: object, *, end: str = "\n") -> None:
    """Print a message to standard error: a warning, what is being done, the next command."""
    print(visible(text), end=end, file=sys.stderr, flush=True)


def print_error(error: object) -> None:
    """Print what is wrong in one line on standard error."""
    print_message(f"error: {one_line(error)}")


def make_console(*, stderr: bool = True, **options: Any) -> "Console":
    """Return a console of rich that prints every string literally, in table cells too: styles are given by Text.

    Args:
        stderr: whether it prints to standard error; else to standard output.
        options: as of ``rich.console.Console``.
    """
    return _console_class()(stderr=stderr, **{"soft_wrap": True, **options})


@cache
def _console_class() -> "Callable[..., Console]":
    from rich.console import Console

    class LiteralConsole(Console):
        """Reads no markup, emoji codes or highlights into a string: it may be a path or a model's text."""

        def render_str(self, text: str, **options: Any) -> "Text":
            options.update(markup=False, emoji=False, highlight=False)
            return super().render_str(visible(text), **options)

    return LiteralConsole


def styled(text: object, style: str) -> "Text":
    """Return ``text`` in a style of rich, such as bold."""
    from rich.text import Text

    return Text(visible(text), style=style)


# --- Ctrl-C ----------------------------------------------------------------------------------------------------------


def _silence_interrupts() -> None:
    """Let Ctrl-C end the process without a traceback, also a second one while the first is being handled."""
    if sys.excepthook is sys.__excepthook__:
        sys.excepthook = _report_uncaught
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = _report_unraisable


def _report_uncaught(kind: type[BaseException], error: BaseException, traceback: Any) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, traceback)


def _report_unraisable(unraisable: Any) -> None:
    """Report an error in a finalizer or while Python ends."""
    if not issubclass(unraisable.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)
