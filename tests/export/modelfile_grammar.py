"""A reader of Modelfiles, made from the grammar of Ollama's own parser (its ``parser/parser.go``, Ollama 0.33)."""

COMMANDS = ("from", "license", "template", "system", "adapter", "draft", "renderer", "parser", "parameter", "message")
INTEGERS = ("num_ctx", "num_predict", "top_k", "seed", "num_keep", "repeat_last_n", "num_batch")
FLOATS = ("temperature", "top_p", "min_p", "repeat_penalty", "presence_penalty", "frequency_penalty")


class GrammarError(Exception):
    """What Ollama would refuse."""


def read_modelfile(text: str) -> list[tuple[str, str]]:
    """Return (command, value) in order; a parameter is a command of its own name.

    Raises:
        GrammarError: Ollama would refuse the file.
    """
    commands: list[tuple[str, str]] = []
    place = 0
    while place < len(text):
        if text[place] in " \t\r\n":
            place += 1
        elif text[place] == "#":
            while place < len(text) and text[place] not in "\r\n":
                place += 1
        else:
            name, place = _word(text, place, lambda c: c.isascii() and c.isalpha())
            if name.lower() not in (*COMMANDS, "requires"):
                raise GrammarError(f"{name} is no command")
            name = name.lower()
            if name == "parameter":
                name, place = _word(text, place, lambda c: c.isascii() and (c.isalnum() or c == "_"))
            value, place = _value(text, place)
            commands.append((name, value))
    if "from" not in dict(commands):
        raise GrammarError("no FROM line")
    return commands


def _word(text, place, belongs):
    end = place
    while end < len(text) and belongs(text[end]):
        end += 1
    if end == place or end == len(text) or text[end] not in " \t":
        raise GrammarError(f"a word and a blank should stand at {text[place : place + 20]!r}")
    return text[place:end], end + 1


def _value(text: str, place: int) -> tuple[str, int]:
    """Read to the first line break at which what was read is no open quotation."""
    read = ""
    while place < len(text):
        character = text[place]
        place += 1
        if character in "\r\n" and _unquote(read.strip()) is not None:
            break
        if character.isprintable() or character in "\t\r\n":
            read += character
    value = _unquote(read.strip())
    if value is None:
        raise GrammarError("a quotation has no end")
    return value, place


def _unquote(text: str) -> str | None:
    for marks in ('"""', '"'):
        if text.startswith(marks):
            return text[len(marks) : -len(marks)] if len(text) >= 2 * len(marks) and text.endswith(marks) else None
    return text


def parameters(commands: list[tuple[str, str]]) -> dict[str, object]:
    """Return the parameters with the types that Ollama gives them; ``stop`` is a list.

    Raises:
        GrammarError: Ollama knows no such parameter.
    """
    found: dict[str, object] = {}
    for name, value in commands:
        if name in INTEGERS:
            found[name] = int(value)
        elif name in FLOATS:
            found[name] = float(value)
        elif name == "stop":
            found["stop"] = [*found.get("stop", []), value]  # type: ignore[misc]  # a list, as the line before made it
        elif name not in COMMANDS:
            raise GrammarError(f"{name} is no parameter")
    return found
