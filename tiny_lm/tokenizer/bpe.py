r"""Byte-level BPE: trained by rustbpe, run by tiktoken, exported so that transformers and llama.cpp yield the same ids.

Text is split by a pattern first and each piece is then merged from bytes, as in "Neural Machine Translation of Rare
Words with Subword Units" (Sennrich et al., 2016) and its byte-level form (Radford et al., 2019).
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from typing_extensions import Self

from tiny_lm.config import shorten
from tiny_lm.errors import UserError
from tiny_lm.reading import read_json
from tiny_lm.tokenizer.base import Tokenizer, vocabulary
from tiny_lm.tokenizer.config import SplitPattern, TokenizerConfig

if TYPE_CHECKING:
    import tiktoken

_LLAMA3_SHAPE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,DIGITS}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_PATTERN = _LLAMA3_SHAPE.replace("DIGITS", "3")
"""Llama 3's split, which llama.cpp implements as ``llama-bpe``: numbers in groups of up to three digits."""

TWO_DIGIT_PATTERN = _LLAMA3_SHAPE.replace("DIGITS", "2")
"""The same with groups of up to two digits; only for imported tokenizers, since llama.cpp does not support it."""

QWEN2_PATTERN = _LLAMA3_SHAPE.replace("{1,DIGITS}", "")
"""Qwen2's split, ``qwen2`` in llama.cpp: Llama 3's with single digits."""

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""GPT-2's split, ``gpt-2`` in llama.cpp."""

SMOLLM_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"
"""SmolLM's split, ``smollm`` in llama.cpp: single digits first, then GPT-2's split."""

SPLIT_PATTERNS: Mapping[SplitPattern, str] = {
    "llama3": LLAMA3_PATTERN,
    "gpt2": GPT2_PATTERN,
    "qwen2": QWEN2_PATTERN,
    "smollm": SMOLLM_PATTERN,
}
"""The values of ``split_pattern``."""

# Recovering a token's merge takes time quadratic in its length. A vocabulary of a million tokens has about 10^8.
_MAX_MERGE_WORK = 2**28
_LONGEST_TOKEN = 4096
# A corpus with a line of 60,000 dots yields tokens of 1, 2, 4, ... 32,768 of them, which are useless.
_LONGEST_TRAINED_TOKEN = 512

# We split longer runs of white space ourselves: the regex engine of tiktoken and rustbpe keeps a state for each
# character that `\s+(?!\S)` passes and stops at a million of them.
_LONG_RUN = 100_000
# What `\s` matches in Rust's regex; Python's also matches U+001C to U+001F.
_SPACE = "\t\n\x0b\x0c\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_LONG_SPACE = re.compile(f"[{_SPACE}]{{{_LONG_RUN},}}")
_LINE_ENDS = re.compile(r"[\r\n]*")


