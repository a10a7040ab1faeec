"""Mutants of a file, each from a number: the same number gives the same mutant on every machine."""

import json
import random
import re
from collections.abc import Callable
from typing import Any

Mutation = Callable[[random.Random, bytes], bytes]

_BYTES = [b"", b"\0", b"\n", b"\r", b"\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\x1b[2J", b"\x85"]
_VALUES = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**63), 10**400, 0.5, -0.0, 1e-320, 1.7e308, "", "0", "1e3",
    "null", "\0", "\n", "\x1b[31m", "\u2028", "\ud800", "[b]", "é" * 50, "x" * 5000, [], {}, [[]], [None], {"": None},
    [1, "1"], {"a": {"a": {}}}, "../../etc/passwd", "/", "%s{0}",
]  # fmt: skip
_LITERALS = ["NaN", "Infinity", "-Infinity", "1e400", "-1e400", "9" * 5000, "[" * 3000, '{"a":' * 3000, "-", "0x10"]
_YAML = [
    "null", "~", "1e400", ".inf", ".nan", "yes", "0o17", "1_000", "12:30:45", "2001-01-01", "2001-99-99", "!!binary AA",
    "!!set {a}", "!!python/name:x", "&a [*a]", "? x", "- ", "{", "[" * 500, "'", "\t", "---\na: 1", "<<: {a: 1}",
    "9" * 5000, "0b1", "!!timestamp x", "!!int x", "!!float x", "-.inf", "!!omap [a]", "|", ">", "% YAML", "\x07",
]  # fmt: skip


def mutate(data: bytes, rng: random.Random, kind: str) -> bytes:
    """Return ``data`` with one to four changes; ``kind`` is ``json``, ``yaml`` or ``binary``."""
    structured = {"json": [_swap_json_value, _write_json_literal], "yaml": [_swap_yaml_value, _move_lines]}
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        choices: list[Mutation] = [_flip, _cut, _splice, _insert, _write_length]
        if kind in structured and rng.random() < 0.75:
            choices = structured[kind]
        data = rng.choice(choices)(rng, data)
    return data


# --- bytes -----------------------------------------------------------------------------------------------------------


def _flip(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 16]) if data else 0):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _cut(rng: random.Random, data: bytes) -> bytes:
    start = rng.randrange(len(data) + 1)
    return data[:start] if rng.random() < 0.5 else data[:start] + data[start + rng.randrange(1, 64) :]


def _splice(rng: random.Random, data: bytes) -> bytes:
    """Write a part of the data somewhere else in it, sometimes many times."""
    start, place = rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)
    part = data[start : start + rng.randrange(1, 256)]
    return data[:place] + part * rng.choice([1, 1, 2, 100]) + data[place + rng.choice([0, len(part)]) :]


def _insert(rng: random.Random, data: bytes) -> bytes:
    place = rng.randrange(len(data) + 1)
    return data[:place] + rng.choice([*_BYTES, rng.randbytes(8)]) + data[place:]


def _write_length(rng: random.Random, data: bytes) -> bytes:
    """Write a number over what may be a length: little-endian, big-endian, or a varint; often near the start."""
    place = rng.randrange(min(len(data), 64) + 1) if rng.random() < 0.5 else rng.randrange(len(data) + 1)
    size = rng.choice([1, 2, 4, 8])
    value = rng.choice(
        [0, 1, 2 ** (8 * size) - 1, 2 ** (8 * size - 1), rng.randrange(2 ** (8 * size)), len(data) % 256]
    )
    number = rng.choice([value.to_bytes(size, "little"), value.to_bytes(size, "big"), b"\xff" * 4 + b"\x0f"])
    return data[:place] + number + data[place + len(number) :]


# --- JSON ------------------------------------------------------------------------------------------------------------


def _swap_json_value(rng: random.Random, data: bytes) -> bytes:
    """Put another value, key or copy into a JSON text, or into one line of JSON lines."""
    lines = data.split(b"\n")
    number = rng.randrange(len(lines)) if len(lines) > 1 else 0
    for whole, text in ((True, data), (False, lines[number])):
        try:
            content = json.loads(text)
        except (ValueError, RecursionError):
            continue
        changed = json.dumps(_change(rng, content), ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
        return changed if whole else b"\n".join([*lines[:number], changed, *lines[number + 1 :]])
    return _flip(rng, data)


def _change(rng: random.Random, content: Any) -> Any:
    """Return ``content`` with one of its values, at whatever depth, replaced, removed, repeated or renamed."""
    if isinstance(content, (dict, list)) and content and rng.random() < 0.85:
        places = list(content) if isinstance(content, dict) else range(len(content))
        place = rng.choice(places)
        changed: Any = content.copy()
        action = rng.random()
        if action < 0.75:
            changed[place] = _change(rng, content[place])
        elif action < 0.85:
            del changed[place]
        elif isinstance(changed, dict):
            changed[rng.choice(["", "x", "__class__", "\ud800", str(place) + " "])] = changed.pop(place)
        else:
            changed.insert(place, rng.choice(content))
        return changed
    if isinstance(content, (int, float)) and not isinstance(content, bool) and rng.random() < 0.3:
        return rng.choice(
            [
                -content,
                content + 1,
                content * 10**9,
                content * 0.5 if abs(content) < 1e300 else 0.5,
                str(content),
                [content],
            ]
        )
    return rng.choice(_VALUES)


def _write_json_literal(rng: random.Random, data: bytes) -> bytes:
    """Write over a number or word of the text what a JSON library would not write, or name a key twice."""
    if rng.random() < 0.2:
        pairs = list(re.finditer(rb'"(?:[^"\\]|\\.){0,60}":', data))
        if pairs:
            pair = rng.choice(pairs)
            return data[: pair.start()] + pair[0] + b"null, " + data[pair.start() :]
    values = list(re.finditer(rb'(?<=[:\[,])\s*("[^"]{0,40}"|-?[\d.eE+-]+|true|false|null)', data))
    if not values:
        return _insert(rng, data)
    value = rng.choice(values)
    return data[: value.start()] + b" " + rng.choice(_LITERALS).encode() + data[value.end() :]


# --- YAML ------------------------------------------------------------------------------------------------------------


def _swap_yaml_value(rng: random.Random, data: bytes) -> bytes:
    lines = data.decode("utf-8", "replace").split("\n")
    number = rng.randrange(len(lines))
    key, colon, value = lines[number].partition(": ")
    swapped = rng.choice([*_YAML, json.dumps(rng.choice(_VALUES)), f"-{value}", f"[{value}]", f"{{{value}: 1}}"])
    lines[number] = f"{key}: {swapped}" if colon and rng.random() < 0.8 else swapped
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def _move_lines(rng: random.Random, data: bytes) -> bytes:
    """Repeat, remove, indent or rename a line."""
    lines = data.split(b"\n")
    number = rng.randrange(len(lines))
    line = lines[number]
    copies = [[line, line], [], [b"  " + line], [b"\t" + line], [line.replace(b":", b"", 1)], [b"x" + line]]
    return b"\n".join([*lines[:number], *rng.choice(copies), *lines[number + 1 :]])
