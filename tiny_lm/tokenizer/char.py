"""One token per character, for beginners and for tiny vocabularies."""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from typing_extensions import Self

from tiny_lm.errors import UserError
from tiny_lm.reading import read_json
from tiny_lm.tokenizer.base import Tokenizer, vocabulary
from tiny_lm.tokenizer.config import TokenizerConfig


class CharTokenizer(Tokenizer):
    """The characters of the training corpus, the most frequent first; all others become unk."""

    kind: ClassVar[str] = "char"
    lossless: ClassVar[bool] = False

    def __init__(self, characters: Iterable[str], special_texts: Mapping[str, str]) -> None:
        """Number the characters.

        Raises:
            UserError: an entry is not a single character or occurs twice.
        """
        self.characters = list(characters)
        self._ids = {character: i for i, character in enumerate(self.characters)}
        single = all(len(character) == 1 and not "\ud800" <= character <= "\udfff" for character in self.characters)
        if not single or len(self._ids) != len(self.characters):
            raise UserError("the vocabulary of a char tokenizer must contain single characters without duplicates")
        super().__init__([character.encode() for character in self.characters], special_texts)

    @classmethod
    def train(cls, config: TokenizerConfig, documents: Iterable[str]) -> Self:
        """Count the characters; with ``vocab_size``, the rarest are dropped."""
        counts: Counter[str] = Counter()
        for document in documents:
            counts.update(document)
        # Ties are sorted by code point, so the order of the documents does not matter.
        ordered = sorted(counts, key=lambda character: (-counts[character], character))
        limit = None if config.vocab_size is None else config.vocab_size - len(set(config.special_tokens.values()))
        return cls(ordered[:limit], config.special_tokens)

    def _encode(self, text: str) -> list[int]:
        unknown = self.special_tokens["unk"]
        return [self._ids.get(character, unknown) for character in text]

    def _pipeline(self) -> dict[str, Any]:
        # A word-level model needs unk in its own vocabulary, so the special tokens are included.
        specials = {token.text: token.id for token in self.specials}
        split = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
        return {
            "normalizer": None,
            "pre_tokenizer": split,
            "decoder": {"type": "Fuse"},
            "model": {
                "type": "WordLevel",
                "vocab": {**self._ids, **specials},
                "unk_token": next(token.text for token in self.specials if token.role == "unk"),
            },
        }

    @classmethod
    def from_folder(cls, folder: Path, special_texts: Mapping[str, str]) -> Self:
        """Read ``tokenizer.json``."""
        file = folder / "tokenizer.json"
        content = read_json(file)
        tokens = vocabulary(content.get("model") if isinstance(content, dict) else None, str(file))
        texts = list(dict.fromkeys(special_texts.values()))  # roles may share a token
        count = len(tokens) - len(texts)
        if tokens[max(0, count) :] != texts:
            raise UserError(f"{file}: does not end with the special tokens of metadata.json")
        return cls(tokens[:count], special_texts)
