"""How much memory training takes, in closed form: nothing is allocated or tried."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from tiny_lm.hardware.device import Device, Precision
from tiny_lm.model.attention import BLOCK as ATTENTION_BLOCK
from tiny_lm.model.config import ModelConfig, block_matrices, num_parameters
from tiny_lm.training.acceleration import prefers_blocked_attention
from tiny_lm.training.config import TrainingConfig


@dataclass(frozen=True)
class MemoryConfig:
    """What determines the memory of training."""

    model: ModelConfig
    training: TrainingConfig
    sequences: int
    """In a micro-batch."""
    block_size: int
    """Tokens in a sequence."""
    device: Device
    precision: Precision
    """Used on ``device``; may differ from the config's."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Peak bytes of tensors in a step; Python, torch itself and fragmentation come on top."""

    parameters: int
    gradients: int
    optimizer: int
    average: int
    """The moving average of the weights."""
    weight_copies: int
    """16-bit copies of matrices, under mixed precision."""
    activations: int
    """Saved by the forward pass for the backward pass, up to the logits."""
    logits: int
    """Log-probabilities, and the gradients with respect to them and the logits."""
    block: int
    """Backward pass of one block; the logits are freed by then."""

    @property
    def total(self) -> int:
        """The peak: all except the smaller of ``logits`` and ``block``, which never coexist."""
        parts: Iterable[int] = vars(self).values()
        return sum(parts) - min(self.logits, self.block)


def estimate_memory(config: MemoryConfig) -> MemoryEstimate:
    """Estimate the memory of training in one process, uncompiled."""
    model, training, block_size = config.model, config.training, config.block_size
    mixed = config.precision != "32-true"
    parameters, hidden = num_parameters(model), model.n_layers * sum(block_matrices(model))
    moments = 2 * parameters - (hidden if training.optimizer == "muon" else 0)  # AdamW has two, Muon has one
    tokens = config.sequences * block_size
    stream = 4 * model.d_model  # the residual stream is float32
    block = _block_activations(model, block_size, device=config.device, mixed=mixed)
    ends = _norm_activations(model, mixed=mixed) + (2 * model.d_model if mixed else 0)
    if model.dropouts.embedding:
        ends += _mask_bytes(config.device, 4) * model.d_model
    copied = hidden
    if training.gradient_checkpointing:  # the input of each block, and the rest of one block at a time
        kept, working, copied = stream, block + 2 * stream, hidden // model.n_layers
    else:
        kept, working = block, 4 * stream
    tables = block_size * 8 * model.head_size if model.position == "rope" else 0  # cosines and sines, for all sequences
    return MemoryEstimate(
        parameters=4 * parameters,
        gradients=4 * parameters,
        optimizer=4 * moments,
        average=4 * parameters if training.ema_decay is not None else 0,
        weight_copies=2 * (copied + model.vocab_size * model.d_model) if mixed else 0,
        activations=tokens * (model.n_layers * kept + ends) + tables,
        logits=tokens * model.vocab_size * 12,  # three times float32; the forward pass takes less
        block=tokens * working,
    )


def _block_activations(model: ModelConfig, block_size: int, *, device: Device, mixed: bool) -> int:
    """Return the bytes per token that one block saves for the backward pass."""
    width = 2 if mixed else 4  # bytes per element of matrix inputs and outputs
    d, ffn = model.d_model, model.ffn_size
    queries, keys = model.n_heads * model.head_size, model.kv_heads * model.head_size
    into_ffn = {"gelu": 1, "swiglu": 2}[model.feed_forward]
    kept = 2 * _norm_activations(model, mixed=mixed)
    if mixed:
        kept += 2 * d * (3 + into_ffn)  # each matrix saves its own 16-bit copy of its input
    if model.qk_norm:
        kept += 2 * 4 * (queries + keys) + 4 * (model.n_heads + model.kv_heads)
    kept += _attention_activations(model, block_size, device=device, width=width)
    # GELU saves input and output; SwiGLU the gate, its SiLU, up, and their product.
    kept += width * ffn * 2 * into_ffn
    if model.dropouts.residual:
        kept += 2 * _mask_bytes(device, width) * d
    return kept


def _norm_activations(model: ModelConfig, *, mixed: bool) -> int:
    """Return the bytes per token that a norm saves: input, statistics, and float32 outputs."""
    if model.norm == "layernorm":
        return 4 * model.d_model * (1 if mixed else 2) + 8
    return 4 * model.d_model * (2 if mixed else 3) + 4


def _attention_activations(model: ModelConfig, block_size: int, *, device: Device, width: int) -> int:
    """Return the bytes per token that attention saves, with its inputs and output."""
    queries, keys = model.n_heads * model.head_size, model.kv_heads * model.head_size
    pairs = model.n_heads * block_size  # attention weights of a token: saved unless the kernel is fused
    dropped = model.dropouts.attention > 0
    if prefers_blocked_attention(device, block_size):
        # q and the output; for each block k and v of each query head; the softmax; its 16-bit copy; the dropout mask.
        # The n-th of N blocks attends to n/N of the keys.
        blocks = math.ceil(block_size / ATTENTION_BLOCK)
        copies = dropped + (dropped or width == 2)
        pairs = pairs * (blocks + 1) // (2 * blocks)
        return width * (2 * queries + (blocks + 1) * queries + copies * pairs) + 4 * pairs
    if dropped and device == "cpu":
        # torch's fused CPU kernel has no dropout: the fallback computes in float32.
        return 4 * (3 * queries + 3 * pairs) + width * queries
    # The output has the layout of q; RoPE creates a new q, so that merging the heads copies the output.
    outputs = 2 if model.position == "rope" else 1
    return width * ((1 + outputs) * queries + 2 * keys) + 4 * model.n_heads


def _mask_bytes(device: Device, width: int) -> int:
    """Return the bytes per element of a dropout mask: a boolean on a GPU, the scale on a CPU."""
    return width if device == "cpu" else 1


# --- savings -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Saving:
    """Settings that lower the estimate, the bytes saved, and the cost."""

    settings: str
    """As ``--set`` takes them."""
    bytes: int
    cost: str


def find_savings(config: MemoryConfig) -> list[Saving]:
    """Return the settings that lower the estimate without changing the global batch, largest saving first."""
    here = estimate_memory(config).total
    found = [
        Saving(settings, here - estimate_memory(changed).total, cost)
        for settings, cost, changed in _alternatives(config)
    ]
    return sorted((saving for saving in found if saving.bytes > 0), key=lambda saving: -saving.bytes)


def _alternatives(config: MemoryConfig) -> Iterator[tuple[str, str, MemoryConfig]]:
    """Yield settings, their cost, and the config with them."""
    model, training = config.model, config.training
    if config.sequences % 2 == 0:
        accumulate = 2 * training.accumulate_grad_batches
        settings = f"data.batch_size={config.sequences // 2} training.accumulate_grad_batches={accumulate}"
        yield settings, "the same steps", replace(config, sequences=config.sequences // 2)
    if not training.gradient_checkpointing:
        changed = replace(training, gradient_checkpointing=True)
        yield "training.gradient_checkpointing=true", "a third more time", replace(config, training=changed)
    if config.precision == "32-true" and config.device == "cuda":
        yield "training.precision=bf16-mixed", "lower precision", replace(config, precision="bf16-mixed")
    if model.dropouts.attention and config.device == "cpu":
        yield "model.attn_dropout=0.0", "a different recipe", replace(config, model=replace(model, attn_dropout=0.0))
