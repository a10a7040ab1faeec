"""Output: streams that survive a closed reader, and text that is safe on a terminal.

* :func:`guard_streams` is called once, by the command line. After that a failed write (a closed pipe or terminal, a
  full disk, a closed descriptor) does not raise, so ``print`` never interrupts work.
* :func:`print_result` is for the result of a command: there, a failed write ends the command.
* :func:`print_message` and :func:`print_error` write single lines to standard error; :func:`make_console` builds the
  rich consoles, which print strings literally.
* :func:`visible` makes control characters visible; :func:`shell_command` quotes commands.
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
"""Exit code if nobody reads the result: as a shell reports for a program killed by SIGPIPE."""

# --- text that is safe to print --------------------------------------------------------------------------------------

_INVISIBLE = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
    "\U000e0000-\U000e007f]"
)
_UNDECODABLE = re.compile("[\udc80-\udcff]")  # bytes of a file name that are not UTF-8
_PROGRESS_BAR = r"\r|\t|\x1b\[(?:\?25[hl]|\d*[AK]|[\d;]*m)"
"""Escape sequences of the progress bars of rich and tqdm; they affect only their own lines."""
_UNSAFE = re.compile(f"({_PROGRESS_BAR})|{_INVISIBLE.pattern}")


def visible(text: object) -> str:
    r"""Return ``text`` with control and bidi characters visible, as ``\u202e``; newlines stay.

    A JSON document keeps its meaning: such characters occur only inside its strings.
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
    """Return ``text`` as one line that is safe to print."""
    text = _UNDECODABLE.sub(lambda half: f"\\x{ord(half[0]) - 0xDC00:02x}", str(text))
    return visible(" ".join(text.replace("\r\n", "\n").split("\n")).strip())


def shell_command(*words: object) -> str:
    """Return a command, quoted for a shell.

    Paths that start with a dash become ``./-name``, and control characters are quoted as ``$'...'``.
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


# --- streams that survive a closed reader ----------------------------------------------------------------------------


class GuardedFile(io.RawIOBase):
    """Writes to a file and ignores failures.

    Attributes:
        error: of the first failed write, if any.
        is_terminal: whether it was a terminal at the start: a closed one no longer reports it.
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
        """Return the descriptor, which child processes inherit."""
        return self._file.fileno()

    def write(self, data: Any) -> int:
        """Write as much of ``data`` as possible; return its full size in any case."""
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
        except ValueError:  # the file was closed
            self.error = self.error or OSError(errno.EBADF, os.strerror(errno.EBADF))
        return size


class TerminalText(io.TextIOWrapper):
    """A text stream that makes control characters visible on a terminal, and writes text unchanged elsewhere.

    Other libraries show progress bars on standard error, so there the escape sequences of bars are passed through.
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
    """Encode surrogates: names that are not UTF-8 get their bytes back, other lone surrogates become U+FFFD."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    coded = (bytes([ord(c) - 0xDC00]) if 0xDC80 <= ord(c) <= 0xDCFF else "\ufffd".encode() for c in text)
    return b"".join(coded), error.end


def guard_streams() -> None:
    """Make standard output and error survive closed readers, and Ctrl-C exit without a traceback.

    Closed descriptors 0 to 2 are opened on the null device; otherwise the next opened file would get their number and
    everything printed.
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
    if stream is None:  # closed when Python started
        raw: Any = Path(os.devnull).open("wb", buffering=0)  # noqa: SIM115
    else:
        binary = getattr(stream, "buffer", None)
        raw = getattr(binary, "raw", binary)
        if isinstance(raw, GuardedFile) or not isinstance(raw, io.RawIOBase):
            return stream  # already guarded, or not a real file (tests, notebooks)
        with suppress(OSError, ValueError):
            stream.flush()
    file: Any = GuardedFile(raw)
    # Standard error is unbuffered: signal handlers print, and a buffer is not reentrant.
    return TerminalText(file if with_progress_bars else io.BufferedWriter(file), with_progress_bars=with_progress_bars)


# --- printing --------------------------------------------------------------------------------------------------------


def print_result(*values: object, end: str = "\n") -> None:
    """Print the result of a command to standard output and flush.

    Raises:
        SystemExit: the reader is gone; without a message, as with other programs in a pipe.
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
    """Print a message to standard error: a warning, progress, the next command."""
    print(visible(text), end=end, file=sys.stderr, flush=True)


def print_error(error: object) -> None:
    """Print an error as one line to standard error."""
    print_message(f"error: {one_line(error)}")


def make_console(*, stderr: bool = True, **options: Any) -> "Console":
    """Return a rich console that prints strings literally, also in table cells; use Text for styles.

    Without ``stderr`` it prints to standard output; ``options`` are those of ``rich.console.Console``.
    """
    return _console_class()(stderr=stderr, **{"soft_wrap": True, **options})


@cache
def _console_class() -> "Callable[..., Console]":
    from rich.console import Console

    class LiteralConsole(Console):
        """Ignores markup, emoji codes and highlights in strings, which may be paths or generated text."""

        def render_str(self, text: str, **options: Any) -> "Text":
            options.update(markup=False, emoji=False, highlight=False)
            return super().render_str(visible(text), **options)

    return LiteralConsole


def styled(text: object, style: str) -> "Text":
    """Return ``text`` in a rich style, such as bold."""
    from rich.text import Text

    return Text(visible(text), style=style)


# --- Ctrl-C ----------------------------------------------------------------------------------------------------------


def _silence_interrupts() -> None:
    """Exit on Ctrl-C without a traceback, also on a second one while the first is handled."""
    if sys.excepthook is sys.__excepthook__:
        sys.excepthook = _report_uncaught
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = _report_unraisable


def _report_uncaught(kind: type[BaseException], error: BaseException, traceback: Any) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, traceback)


def _report_unraisable(unraisable: Any) -> None:
    """Report an error in a finalizer or at exit."""
    if not issubclass(unraisable.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)
