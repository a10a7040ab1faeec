"""The tokenizer interface and what all kinds share: decoding, special tokens, the folder on disk."""

import codecs
import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

from typing_extensions import Self

from tiny_lm.config import shorten
from tiny_lm.errors import UserError
from tiny_lm.files import write_json, write_text
from tiny_lm.tokenizer.chat_template import FILE as CHAT_TEMPLATE_FILE
from tiny_lm.tokenizer.config import STANDARD_SPECIALS, check_special_tokens

FORMAT = 1
"""The version of the folder's layout, written to ``metadata.json``."""


@dataclass(frozen=True)
class SpecialToken:
    """A token that no text encodes to.

    Decoding skips ``control`` tokens (the standard roles). The others, such as ``<think>``, are part of the output.
    """

    role: str
    text: str
    id: int

    @property
    def control(self) -> bool:
        """Whether decoding skips the token."""
        return self.role in STANDARD_SPECIALS


class Tokenizer(ABC):
    """Text to token ids and back.

    The ids of the base vocabulary come first, those of the special tokens follow. Special tokens written inside
    ordinary text are text: only ``bos=True`` and ``eos=True`` put special ids into an encoding.

    Attributes:
        kind: the ``type`` of the config that trains it.
        lossless: whether ``decode(encode(text)) == text`` for every Unicode text.
        vocab_size: number of tokens, the special ones included.
        special_tokens: id by role.
        training: training statistics, saved in ``metadata.json``.
        chat_template: the Jinja chat template beside the tokenizer, if any; saved with it.
    """

    kind: ClassVar[str]
    lossless: ClassVar[bool] = True
    libraries: ClassVar[tuple[str, ...]] = ()

    def __init__(self, base: Sequence[bytes], special_texts: Mapping[str, str]) -> None:
        """Number the special tokens after the base vocabulary.

        Args:
            base: the bytes of each base token, by id.
            special_texts: the text of each special token, by role; equal texts share one id. Without ``bos``, documents
                begin with nothing.

        Raises:
            UserError: the special tokens are not valid, or one is also a token of the base vocabulary.
        """
        try:
            check_special_tokens(dict(special_texts), self.kind)
        except ValueError as error:
            raise UserError(str(error)) from None
        self.base = list(base)
        ids: dict[str, int] = {}
        for text in special_texts.values():
            ids.setdefault(text, len(base) + len(ids))
        self.specials = [SpecialToken(role, text, ids[text]) for role, text in special_texts.items()]
        self.special_tokens = {token.role: token.id for token in self.specials}
        self.vocab_size = len(base) + len(ids)
        self.training: dict[str, Any] = {}
        self.chat_template: str | None = None
        # Two tables by id: decoded bytes with and without control tokens.
        by_id = {token.id: token for token in self.specials}
        texts = [by_id[i].text.encode() for i in range(len(base), self.vocab_size)]
        self._visible = [*base, *texts]
        hidden = [b"" if by_id[len(base) + i].control else text for i, text in enumerate(texts)]
        self._bytes = [*base, *hidden]

    @property
    def bos_id(self) -> int | None:
        """The token that begins a document, if any."""
        return self.special_tokens.get("bos")

    @property
    def eos_id(self) -> int:
        """The token that ends a document."""
        return self.special_tokens["eos"]

    @property
    def pad_id(self) -> int | None:
        """The padding token, if any."""
        return self.special_tokens.get("pad")

    @property
    def unk_id(self) -> int | None:
        """The token for unknown text, if any."""
        return self.special_tokens.get("unk")

    def _check_clash(self, base: Iterable[str]) -> None:
        """Raise UserError if ``tokenizer.json`` would write a special and a base token alike: both would get one id."""
        clash = {token.text for token in self.specials}.intersection(base)
        if clash:
            raise UserError(
                f"the special token {min(clash)!r} is also a token of the base vocabulary; choose another text"
            )

    # --- encoding --------------------------------------------------------------------------------------------------

    @abstractmethod
    def _encode(self, text: str) -> list[int]:
        """Encode text that is known to be valid Unicode."""

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """Return the ids of ``text``, optionally with bos (if the tokenizer has one) and eos.

        Raises:
            UserError: the text contains a lone surrogate.
        """
        check_text(text)
        ids = self._encode(text)
        if bos and self.bos_id is not None:
            ids.insert(0, self.bos_id)
        if eos:
            ids.append(self.eos_id)
        return ids

    def encode_prompt(self, text: str) -> list[int]:
        """Return the ids of the beginning of a document, at least one.

        Without a bos token, empty text becomes the eos token, which separates documents in the training stream.

        Raises:
            UserError: the text contains a lone surrogate.
        """
        return self.encode(text, bos=True) or [self.eos_id]

    def encode_batch(
        self, texts: Sequence[str], *, bos: bool = False, eos: bool = False, num_threads: int = 16
    ) -> list[list[int]]:
        """Return what :meth:`encode` returns for each text, computed in up to ``num_threads`` threads.

        Raises:
            UserError: a text contains a lone surrogate.
        """
        # Slices, since dispatching single short documents costs more than encoding them; four per thread, since
        # documents differ in length.
        threads = max(1, min(num_threads, len(texts), os.cpu_count() or 1))
        size = max(1, -(-len(texts) // (4 * threads)))
        slices = [texts[start : start + size] for start in range(0, len(texts), size)]

        def encode_slice(part: Sequence[str]) -> list[list[int]]:
            return [self.encode(text, bos=bos, eos=eos) for text in part]

        if threads == 1:
            return encode_slice(texts)
        with ThreadPoolExecutor(threads) as executor:
            return [ids for part in executor.map(encode_slice, slices) for ids in part]

    # --- decoding --------------------------------------------------------------------------------------------------

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Return the text of ``ids``; invalid UTF-8 becomes U+FFFD.

        Args:
            ids: token ids.
            skip_special: skip control tokens instead of showing their texts.

        Raises:
            UserError: an id is outside the vocabulary.
        """
        table = self._bytes if skip_special else self._visible
        return b"".join([table[self._check_id(i)] for i in ids]).decode("utf-8", errors="replace")

    def stream_decoder(self, *, skip_special: bool = True) -> "StreamDecoder":
        """Return an incremental decoder that never emits partial characters."""
        return StreamDecoder(self, skip_special=skip_special)

    def token_bytes(self, token_id: int, *, skip_special: bool = True) -> bytes:
        """Return a token's UTF-8 bytes; empty for a control token unless ``skip_special`` is off.

        The tokens' bytes concatenate to the text (if the tokenizer is lossless).

        Raises:
            UserError: the id is outside the vocabulary.
        """
        return (self._bytes if skip_special else self._visible)[self._check_id(token_id)]

    def token_text(self, token_id: int) -> str:
        r"""Return a token as text for display: incomplete characters are shown as ``\xe2``.

        Raises:
            UserError: the id is outside the vocabulary.
        """
        return self._visible[self._check_id(token_id)].decode("utf-8", errors="backslashreplace")

    def _check_id(self, token_id: int) -> int:
        if not 0 <= token_id < self.vocab_size:
            raise UserError(f"token id {int(token_id)} is out of range: the vocabulary has {self.vocab_size} tokens")
        return token_id

    # --- the folder on disk ----------------------------------------------------------------------------------------

    @abstractmethod
    def _pipeline(self) -> dict[str, Any]:
        """Return normalizer, pre_tokenizer, decoder and model of the Hugging Face ``tokenizer.json``."""

    @classmethod
    @abstractmethod
    def from_folder(cls, folder: Path, special_texts: Mapping[str, str]) -> Self:
        """Build the tokenizer from its files; :func:`tiny_lm.tokenizer.load_tokenizer` is the way to call it.

        Raises:
            UserError: a file is missing or damaged.
        """

    def _identity(self) -> dict[str, Any]:
        """Return what else determines the encoding, as JSON values."""
        return {}

    def _save_model(self, folder: Path) -> None:
        """Write this kind's further files, or remove those of another kind."""
        (folder / "tokenizer.model").unlink(missing_ok=True)

    @cached_property
    def hash(self) -> str:
        """SHA-256 (hex) of everything that determines the ids: tokenizers with equal hashes encode alike."""
        content = {
            "kind": self.kind,
            "base": [token.hex() for token in self.base],
            "special_tokens": [[token.role, token.text, token.id] for token in self.specials],
            **self._identity(),
        }
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Return the tokenizer in the format of Hugging Face's ``tokenizer.json``."""
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": self.added_tokens(),
            "post_processor": None,
            **self._pipeline(),
        }

    def added_tokens(self) -> list[dict[str, Any]]:
        """Return the special tokens as ``tokenizer.json`` lists them, each id once."""
        options = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        unique = {token.id: token for token in self.specials}
        return [
            {"id": token.id, "content": token.text, **options, "special": token.control}
            for token in sorted(unique.values(), key=lambda token: token.id)
        ]

    def save(self, folder: Path | str) -> None:
        """Write the tokenizer into ``folder``; other files there are kept.

        ``metadata.json`` is deleted first and written last, and nothing loads without it, so an interrupted save is
        never mistaken for a complete one.

        Raises:
            UserError: the folder cannot be written.
        """
        folder = Path(folder)
        try:
            (folder / "metadata.json").unlink(missing_ok=True)
            write_json(folder / "tokenizer.json", self.to_json())
            self._save_model(folder)
        except OSError as error:
            raise UserError(f"{folder}: could not be written ({error.strerror or error})") from error
        write_json(folder / "tokenizer_config.json", self._transformers_config())
        if self.chat_template is not None:
            write_text(folder / CHAT_TEMPLATE_FILE, self.chat_template)
        write_json(folder / "metadata.json", self._metadata())

    def _transformers_config(self) -> dict[str, Any]:
        texts = {token.role: token.text for token in self.specials if token.control}
        return {
            # transformers replaces the split of other classes with its own, and would yield other ids.
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{f"{role}_token": texts[role] for role in ("bos", "eos", "pad", "unk") if role in texts},
            "add_bos_token": False,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": int(1e30),  # transformers' own mark for "no limit"
        }

    def _metadata(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "kind": self.kind,
            "vocab_size": self.vocab_size,
            "special_tokens": {token.role: {"text": token.text, "id": token.id} for token in self.specials},
            "hash": self.hash,
            "versions": {name: version(name) for name in self.libraries},
            "training": self.training,
        }


class StreamDecoder:
    """Decodes ids incrementally; the results concatenate to what ``decode`` returns for all of them."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Feed one id and return the characters that it completes.

        Raises:
            UserError: the id is outside the vocabulary.
        """
        return self._decoder.decode(self._tokenizer.token_bytes(token_id, skip_special=self._skip_special))

    def flush(self) -> str:
        """Finish: return U+FFFD for an incomplete character, else an empty string."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


def check_text(text: str) -> None:
    """Raise UserError if ``text`` contains a lone surrogate, which is not valid Unicode."""
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        start = error.start
        raise UserError(
            f"the text holds the lone surrogate U+{ord(text[start]):04X} at character {start}, "
            f"which is not valid Unicode: {shorten(text[max(0, start - 10) : start + 10])}"
        ) from None


def vocabulary(model: Any, file: str) -> list[str]:
    """Return the tokens of a ``tokenizer.json`` model in the order of their ids, which must be 0, 1, 2, ...

    Raises:
        UserError: ``model`` has no such vocabulary; ``file`` names the file.
    """
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocab, dict) or not all(type(i) is int for i in vocab.values()):
        raise UserError(f"{file}: has no vocabulary of tokens and ids")
    tokens = sorted(vocab, key=lambda token: vocab[token])
    if any(vocab[token] != i for i, token in enumerate(tokens)):
        raise UserError(f"{file}: the ids of the vocabulary are not 0 to {len(tokens) - 1}, each of them once")
    return tokens
