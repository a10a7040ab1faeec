"""Dataset configs: where documents come from, and filters."""

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
    """The names of a data set's splits; for local data, files or globs inside its folder."""

    train: str = Field(min_length=1)
    validation: str | None = Field(default=None, min_length=1, description="null: hold out a share of train")


@config_dataclass
class Filters:
    """Bounds on documents; null means no bound. Words are separated by white space."""

    min_chars: _Count | None = None
    max_chars: _Count | None = None
    min_words: _Count | None = None
    max_words: _Count | None = None
    max_documents: _Count | None = Field(
        default=None, description="keep at most this many documents of each named split"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        for unit in ("chars", "words"):
            least, most = getattr(self, f"min_{unit}"), getattr(self, f"max_{unit}")
            if least is not None and most is not None and least > most:
                raise ValueError(f"min_{unit} ({least}) is greater than max_{unit} ({most}): no document can pass")
        return self


@config_dataclass
class DatasetConfig(Config):
    """One data set: `configs/datasets/*.yaml`.

    For `source: huggingface`, `name` is a data set on the Hub, or a local folder of the same layout.
    For `source: local`, it is a file, folder or glob, relative to the working directory (not to the YAML file); `~` is
    the home directory. For `source: stories` it has no meaning.
    """

    folder: ClassVar[str] = "datasets"

    name: str = Field(min_length=1, description="name on the Hub; for local a file, folder or glob")
    source: Literal["huggingface", "local", "stories"] = "huggingface"
    text_field: str = Field(default="text", min_length=1, description="column or JSON key of the text")
    config_name: str | None = Field(default=None, description="configuration of a Hub data set")
    splits: Splits | None = Field(default=None, description="null: train and validation on the Hub, all of a local one")
    filters: Filters = Field(default_factory=Filters)
    separator: str = Field(
        default=END_OF_TEXT, description="line that separates documents in .txt files, or blank-line"
    )
    streaming: bool = Field(default=True, description="huggingface: stream over the network; false: download first")
    revision: str | None = Field(default=None, description="huggingface: branch, tag or commit")
    cache_dir: str | None = Field(default=None, description="huggingface: download cache")
    num_stories: int = Field(default=20_000, ge=1, le=10**9, description="stories: documents in train")
    num_validation: int = Field(default=500, ge=0, le=10**9, description="stories: documents in validation")
    num_plots: int | None = Field(default=None, ge=1, description="stories: use only the first N plots; null: all")
    seed: int = Field(default=0, ge=0, lt=2**63, description="stories: random seed")

    @field_validator("filters", mode="before")
    @classmethod
    def _no_filters(cls, value: object) -> object:
        return {} if value is None else value

    @field_validator("separator")
    @classmethod
    def _one_line(cls, value: str) -> str:
        if not value or value != value.strip() or len(value.splitlines()) != 1:
            raise ValueError("separator must be one line of text without surrounding space, or blank-line")
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
        """Return the data set's own name of ``split``, or None."""
        if self.splits is not None:
            return self.splits.train if split == "train" else self.splits.validation
        return split if self.source == "huggingface" else None
