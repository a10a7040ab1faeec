"""Check a ``tokenizer.model`` before the C++ library parses it: the library trusts much of what it reads.

The file is a protobuf message, ``ModelProto`` of sentencepiece_model.proto: pieces (field 1), trainer_spec (2),
normalizer_spec (3), self_test_data (4), denormalizer_spec (5).
"""

import math
import struct
from collections.abc import Iterator

from tiny_lm.errors import UserError

_MAX_PIECES = 2**20
_MAX_PIECE_BYTES = 1024  # the trainer's own limit is 16 characters
_BPE = 2  # trainer_spec.model_type

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class _DamagedError(Exception):
    pass


def check_sentencepiece_model(data: bytes) -> None:
    """Check that ``data`` is a BPE model within limits that does not alter text.

    Raises:
        UserError: it is damaged, of another type than BPE, normalizes text, or is too large.
    """
    if not data:
        raise UserError("tokenizer.model is empty")
    try:
        _check_message(data)
    except _DamagedError as error:
        raise UserError(f"tokenizer.model is damaged or not a SentencePiece model ({error})") from None


def _check_message(data: bytes) -> None:
    pieces = 0
    model_type = None
    for field, value in _fields(data):
        if field == 1:
            pieces += 1
            _check_piece(_as_bytes(value))
        elif field == 2:
            for inner, setting in _fields(_as_bytes(value)):
                model_type = setting if inner == 3 else model_type
        elif field in (3, 5):
            if any(inner == 2 and setting for inner, setting in _fields(_as_bytes(value))):
                raise UserError("tokenizer.model normalizes text, so texts would not survive")
        elif field == 4:
            raise UserError("tokenizer.model holds texts to test itself with; save it without them")
    if not 0 < pieces <= _MAX_PIECES:
        raise _DamagedError(f"{pieces} pieces")
    if model_type != _BPE:
        raise UserError("tokenizer.model is not of the type BPE, the one SentencePiece type that is read")


def _check_piece(data: bytes) -> None:
    """Check one piece: text (1), score (2), type (3)."""
    text, score = b"", 0.0
    for field, value in _fields(data):
        if field == 1:
            text = _as_bytes(value)
        elif field == 2:
            score = struct.unpack("<f", _as_bytes(value))[0] if _is_length(value, 4) else math.nan
    if not 0 < len(text) <= _MAX_PIECE_BYTES:
        raise _DamagedError(f"a piece of {len(text):,} bytes")
    if b"\0" in text or not math.isfinite(score):
        raise _DamagedError("a piece with a zero byte, or a score that is not finite")
    try:
        text.decode("utf-8")
    except UnicodeDecodeError:
        raise _DamagedError("a piece is not UTF-8") from None


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield number and value of each field of a message: numbers as int, everything else as bytes."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        field, wire = key >> 3, key & 7
        if wire == _VARINT:
            value, position = _varint(data, position)
            yield field, value
            continue
        if wire == _BYTES:
            length, position = _varint(data, position)
        elif wire in (_FIXED32, _FIXED64):
            length = 4 if wire == _FIXED32 else 8
        else:
            raise _DamagedError(f"a field of the unknown type {wire}")
        if field == 0 or position + length > len(data):
            raise _DamagedError("a field leads beyond the end")
        yield field, data[position : position + length]
        position += length


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            raise _DamagedError("it ends inside a field")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise _DamagedError("a number is too long")


def _as_bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise _DamagedError("a number where text is expected")
    return value


def _is_length(value: int | bytes, length: int) -> bool:
    return isinstance(value, bytes) and len(value) == length