class BPETokenizer(Tokenizer):
    """Byte-level BPE: base ids 0 to 255 are bytes, the others are merges in training order.

    Attributes:
        pattern: the regular expression that splits text before the merges.
    """

    kind: ClassVar[str] = "BPE"
    libraries: ClassVar[tuple[str, ...]] = ("rustbpe", "tiktoken")
    patterns: ClassVar[tuple[str, ...]] = (*SPLIT_PATTERNS.values(), TWO_DIGIT_PATTERN)
    """Allowed splits; the first is the default."""

    def __init__(self, base: Sequence[bytes], special_texts: Mapping[str, str], *, pattern: str | None = None) -> None:
        """Build the tokenizer from its merge table.

        Args:
            base: token bytes by rank, which is also the id.
            special_texts: the text of each special token, by role.
            pattern: one of ``patterns``; by default the first.

        Raises:
            UserError: the table lacks a byte or has a duplicate, or the pattern is not allowed.
        """
        super().__init__(base, special_texts)
        self.pattern = self.patterns[0] if pattern is None else pattern
        if self.pattern not in self.patterns:
            raise UserError(f"a {self.kind} tokenizer cannot split text by {shorten(self.pattern)}")
        if (
            max(map(len, self.base), default=0) > _LONGEST_TOKEN
            or sum(len(token) ** 2 for token in self.base) > _MAX_MERGE_WORK
        ):
            raise UserError(
                f"the tokens of the vocabulary are too long for a BPE tokenizer (the longest has "
                f"{max(map(len, self.base)):,} bytes)"
            )
        self._ranks = {token: rank for rank, token in enumerate(self.base)}
        if len(self._ranks) != len(self.base) or not all(bytes([i]) in self._ranks for i in range(256)):
            raise UserError("the vocabulary of a BPE tokenizer must contain all 256 bytes and no duplicates")
        self._check_clash(byte_level(token) for token in self.base)
        self._encoding = self._tiktoken(self.pattern)

    def _tiktoken(self, pattern: str) -> "tiktoken.Encoding":
        import tiktoken

        return tiktoken.Encoding(self.kind, pat_str=pattern, mergeable_ranks=self._ranks, special_tokens={})

    @cached_property
    def _unsplit(self) -> "tiktoken.Encoding":
        """The same merges for a text that is one piece."""
        return self._tiktoken("(?s:.+)")

    @classmethod
    def train(cls, config: TokenizerConfig, documents: Iterable[str]) -> Self:
        """Learn the merges; the result does not depend on the number of threads.

        A corpus with too few different pairs yields a smaller vocabulary than the config asks for.
        """
        import rustbpe

        assert config.vocab_size is not None  # the config has checked it
        pattern = SPLIT_PATTERNS[config.split_pattern]
        trainer = rustbpe.Tokenizer()
        trainer.train_from_iterator(
            (_LONG_SPACE.sub(lambda run: run[0][:_LONG_RUN], document) for document in documents),
            config.vocab_size - len(set(config.special_tokens.values())),
            buffer_size=8192,
            pattern=pattern,
        )
        ranks = sorted(trainer.get_mergeable_ranks(), key=lambda entry: entry[1])
        # No remaining token is merged from those that are left out.
        base = [bytes(token) for token, _ in ranks if len(token) <= _LONGEST_TRAINED_TOKEN]
        return cls(base, config.special_tokens, pattern=pattern)

    # --- encoding --------------------------------------------------------------------------------------------------

    def _encode(self, text: str) -> list[int]:
        if len(text) < _LONG_RUN:
            return self._encoding.encode_ordinary(text)
        ids: list[int] = []
        for part, whole in self._cut_long_runs(text):
            ids += (self._unsplit if whole else self._encoding).encode_ordinary(part)
        return ids

    def _cut_long_runs(self, text: str) -> Iterator[tuple[str, bool]]:
        """Cut a very long run of white space into pieces exactly where the pattern would.

        All patterns leave the last white space before a word to that word; SmolLM's leaves none to a number. Those
        of Llama 3 and Qwen2 also end a piece at the last line end of the run, and let punctuation take the line ends
        that follow.

        Yields:
            parts of the text, and whether a part is one piece (else the pattern splits it).
        """
        by_line = self.pattern not in (GPT2_PATTERN, SMOLLM_PATTERN)
        start = 0
        for run in _LONG_SPACE.finditer(text):
            begin, end = run.span()
            if by_line and begin and unicodedata.category(text[begin - 1])[0] not in "LN":
                line_ends = _LINE_ENDS.match(text, begin)
                begin = line_ends.end() if line_ends else begin
            yield text[start:begin], False
            if by_line:
                after_line = max(text.rfind("\n", begin, end), text.rfind("\r", begin, end)) + 1
                yield text[begin:after_line], True
                begin = max(begin, after_line)
            is_whole = end == len(text) or (self.pattern == SMOLLM_PATTERN and _is_number(text[end]))
            start = end if is_whole else max(begin, end - 1)
            yield text[begin:start], True
        yield text[start:], False

    # --- the folder on disk ----------------------------------------------------------------------------------------

    @property
    def split_name(self) -> str:
        """The name of the pattern in a tokenizer config; ``two digits`` for the one that only imports have."""
        return next((name for name, pattern in SPLIT_PATTERNS.items() if pattern == self.pattern), "two digits")

    @property
    def merges(self) -> list[tuple[bytes, bytes]]:
        """The pairs that are merged, first to last.

        Raises:
            UserError: a token cannot be reached by merging two others.
        """
        return recover_merges(self.base)

    def _identity(self) -> dict[str, Any]:
        return {"pattern": self.pattern}

    def _pipeline(self) -> dict[str, Any]:
        split = {"type": "Split", "pattern": {"Regex": self.pattern}, "behavior": "Isolated", "invert": False}
        byte_level_options = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        return {
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level_options]},
            "decoder": byte_level_options,
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                # tiktoken's rule: a piece that is a token is not merged.
                "ignore_merges": True,
                "vocab": {byte_level(token): i for i, token in enumerate(self.base)},
                "merges": [[byte_level(left), byte_level(right)] for left, right in self.merges],
            },
        }

    @classmethod
    def from_folder(cls, folder: Path, special_texts: Mapping[str, str]) -> Self:
        """Load from ``tokenizer.json``."""
        file = folder / "tokenizer.json"
        content = read_json(file)
        try:
            pattern = content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
            base = [from_byte_level(token) for token in vocabulary(content["model"], str(file))]
        except (KeyError, IndexError, TypeError) as error:
            raise UserError(f"{file}: not a tiny-lm byte-level BPE tokenizer ({error!r})") from None
        return cls(base, special_texts, pattern=str(pattern))


def _is_number(character: str) -> bool:
    return unicodedata.category(character)[0] == "N"


# --- byte-level text -------------------------------------------------------------------------------------------------


def _alphabet() -> list[str]:
    """Return GPT-2's character for each byte: printable Latin-1 characters map to themselves."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


_CHARACTERS = _alphabet()
_BYTES = {character: byte for byte, character in enumerate(_CHARACTERS)}


def byte_level(token: bytes) -> str:
    """Show bytes in GPT-2's alphabet of one printable character per byte."""
    return "".join([_CHARACTERS[byte] for byte in token])


def from_byte_level(text: str) -> bytes:
    """Undo :func:`byte_level`.

    Raises:
        KeyError: a character is not of that alphabet.
    """
    return bytes([_BYTES[character] for character in text])


def recover_merges(base: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
    """Recover the merge of each token in a table of ranks.

    Merging a token's bytes with the lower ranks only must leave two parts: the merge that was learned.

    Raises:
        UserError: it does not: the ranks are not those of a BPE.
    """
    ranks = {token: rank for rank, token in enumerate(base)}
    merges = []
    for rank, token in enumerate(base):
        if len(token) == 1:
            continue
        parts = _merge(token, ranks, rank)
        if len(parts) != 2:
            raise UserError(
                f"token {rank} ({token!r}) is not a merge of two earlier tokens, so this is not a BPE vocabulary"
            )
        merges.append((parts[0], parts[1]))
    return merges


def _merge(token: bytes, ranks: Mapping[bytes, int], limit: int) -> list[bytes]:
    """Merge the bytes of ``token`` by the ranks below ``limit``, lowest first."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 1:
        pairs = [ranks.get(left + right, limit) for left, right in pairwise(parts)]
        best = min(pairs)
        if best >= limit:
            break
        index = pairs.index(best)
        parts[index : index + 2] = [parts[index] + parts[index + 1]]
    return parts
