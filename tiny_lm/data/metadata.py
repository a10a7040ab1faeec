"""``metadata.json``, which describes the shards of a token stream in its folder."""

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, field_validator

from tiny_lm.config import Config, config_dataclass
from tiny_lm.errors import UserError
from tiny_lm.files import write_json
from tiny_lm.reading import read_json

METADATA_FILE = "metadata.json"

TOKENIZER_FOLDER = "tokenizer"
"""Folder inside a stream folder with the tokenizer that wrote it."""


@config_dataclass
class FileStatistics(Config):
    """Statistics of one ``.bin`` file."""

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
    """Contents of a stream folder, and the tokenizer that wrote it."""

    folder: ClassVar[str] = ""

    format: Literal[1] = 1
    dtype: Literal["uint16", "uint32"]
    vocab_size: int = Field(ge=1)
    tokenizer_hash: str
    special_tokens: dict[str, int]
    source: str = Field(description="the data set of the text")
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
            UserError: it is missing, or not in tiny-lm's format.
        """
        path = stream_folder / METADATA_FILE
        if not path.is_file():
            raise UserError(f"{path}: missing, so the stream is incomplete; run `tiny-lm tokenize` again")
        values = read_json(path)
        if not isinstance(values, dict):
            raise UserError(f"{path}: is not the metadata of a token stream")
        return cls.from_dict(values, source=str(path))

    def write(self, stream_folder: Path) -> None:
        """Write the metadata into a stream folder."""
        write_json(stream_folder / METADATA_FILE, self.to_dict())
