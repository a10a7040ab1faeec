"""SentencePiece BPE (Kudo & Richardson, 2018) with byte fallback, lossless for every text.

Nothing is normalized, no space is added or dropped, and characters outside the vocabulary become bytes.
"""

import io
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from typing_extensions import Self

from tiny_lm.errors import UserError
from tiny_lm.files import atomic_path
from tiny_lm.reading import read_bytes, read_json
from tiny_lm.tokenizer.base import Tokenizer, vocabulary
from tiny_lm.tokenizer.config import TokenizerConfig
from tiny_lm.tokenizer.sentencepiece_model import check_sentencepiece_model

if TYPE_CHECKING:
    import sentencepiece

SPACE_MARK = "\u2581"
"""SentencePiece's symbol for a space; where the text itself has it, it is encoded as bytes."""

# SentencePiece requires an unknown piece at id 0. With byte fallback it is never produced; ours is a special token.
_UNKNOWN_PIECE = "<|sentencepiece-unk|>"

# Bounds the memory of training: a random sample of at most this many segments, each of at most this many characters.
_SEGMENTS = 200_000
_SEGMENT_LENGTH = 2048
_SEED = 0

# Longer texts are encoded in parts, which bounds the memory of a merge.
_PART = 2**18
_WORD_START = re.compile("[^ ] ")
_MODEL_LIMIT = 2**26  # bytes; a model of a million tokens has about 20 million


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece BPE model with the special tokens on top.

    Attributes:
        model: the content of ``tokenizer.model``.
        pieces: text of each piece, by id.
        byte_ids: id of the piece of each byte.
    """

    kind: ClassVar[str] = "sentencepiece"
    libraries: ClassVar[tuple[str, ...]] = ("sentencepiece",)

    def __init__(self, model: bytes, special_texts: Mapping[str, str]) -> None:
        """Build the tokenizer.

        Args:
            model: the content of a ``tokenizer.model``.
            special_texts: the text of each special token, by role.

        Raises:
            UserError: it is not such a model, or it normalizes text.
        """
        self.model = model
        self._processor = _processor(model)
        ids = range(self._processor.get_piece_size())
        self.pieces = [self._processor.id_to_piece(i) for i in ids]
        self.byte_ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        if not all(self._processor.is_byte(i) for i in self.byte_ids):
            raise UserError("the SentencePiece model has no byte fallback, so it would lose characters")
        byte_of = {i: bytes([byte]) for byte, i in enumerate(self.byte_ids)}
        base = [byte_of.get(i, self.pieces[i].replace(SPACE_MARK, " ").encode()) for i in ids]
        base[self._processor.unk_id()] = b""
        super().__init__(base, special_texts)
        self._check_clash(self.pieces)
        self._space_mark = [self.byte_ids[byte] for byte in SPACE_MARK.encode()]
        if self.decode(self.encode(" a  b \n")) != " a  b \n":
            raise UserError("the SentencePiece model adds, drops or normalizes characters, so text would not survive")

    @classmethod
    def train(cls, config: TokenizerConfig, documents: Iterable[str]) -> Self:
        """Learn the pieces from a bounded random sample; the result is deterministic.

        Raises:
            UserError: the vocabulary cannot hold the characters of the corpus.
        """
        import sentencepiece

        assert config.vocab_size is not None  # the config has checked it
        failures: list[Exception] = []
        model = io.BytesIO()
        sentencepiece.set_random_generator_seed(_SEED)
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=_segments(documents, failures),
                model_writer=model,
                model_type="bpe",
                vocab_size=config.vocab_size - len(set(config.special_tokens.values())),
                hard_vocab_limit=False,  # a small corpus yields a smaller vocabulary
                byte_fallback=True,
                character_coverage=0.9999,
                split_digits=True,
                required_chars=SPACE_MARK,  # otherwise a space would become the bytes of its symbol
                allow_whitespace_only_pieces=True,  # indentation
                normalization_rule_name="identity",
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                unk_id=0,
                unk_piece=_UNKNOWN_PIECE,
                bos_id=-1,
                eos_id=-1,
                pad_id=-1,
                input_sentence_size=_SEGMENTS,
                shuffle_input_sentence=True,
                max_sentence_length=4 * _SEGMENT_LENGTH,  # bytes
                num_threads=min(config.num_threads, 128),
                minloglevel=2,
            )
        except RuntimeError as error:
            if failures:
                raise failures[0] from None
            raise UserError(
                f"SentencePiece could not train with vocab_size={config.vocab_size}: {_reason(error)}"
            ) from error
        return cls(model.getvalue(), config.special_tokens)

    # --- encoding --------------------------------------------------------------------------------------------------

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for i, stretch in enumerate(text.split(SPACE_MARK)):
            if i:
                ids += self._space_mark
            for part in _parts(stretch):
                ids += self._processor.encode(part)
        return ids

    # --- the folder on disk ----------------------------------------------------------------------------------------

    def _identity(self) -> dict[str, Any]:
        return {"model": self.model.hex()}

    def _save_model(self, folder: Path) -> None:
        with atomic_path(folder / "tokenizer.model") as temporary:
            temporary.write_bytes(self.model)

    @property
    def scores(self) -> list[float]:
        """The score of each piece, by id: of two possible merges, the one with the higher score comes first."""
        return [self._processor.get_score(i) for i in range(len(self.pieces))]

    @property
    def merges(self) -> list[tuple[str, str]]:
        """The pairs of pieces that are merged, first to last.

        SentencePiece merges any two neighbours that together are a piece, the piece of the highest score first.
        """
        processor = self._processor
        normal = {
            piece: processor.get_score(i)
            for i, piece in enumerate(self.pieces)
            if not (processor.is_byte(i) or processor.is_unknown(i) or processor.is_control(i))
        }
        ordered = sorted(normal, key=lambda piece: -normal[piece])
        return [
            (piece[:cut], piece[cut:])
            for piece in ordered
            for cut in range(1, len(piece))
            if piece[:cut] in normal and piece[cut:] in normal
        ]

    def _pipeline(self) -> dict[str, Any]:
        return {
            "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK},
            "pre_tokenizer": None,
            "decoder": {
                "type": "Sequence",
                "decoders": [
                    {"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "},
                    {"type": "ByteFallback"},
                    {"type": "Fuse"},
                ],
            },
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": True,
                "ignore_merges": False,
                "vocab": {piece: i for i, piece in enumerate(self.pieces)},
                "merges": [list(pair) for pair in self.merges],
            },
        }

    @classmethod
    def from_folder(cls, folder: Path, special_texts: Mapping[str, str]) -> Self:
        """Read ``tokenizer.model``, and check that ``tokenizer.json`` has the same pieces."""
        file = folder / "tokenizer.model"
        tokenizer = cls(read_bytes(file, limit=_MODEL_LIMIT), special_texts)
        file = folder / "tokenizer.json"
        content = read_json(file)
        if vocabulary(content.get("model") if isinstance(content, dict) else None, str(file)) != tokenizer.pieces:
            raise UserError(f"{file}: has other tokens than tokenizer.model beside it")
        return tokenizer


def _processor(model: bytes) -> "sentencepiece.SentencePieceProcessor":
    import sentencepiece

    check_sentencepiece_model(model)
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=model)
    except (RuntimeError, OSError, ValueError):
        raise UserError("tokenizer.model is damaged or not a SentencePiece model") from None


def _reason(error: Exception) -> str:
    """Return SentencePiece's error message without source location and command-line advice."""
    _, _, message = str(error).partition("] ")
    text = (message or str(error)).split(" or decrease character_coverage")[0]
    return " ".join(text.split()) or type(error).__name__


def _parts(text: str) -> Iterator[str]:
    """Split a long text at word boundaries, which no piece crosses, so the ids stay the same."""
    start = 0
    while len(text) - start > _PART:
        found = _WORD_START.search(text, start + _PART)
        if found is None:
            break
        yield text[start : found.start() + 1]
        start = found.start() + 1
    yield text[start:]


def _segments(documents: Iterable[str], failures: list[Exception]) -> Iterator[str]:
    """Cut documents into segments that SentencePiece accepts, before a line end, else before a space.

    A line end begins the next segment, so that it is learned with what follows and not trimmed from an end. Exceptions
    of ``documents`` are kept in ``failures``, since the trainer passes on only their text.
    """
    try:
        for document in documents:
            start = 0
            while len(document) - start > _SEGMENT_LENGTH:
                end = start + _SEGMENT_LENGTH
                cut = document.rfind("\n", start + 1, end)
                if cut < 0:
                    cut = document.rfind(" ", start + 1, end)
                cut = end if cut < 0 else cut
                yield document[start:cut]
                start = cut
            yield document[start:]
    except Exception as error:
        failures.append(error)
        raise
