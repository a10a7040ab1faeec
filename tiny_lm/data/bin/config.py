"""Which token streams to train on, and how sequences and batches are cut from them."""

from typing import ClassVar, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from tiny_lm.config import Config, config_dataclass


@config_dataclass
class BinDataConfig(Config):
    """Sequences and batches of a token stream."""

    folder: ClassVar[str] = "data"

    train_path: str = Field(description="train.bin, or a glob of shards")
    val_path: str = Field(description="val.bin, or a glob of shards")
    block_size: int = Field(ge=1, le=2**20, description="tokens in a sequence; at most the model's context_length")
    stride: int | None = Field(
        default=None, ge=1, description="tokens from the start of one training sequence to the next; null: block_size"
    )
    dtype: Literal["uint16", "uint32"] | None = Field(default=None, description="null: from metadata.json")
    eos_token_id: int | None = Field(default=None, ge=0, description="null: from metadata.json")
    batch_size: int = Field(ge=1, le=2**20, description="sequences in a micro-batch")
    num_workers: int = Field(default=0, ge=0, le=256, description="data loader workers, with a GPU only")
    pin_memory: bool = Field(default=False, description="page-locked batches; only where there is a GPU")
    drop_last: bool = Field(
        default=True,
        description="drop sequences at the end of an epoch that do not fill a batch; false: the next epoch fills it",
    )
    mask_after_eos: bool = Field(
        default=False, description="ignore targets after a sequence's first eos; only for streams of padded documents"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.stride is not None and self.stride > self.block_size:
            raise ValueError(
                f"stride {self.stride} is above block_size {self.block_size}: tokens in between would be skipped"
            )
        return self

    @property
    def training_stride(self) -> int:
        """Tokens from the start of one training sequence to the next."""
        return self.stride or self.block_size
