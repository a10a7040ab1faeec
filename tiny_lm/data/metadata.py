"""``metadata.json``, which stands beside the ``.bin`` files of a token stream and says what they hold."""

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, field_validator

from tiny_lm.config import Config, config_dataclass
from tiny_lm.errors import UserError
from tiny_lm.files import write_json
from tiny_lm.reading import read_json

METADATA_FILE = "metadata.json"

TOKENIZER_FOLDER = "tokenizer"
"""Folder inside a stream folder that holds the tokenizer which wrote it."""


@config_dataclass
class FileStatistics(Config):
    """What one ``.bin`` file holds."""

    folder: ClassVar[str] = ""

    tokens: int = Field(ge=0)
    documents: int = Field(ge=0)
    bytes: int = Field(ge=0, description="UTF-8 bytes of the text, special tokens not counted")
    shortest: int = Field(ge=0, description="tokens of the shortest document, bos and eos included")
    longest: int = Field(ge=0)

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text for each token of the stream."""
        return self.bytes / max(self.tokens, 1)


@config_dataclass
class StreamMetadata(Config):
    """What a folder of ``.bin`` files holds, and which tokenizer wrote them."""

    folder: ClassVar[str] = ""

    format: Literal[1] = 1
    dtype: Literal["uint16", "uint32"]
    vocab_size: int = Field(ge=1)
    tokenizer_hash: str
    special_tokens: dict[str, int]
    source: str = Field(description="the data set the text came from")
    seed: int = Field(description="of the division into train and validation")
    files: dict[str, FileStatistics]

    @field_validator("special_tokens")
    @classmethod
    def _ends(cls, value: dict[str, int]) -> dict[str, int]:
        if "eos" not in value:
            raise ValueError("the id of eos is missing")
        return value

    @property
    def eos_id(self) -> int:
        """Id of the token that ends each document."""
        return self.special_tokens["eos"]

    @classmethod
    def read(cls, stream_folder: Path) -> "StreamMetadata":
        """Read the metadata of a stream folder.

        Raises:
            UserError: there is none, or it is not what tiny-lm writes.
        """
        path = stream_folder / METADATA_FILE
        if not path.is_file():
            raise UserError(f"{path}: missing, so the stream is incomplete; run `tiny-lm tokenize` again")
        values = read_json(path)
        if not isinstance(values, dict):
            raise UserError(f"{path}: is no token stream's metadata")
        return cls.from_dict(values, source=str(path))

    def write(self, stream_folder: Path) -> None:
        """Write the metadata into a stream folder."""
        write_json(stream_folder / METADATA_FILE, self.to_dict())
