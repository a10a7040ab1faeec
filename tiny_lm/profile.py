"""A profile: a named triple of configs, with what to expect of it."""

from typing import ClassVar

from pydantic import Field

from tiny_lm.config import Config, config_dataclass


@config_dataclass
class Profile(Config):
    """What `tiny-lm train PROFILE` trains."""

    folder: ClassVar[str] = "profiles"

    description: str
    tokenizer: str = Field(description="tokenizer config of the corpus and streams that the data config reads")
    model: str
    training: str
    data: str
    expect: str | None = Field(default=None, description="what its guide promises")
