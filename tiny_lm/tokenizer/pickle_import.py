"""Import a tokenizer pickled by an older program, without executing anything in the file.

A pickle is a program. Only the shape of a pickled ``tiktoken.Encoding`` is accepted: a fixed set of instructions and
one class name, which resolves to a recorder of plain values instead of tiktoken's class.
"""

import io
import pickle
import pickletools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tiny_lm.config import shorten
from tiny_lm.errors import UserError
from tiny_lm.tokenizer.bpe import GPT2_PATTERN, LLAMA3_PATTERN, TWO_DIGIT_PATTERN, BPETokenizer
from tiny_lm.tokenizer.config import STANDARD_SPECIALS

_LIMIT = 2**25  # bytes; a pickled vocabulary of 200,000 tokens has about 5 million
_ADMITTED = "tiktoken.core Encoding"

# What pickle protocols 3 to 5 need for a dict of texts, bytes and integers in one object. No instruction that calls
# (REDUCE, INST, OBJ, NEWOBJ_EX), none that nests (TUPLE, LIST: their hash can take forever), no registry, no buffers.
_INSTRUCTIONS = frozenset(
    [
        *("PROTO", "FRAME", "STOP", "GLOBAL", "STACK_GLOBAL", "EMPTY_TUPLE", "NEWOBJ", "BUILD"),
        *("EMPTY_DICT", "MARK", "SETITEM", "SETITEMS", "MEMOIZE", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET"),
        *("NONE", "BININT", "BININT1", "BININT2", "SHORT_BINUNICODE", "BINUNICODE", "SHORT_BINBYTES", "BINBYTES"),
    ]
)

# Equivalent spellings of the known patterns.
_SAME_PATTERN = {
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+": (
        LLAMA3_PATTERN  # GPT-4's, rustbpe's default
    ),
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+": (
        TWO_DIGIT_PATTERN
    ),
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s": GPT2_PATTERN,
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": GPT2_PATTERN,
    **{pattern: pattern for pattern in BPETokenizer.patterns},
}


