"""The training config: optimizer, schedule, precision, and intervals of validation and saving."""

from typing import ClassVar, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from tiny_lm.config import Config, config_dataclass


@config_dataclass
class TrainingConfig(Config):
    """A training run; steps are optimizer steps, whatever the accumulation."""

    folder: ClassVar[str] = "training"

    max_steps: int = Field(ge=1, le=10**9, description="optimizer steps")
    optimizer: Literal["adamw", "muon"] = Field(
        default="adamw", description="muon: on hidden matrices, AdamW on the rest"
    )
    learning_rate: float = Field(gt=0, le=10, description="peak, reached after the warm-up")
    min_lr: float = Field(default=0.0, ge=0, description="learning rate at the last step")
    scheduler: Literal["cosine", "wsd", "linear", "constant", "none"] = Field(
        default="cosine",
        description="what follows the warm-up; wsd holds the peak and then decays linearly (warm-up, stable, decay), "
        "constant and none hold the peak, none without warm-up",
    )
    warmup_ratio: float = Field(default=0.01, ge=0, le=1, description="fraction of max_steps with a rising rate")
    decay_ratio: float = Field(
        default=0.65, gt=0, le=1, description="wsd only: fraction of max_steps with a falling rate"
    )
    weight_decay: float = Field(default=0.1, ge=0, description="of matrices and embeddings; never of norms and biases")
    embedding_learning_rate: float | None = Field(
        default=None, gt=0, le=10, description="peak for the embeddings, on the same schedule; null: the same"
    )
    embedding_weight_decay: float | None = Field(
        default=None, ge=0, description="of the embeddings; null: that of the matrices"
    )
    weight_decay_schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant", description="linear and cosine decay to 0 over the run"
    )
    ema_decay: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="validate, save and sample with a moving average of the weights of this decay; null: none",
    )
    muon_momentum: float = Field(default=0.95, ge=0, lt=1, description="of Muon's averaged gradient (Nesterov)")
    betas: tuple[float, float] = Field(default=(0.9, 0.95), description="of AdamW")
    eps: float = Field(default=1e-8, gt=0)
    grad_clip_norm: float = Field(default=1.0, ge=0, description="global norm; 0: no clipping")
    accumulate_grad_batches: int = Field(default=1, ge=1, le=2**20, description="micro-batches in a step")
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "bf16-mixed"
    ignore_index: int = Field(default=-100, ge=-(2**31), le=-1, description="target that is ignored in the loss")
    val_every_n_steps: int = Field(default=100, ge=1)
    val_max_tokens: int | None = Field(
        default=None,
        ge=1,
        description="validate on this many tokens, but on all after the last step; null: always all",
    )
    save_every_n_steps: int = Field(default=100, ge=1)
    keep_checkpoints: int = Field(
        default=3, ge=1, description="number of step-*.ckpt files to keep; best and last are always kept"
    )
    log_every_n_steps: int = Field(default=10, ge=1)
    system_metrics_every_n_steps: int = Field(default=50, ge=1, description="memory, CPU and GPU load")
    resume_from_checkpoint: str | None = Field(
        default=None, description="a checkpoint, a run folder, or auto: this run's newest checkpoint, if any"
    )
    init_from: str | None = Field(
        default=None,
        min_length=1,
        description="a run folder, checkpoint or Hugging Face folder with the initial weights of a new run",
    )
    run_name: str | None = Field(
        default=None, pattern=r"^[\w][\w.-]*$", max_length=128, description="null: <model>-<data>-<UTC time>"
    )
    seed: int = Field(default=0, ge=0, lt=2**32)
    spike_threshold: float | None = Field(
        default=None,
        gt=0,
        description="stop when the loss of a step is this many nats above the median of previous steps (at "
        "first, above their highest); null: only warn",
    )
    sample_prompts: tuple[str, ...] = Field(
        default=("Once upon a time",), max_length=16, description="prompts that each validation completes"
    )
    sample_tokens: int = Field(default=120, ge=0, le=4096, description="tokens of each sample; 0: no samples")
    trackers: tuple[Literal["jsonl", "trackio", "wandb", "tensorboard"], ...] = Field(
        default=("jsonl",),
        description="loggers besides metrics.jsonl, which is always written",
    )
    compile: Literal["auto"] | bool = Field(
        default="auto", description="torch.compile the model; auto: if the run is long enough to make up for compiling"
    )
    gradient_checkpointing: bool = Field(default=False, description="less memory for about a third more time")
    devices: int | Literal["auto"] = Field(default=1, description="processes on each node; auto: all GPUs")
    num_nodes: int = Field(default=1, ge=1, le=1024)
    strategy: Literal["auto", "ddp", "fsdp"] = Field(
        default="auto", description="how ranks work together; auto: ddp with several"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min_lr > self.learning_rate:
            raise ValueError(f"min_lr {self.min_lr} is above learning_rate {self.learning_rate}")
        if self.devices != "auto" and not 1 <= self.devices <= 1024:
            raise ValueError(f"devices {self.devices} must be auto or lie in [1, 1024]")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas {self.betas} must lie in [0, 1)")
        return self
