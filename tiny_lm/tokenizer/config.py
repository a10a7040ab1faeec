"""Tokenizer configs: the YAML files in ``configs/tokenizers/``."""

import re
from typing import ClassVar, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from tiny_lm.config import Config, config_dataclass, shorten

STANDARD_SPECIALS = {"pad": "<pad>", "eos": "<eos>", "bos": "<bos>", "unk": "<unk>"}
"""The standard roles with their default texts; only these are control tokens, which decoding skips."""

GPT2_SPECIALS = {"eos": "<|endoftext|>", "bos": "<|endoftext|>"}
"""GPT-2 has one special token, which both ends a document and begins the next."""

GPT2_BASE_SIZE = 50_256
"""GPT-2's tokens without ``<|endoftext|>``."""

# The vocabulary before training: all bytes; SentencePiece also its unknown piece and an alphabet.
_MIN_BASE_SIZE = {"BPE": 256, "sentencepiece": 1 + 256 + 32, "char": 1}


SplitPattern = Literal["llama3", "gpt2", "qwen2", "smollm"]
"""How a BPE tokenizer splits text before the merges: each has a pre-tokenizer of llama.cpp that yields the same ids."""


@config_dataclass
class TokenizerConfig(Config):
    """How to train a tokenizer, and on what.

    ``vocab_size`` counts all tokens, the special ones included; their ids follow the base vocabulary in the order of
    ``special_tokens``. Left out, ``special_tokens`` are the four standard ones (for GPT-2 its own), and the two folders
    are named after the tokenizer.
    """

    folder: ClassVar[str] = "tokenizers"

    name: str = Field(pattern=r"^[A-Za-z0-9][\w.-]*$", max_length=100, description="also names the default folders")
    type: Literal["BPE", "sentencepiece", "char", "gpt2"] = "BPE"
    vocab_size: int | None = Field(
        default=None, gt=0, le=2**20, description="number of tokens, including special tokens"
    )
    dataset_config: str = Field(min_length=1, description="name or path of a dataset config")
    val_split: float = Field(default=0.01, ge=0, lt=1, description="share of documents held out for validation")
    special_tokens: dict[str, str] = Field(default_factory=dict, description="text of each special token, by role")
    split_pattern: SplitPattern = Field(
        default="llama3", description="BPE only: pattern that splits text before merges"
    )
    output_dir: str = Field(default="", description="folder of the tokenizer")
    tokenized_output_dir: str = Field(default="", description="folder of the token stream")
    num_threads: int = Field(default=16, ge=1, le=1024, description="threads that encode the corpus")

    @model_validator(mode="after")
    def _complete(self) -> Self:
        given = self.special_tokens
        specials = {**GPT2_SPECIALS, **given} if self.type == "gpt2" else given or STANDARD_SPECIALS
        # A frozen dataclass lets only object.__setattr__ fill in what depends on another field.
        object.__setattr__(self, "special_tokens", dict(specials))
        object.__setattr__(self, "output_dir", self.output_dir or f"tokenizers/{self.name}")
        object.__setattr__(self, "tokenized_output_dir", self.tokenized_output_dir or f"data/{self.name}-tokenized")
        check_special_tokens(self.special_tokens, self.type)
        if self.split_pattern != "llama3" and self.type != "BPE":
            raise ValueError(f"split_pattern: only for type: BPE; a {self.type} tokenizer has its own")
        self._check_vocab_size()
        return self

    def _check_vocab_size(self) -> None:
        size = self.vocab_size
        specials = len(set(self.special_tokens.values()))
        if self.type == "gpt2":
            if size is not None and size != GPT2_BASE_SIZE + specials:
                raise ValueError(
                    f"vocab_size: GPT-2's is fixed, {GPT2_BASE_SIZE + specials} with its special tokens (it is {size})"
                )
        elif size is None:
            if self.type != "char":
                raise ValueError(f"vocab_size: a {self.type} tokenizer needs one")
        elif size < _MIN_BASE_SIZE[self.type] + specials:
            raise ValueError(
                f"vocab_size: a {self.type} tokenizer with {specials} special tokens needs at least "
                f"{_MIN_BASE_SIZE[self.type] + specials} (it is {size})"
            )


def check_special_tokens(specials: dict[str, str], kind: str) -> None:
    """Check the texts of the special tokens, by role.

    Raises:
        ValueError: a text is empty, blank, too long, not Unicode, or shared by roles that cannot share one; a role is
            not a plain word; eos is missing; a character tokenizer has no unk.
    """
    for role, text in specials.items():
        key = f"special_tokens.{role}"
        if not re.fullmatch(r"[a-z][a-z0-9_]{0,63}", role):
            raise ValueError(f"special_tokens: the role {shorten(role)} must be a word of a-z, 0-9 and _")
        if not text.strip() or len(text) > 256:
            raise ValueError(f"{key}: must be 1 to 256 characters, not all of them blank (it is {shorten(text)})")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError(f"{key}: must be valid Unicode (it is {shorten(text)})")
        if kind == "char" and len(text) == 1:
            raise ValueError(f"{key}: a single character is an ordinary token of a char tokenizer (it is {text!r})")
    needed = ("eos", "unk") if kind == "char" else ("eos",)
    for role in needed:
        if role not in specials:
            raise ValueError(f"special_tokens: the role {role!r} is missing")
    if kind == "gpt2":
        for role, text in GPT2_SPECIALS.items():
            if specials.get(role) != text:
                raise ValueError(
                    f"special_tokens.{role}: is always {text} in GPT-2 (it is {shorten(specials.get(role))})"
                )
    # One control token may have several roles: <|endoftext|> of GPT-2 is eos and bos. In a char tokenizer unk
    # represents characters, so it cannot end a text, too.
    shareable = set(STANDARD_SPECIALS) - ({"unk"} if kind == "char" else set())
    for role, text in specials.items():
        others = [other for other in specials if other != role and specials[other] == text]
        if others and role not in shareable:
            raise ValueError(
                f"special_tokens.{role}: the text {text!r} is that of {others[0]!r} too; only pad, eos, bos and unk "
                "may share a token" + (", and unk may not in a char tokenizer" if kind == "char" else "")
            )