def import_pickled_tokenizer(path: Path | str, special_texts: Mapping[str, str] = STANDARD_SPECIALS) -> BPETokenizer:
    """Read an old ``tokenizer.pkl``, a pickled ``tiktoken.Encoding``; save the result to replace the pickle.

    All ids stay as they are. Special tokens beyond ``special_texts`` get a role after their text.

    Args:
        path: the pickle.
        special_texts: text by role (``special_tokens`` of the tokenizer's config).

    Raises:
        UserError: the file is not such a pickle (the error names what it tried to load), its special tokens do not
            follow the base vocabulary, eos (or bos, if it is named) is missing, or its split pattern is unknown.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            data = file.read(_LIMIT + 1)
    except OSError as error:
        raise UserError(f"{path}: could not be read ({error.strerror or error})") from error
    if len(data) > _LIMIT:
        raise UserError(f"{path}: larger than {_LIMIT} bytes, which no pickled tokenizer is")
    try:
        state = _read_state(data)
        base = _base(state.get("mergeable_ranks"))
        pattern = state.get("pat_str")
        if not isinstance(pattern, str) or pattern not in _SAME_PATTERN:
            raise UserError(f"unknown split pattern ({shorten(pattern)})")
        roles = _roles(state.get("special_tokens"), len(base), special_texts)
        return BPETokenizer(base, roles, pattern=_SAME_PATTERN[pattern])
    except UserError as error:
        raise UserError(f"{path}: could not be imported: {error}") from None


# --- reading without running -----------------------------------------------------------------------------------------


class _Recorder:
    """Replaces ``tiktoken.Encoding`` and records what would have become its state."""

    state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    """Admits a single class, in case the scan missed something."""

    def find_class(self, module: str, name: str) -> Any:
        if f"{module} {name}" != _ADMITTED:
            raise UserError(_refusal(f"{module}.{name}"))
        return _Recorder


def _refusal(name: str) -> str:
    return f"it tried to load {shorten(name)}, and only a pickled tiktoken.Encoding is accepted; nothing of it was run"


def _scan(data: bytes) -> None:
    """Check the instructions of a pickle without executing them.

    Raises:
        UserError: an instruction is not needed for a pickled encoding.
        ValueError: the data is not a pickle.
    """
    names = ["?", "?"]  # the last two texts: what STACK_GLOBAL most likely means
    for instruction, argument, _ in pickletools.genops(data):
        name = instruction.name
        if name == "GLOBAL" and argument != _ADMITTED:
            raise UserError(_refusal(str(argument).replace(" ", ".")))
        if name == "STACK_GLOBAL" and " ".join(names) != _ADMITTED:
            raise UserError(_refusal(".".join(names)))
        if name not in _INSTRUCTIONS:
            raise UserError(f"it has the pickle instruction {name}, which no pickled tiktoken.Encoding has")
        # The unpickler allocates memory up to the highest memo index.
        if name == "LONG_BINPUT" and int(argument or 0) > len(data):
            raise UserError("its pickle is damaged")
        if name.endswith("BINUNICODE"):
            names = [names[1], str(argument)]


def _read_state(data: bytes) -> dict[str, Any]:
    """Return the keyword arguments of the encoding in ``data``."""
    try:
        _scan(data)
        encoding = _Unpickler(io.BytesIO(data)).load()
    except UserError:
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise UserError(f"not a pickle, or a damaged one ({type(error).__name__})") from None
    state = encoding.state if isinstance(encoding, _Recorder) else None
    if isinstance(state, str):
        raise UserError(f"it only names tiktoken's encoding {shorten(state)} and has no vocabulary")
    if not isinstance(state, dict):
        raise UserError("it does not contain a tiktoken.Encoding")
    return state


# --- its content -----------------------------------------------------------------------------------------------------


def _base(ranks: object) -> list[bytes]:
    """Return the tokens by rank."""
    if not isinstance(ranks, dict) or not ranks:
        raise UserError("it has no vocabulary")
    if not all(isinstance(token, bytes) and type(rank) is int for token, rank in ranks.items()):
        raise UserError("its vocabulary is not a table of bytes and ranks")
    tokens: list[bytes] = sorted(ranks, key=lambda token: ranks[token])
    if any(ranks[token] != i for i, token in enumerate(tokens)):
        raise UserError(f"its ranks are not 0 to {len(tokens) - 1}, each of them once")
    return tokens


def _roles(specials: object, first: int, known: Mapping[str, str]) -> dict[str, str]:
    """Return the text of each role in the order of the ids, which must follow the base vocabulary."""
    if not isinstance(specials, dict) or not all(
        isinstance(text, str) and type(token_id) is int for text, token_id in specials.items()
    ):
        raise UserError("it has no table of special tokens")
    texts: list[str] = sorted(specials, key=lambda text: specials[text])
    if [specials[text] for text in texts] != list(range(first, first + len(texts))):
        raise UserError(f"its special tokens do not follow the base vocabulary, whose last id is {first - 1}")
    for role in ("eos", "bos"):
        if known.get(role) not in texts and (role == "eos" or role in known):
            raise UserError(
                f"none of its special tokens ({', '.join(map(repr, texts)) or 'it has none'}) is the {role} token "
                f"{known.get(role)!r}; name them under special_tokens in the tokenizer's config"
            )
    roles_of = {text: [role for role in known if known[role] == text] for text in texts}
    taken = set(known)
    roles: dict[str, str] = {}
    for text in texts:
        for role in roles_of[text] or [_new_role(text, taken)]:
            taken.add(role)
            roles[role] = text
    return roles


def _new_role(text: str, taken: set[str]) -> str:
    """Derive a role from a special token's text: ``think`` from ``<think>``, or ``think_2`` if that is taken."""
    word = re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")[:48]
    word = word if word[:1].isalpha() else f"token_{word}".rstrip("_")
    count = 1
    while (role := word if count == 1 else f"{word}_{count}") in taken:
        count += 1
    return role
