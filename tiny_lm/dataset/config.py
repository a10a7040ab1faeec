"""What a data set is: where its documents come from and which of them count."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator, model_validator
from typing_extensions import Self

from tiny_lm.config import Config, config_dataclass

Split = Literal["train", "validation"]
Errors = Literal["strict", "replace"]

END_OF_TEXT = "<|endoftext|>"
BLANK_LINE = "blank-line"

_Count = Annotated[int, Field(ge=1)]


@config_dataclass
class Splits:
    """The names that a data set gives its splits, or for a local one the files or globs inside its folder."""

    train: str = Field(min_length=1)
    validation: str | None = Field(default=None, min_length=1, description="null: a share of train is held out")


@config_dataclass
class Filters:
    """Which documents count; a bound that is null does not bind. Words are runs of characters between white space."""

    min_chars: _Count | None = None
    max_chars: _Count | None = None
    min_words: _Count | None = None
    max_words: _Count | None = None
    max_documents: _Count | None = Field(default=None, description="the first so many that pass, of each named split")

    @model_validator(mode="after")
    def _check(self) -> Self:
        for unit in ("chars", "words"):
            least, most = getattr(self, f"min_{unit}"), getattr(self, f"max_{unit}")
            if least is not None and most is not None and least > most:
                raise ValueError(f"min_{unit} ({least}) is above max_{unit} ({most}), which no document passes")
        return self


@config_dataclass
class DatasetConfig(Config):
    """One data set: `configs/datasets/*.yaml`.

    For `source: huggingface`, `name` is a data set on the Hub, or a local folder that is laid out like one.
    For `source: local`, it is a file, a folder or a glob; a relative one is relative to the working directory,
    wherever the YAML file lies, and `~` is the home directory. For `source: stories` it means nothing.
    """

    folder: ClassVar[str] = "datasets"

    name: str = Field(min_length=1, description="name on the Hub; for local a file, folder or glob")
    source: Literal["huggingface", "local", "stories"] = "huggingface"
    text_field: str = Field(default="text", min_length=1, description="column or JSON key of the text")
    config_name: str | None = Field(default=None, description="configuration of a Hub data set")
    splits: Splits | None = Field(default=None, description="null: train and validation on the Hub, all of a local one")
    filters: Filters = Field(default_factory=Filters)
    separator: str = Field(default=END_OF_TEXT, description="line between the documents of a .txt file, or blank-line")
    streaming: bool = Field(default=True, description="huggingface: read over the network; false downloads it first")
    revision: str | None = Field(default=None, description="huggingface: branch, tag or commit")
    cache_dir: str | None = Field(default=None, description="huggingface: where downloads are kept")
    num_stories: int = Field(default=20_000, ge=1, le=10**9, description="stories: documents in train")
    num_validation: int = Field(default=500, ge=0, le=10**9, description="stories: documents in validation")
    num_plots: int | None = Field(default=None, ge=1, description="stories: only the first so many plots; null: all")
    seed: int = Field(default=0, ge=0, lt=2**63, description="stories: another seed tells other stories")

    @field_validator("filters", mode="before")
    @classmethod
    def _no_filters(cls, value: object) -> object:
        return {} if value is None else value

    @field_validator("separator")
    @classmethod
    def _one_line(cls, value: str) -> str:
        if not value or value != value.strip() or len(value.splitlines()) != 1:
            raise ValueError("a separator is one line of text without space around it, or blank-line")
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.source != "huggingface":
            for key in ("config_name", "revision", "cache_dir"):
                if getattr(self, key) is not None:
                    raise ValueError(f"{key} belongs to `source: huggingface`, but the source is {self.source}")
        if self.source == "stories" and self.splits is not None:
            raise ValueError("`source: stories` has no named splits; set num_stories and num_validation")
        return self

    def split_name(self, split: Split) -> str | None:
        """Return what the data set itself calls ``split``, or None where it has no name for it."""
        if self.splits is not None:
            return self.splits.train if split == "train" else self.splits.validation
        return split if self.source == "huggingface" else None
