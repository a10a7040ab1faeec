"""Model configs: one class per family, and parameter counts in closed form.

A config names the parts of its family (``position``, ``norm``, ``feed_forward``, ``qk_norm``, the biases), from which
:class:`~tiny_lm.model.transformer.Transformer` is built.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, cast

from pydantic import Field, model_validator
from typing_extensions import Self

from tiny_lm.config import Config, config_dataclass, find_config, name_source, nearest, override, read_yaml, shorten
from tiny_lm.errors import UserError

PARAMETER_LIMIT = 20_000_000_000

_Width = Annotated[int, Field(ge=1, le=2**18)]
_Heads = Annotated[int, Field(ge=1, le=2**12)]
_Probability = Annotated[float, Field(ge=0, lt=1)]


class Dropouts(NamedTuple):
    """Dropout probabilities."""

    embedding: float
    attention: float
    residual: float


@config_dataclass
class _TransformerConfig(Config):
    """Keys shared by all families."""

    folder: ClassVar[str] = "models"
    position: ClassVar[Literal["learned", "rope"]]
    norm: ClassVar[Literal["layernorm", "rmsnorm"]]
    feed_forward: ClassVar[Literal["gelu", "swiglu"]]
    qk_norm: ClassVar[bool] = False  # RMSNorm over each head of q and k
    out_bias: ClassVar[bool]  # bias on the attention's output projection

    architecture: Literal["gpt2", "llama3", "smalllm", "qwen3"]
    vocab_size: int = Field(ge=1, le=2**22, description="number of token ids, including special tokens")
    context_length: int = Field(ge=1, le=2**20, description="maximum number of tokens the model attends over")
    d_model: _Width = Field(description="width of the residual stream")
    n_layers: int = Field(ge=1, le=2**10, description="number of blocks")
    n_heads: _Heads = Field(description="number of query heads")
    dropout: _Probability = Field(default=0.0, description="default of the three dropouts below")
    emb_dropout: _Probability | None = Field(default=None, description="dropout after the embeddings")
    attn_dropout: _Probability | None = Field(default=None, description="dropout on the attention weights")
    resid_dropout: _Probability | None = Field(
        default=None, description="dropout on the output of attention and feed-forward"
    )
    qkv_bias: bool = Field(default=False, description="biases on the query, key and value projections")
    tie_word_embeddings: bool = Field(
        default=True, description="share the token embedding with the output head; false: a separate matrix"
    )
    residual_init: Literal["scaled", "zero"] = Field(
        default="scaled",
        description="initial weights of the residual projections: GPT-2's 0.02 / sqrt(2 n_layers), or zero",
    )

    @property
    def dropouts(self) -> Dropouts:
        """The three dropout probabilities; ``dropout`` is the default of those that are null."""
        given = (self.emb_dropout, self.attn_dropout, self.resid_dropout)
        return Dropouts(*(self.dropout if value is None else value for value in given))

    @property
    def head_size(self) -> int:
        """Size of an attention head."""
        return self.d_model // self.n_heads

    @property
    def kv_heads(self) -> int:
        """Number of key-value heads."""
        return self.n_heads

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_sizes(cast("ModelConfig", self))
        return self


@config_dataclass
class _GELUConfig(_TransformerConfig):
    """Families with LayerNorm, a GELU feed-forward and biases."""

    norm: ClassVar[Literal["layernorm", "rmsnorm"]] = "layernorm"
    feed_forward: ClassVar[Literal["gelu", "swiglu"]] = "gelu"
    out_bias: ClassVar[bool] = True
    ffn_bias: ClassVar[bool] = True
    norm_eps: ClassVar[float] = 1e-5
    rope_theta: ClassVar[float] = 10_000.0

    d_ff: _Width | None = Field(default=None, description="width of the feed-forward; null: 4 x d_model")

    @property
    def ffn_size(self) -> int:
        """Hidden size of the feed-forward."""
        return 4 * self.d_model if self.d_ff is None else self.d_ff


@config_dataclass
class GPT2Config(_GELUConfig):
    """GPT-2: learned positions, LayerNorm, GELU, biases everywhere but on q, k and v, where they are optional."""

    position: ClassVar[Literal["learned", "rope"]] = "learned"

    architecture: Literal["gpt2"] = "gpt2"


@config_dataclass
class SmallLMConfig(_GELUConfig):
    """SmallLM: GPT-2 with rotary positions and biases everywhere (the shape of Starcoder2 with full heads)."""

    position: ClassVar[Literal["learned", "rope"]] = "rope"

    architecture: Literal["smalllm"] = "smalllm"
    qkv_bias: bool = Field(default=True, description="biases on the query, key and value projections")


@config_dataclass
class _SwiGLUConfig(_TransformerConfig):
    """Families with rotary positions, RMSNorm, SwiGLU and grouped-query attention."""

    position: ClassVar[Literal["learned", "rope"]] = "rope"
    norm: ClassVar[Literal["layernorm", "rmsnorm"]] = "rmsnorm"
    feed_forward: ClassVar[Literal["gelu", "swiglu"]] = "swiglu"
    out_bias: ClassVar[bool] = False

    n_kv_heads: _Heads | None = Field(default=None, description="number of key-value heads; null: n_heads")
    ffn_hidden_dim: _Width | None = Field(
        default=None, description="width of the feed-forward; null: 2/3 x 4 x d_model, rounded up to multiple_of"
    )
    multiple_of: _Width = Field(default=256, description="round a computed ffn_hidden_dim up to a multiple of this")
    rope_theta: float = Field(default=10_000.0, gt=1, le=1e12, description="base of the rotary wavelengths")
    norm_eps: float = Field(default=1e-6, gt=0, le=0.1, description="epsilon of the RMSNorms")

    @property
    def kv_heads(self) -> int:
        """Number of key-value heads."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def ffn_size(self) -> int:
        """Hidden size of the feed-forward."""
        if self.ffn_hidden_dim is not None:
            return self.ffn_hidden_dim
        return -(-(8 * self.d_model // 3) // self.multiple_of) * self.multiple_of


@config_dataclass
class Llama3Config(_SwiGLUConfig):
    """Llama 3: rotary positions, RMSNorm, SwiGLU, grouped-query attention, optional biases."""

    architecture: Literal["llama3"] = "llama3"
    ffn_bias: bool = Field(default=False, description="biases in the feed-forward")


@config_dataclass
class Qwen3Config(_SwiGLUConfig):
    """Qwen3: Llama 3 with an RMSNorm over each head of q and k, and an independent head size."""

    qk_norm: ClassVar[bool] = True

    architecture: Literal["qwen3"] = "qwen3"
    # Accepted so that changing `architecture` alone turns a Llama 3 config into a Qwen3 config.
    ffn_bias: Literal[False] = Field(default=False, description="always false: Qwen3ForCausalLM has no such biases")
    head_dim: Annotated[int, Field(ge=1, le=2**12)] | None = Field(
        default=None, description="size of an attention head; null: d_model / n_heads"
    )

    @property
    def head_size(self) -> int:
        """Size of an attention head."""
        return self.d_model // self.n_heads if self.head_dim is None else self.head_dim


ModelConfig = GPT2Config | Llama3Config | SmallLMConfig | Qwen3Config

MODEL_CONFIGS: Mapping[str, type[ModelConfig]] = {
    "gpt2": GPT2Config,
    "llama3": Llama3Config,
    "smalllm": SmallLMConfig,
    "qwen3": Qwen3Config,
}
FAMILY_NAMES: Mapping[str, str] = {"gpt2": "GPT-2", "llama3": "Llama 3", "smalllm": "SmallLM", "qwen3": "Qwen3"}
"""Display names."""


def _check_sizes(config: ModelConfig) -> None:
    """Raise ValueError if sizes are inconsistent."""
    head_size_is_given = config.architecture == "qwen3" and config.head_dim is not None
    if not head_size_is_given and config.d_model % config.n_heads:
        raise ValueError(f"d_model {config.d_model} is not divisible by n_heads {config.n_heads}")
    if config.n_heads % config.kv_heads:
        raise ValueError(f"n_heads {config.n_heads} is not divisible by n_kv_heads {config.kv_heads}")
    if config.position == "rope" and config.head_size % 2:
        raise ValueError(
            f"the head size is {config.head_size} (d_model {config.d_model}, n_heads {config.n_heads}), "
            "but rotary positions need an even one"
        )
    if num_parameters(config) > PARAMETER_LIMIT:
        raise ValueError(
            f"these sizes make {num_parameters(config):,} parameters; the limit is {PARAMETER_LIMIT:,}",
        )


# --- loading ---------------------------------------------------------------------------------------------------------


def load_model_config(path: str | Path, overrides: Mapping[str, Any] | None = None) -> ModelConfig:
    """Load a model config of any family.

    Args:
        path: a YAML file, or the name of a shipped config such as ``gpt2-8k-2l``. Its key ``architecture`` names the
            family; the default is ``gpt2``.
        overrides: values by key that take precedence over the file.

    Raises:
        UserError: the file is missing or is not a valid model config.
    """
    file = find_config("models", path)
    values = override(read_yaml(file), overrides or {})
    return model_config_from_dict(values, source=name_source(file, overrides))


def model_config_from_dict(values: Mapping[str, Any], *, source: str = "config") -> ModelConfig:
    """Build the config of the family ``values["architecture"]``; the default is ``gpt2``.

    Args:
        values: plain values by key, as :meth:`Config.to_dict` returns them.
        source: prefix of error messages.

    Raises:
        UserError: the family is unknown or a value is invalid.
    """
    architecture = values.get("architecture", "gpt2")
    kind = MODEL_CONFIGS.get(architecture) if isinstance(architecture, str) else None
    if kind is None:
        hint = nearest(str(architecture), MODEL_CONFIGS)
        raise UserError(f"{source}: architecture: unknown model family {shorten(architecture)}{hint}")
    if "architecture" not in values and "n_kv_heads" in values:
        raise UserError(
            f"{source}: has the key 'n_kv_heads', which GPT-2 does not; add the line 'architecture: llama3'"
        )
    return kind.from_dict(values, source=source)


# --- counting --------------------------------------------------------------------------------------------------------


_INTO_FFN = {"gelu": 1, "swiglu": 2}
"""Input matrices of a feed-forward; there is one output matrix besides."""


def block_matrices(config: ModelConfig) -> tuple[int, int]:
    """Return the number of weights in one block's matrices: (attention, feed-forward)."""
    heads = 2 * config.n_heads + 2 * config.kv_heads  # of q and the output, of k and v
    attention = config.d_model * heads * config.head_size
    return attention, (_INTO_FFN[config.feed_forward] + 1) * config.d_model * config.ffn_size


def parameter_table(config: ModelConfig) -> dict[str, int]:
    """Count the parameters of each part, in closed form.

    Returns:
        counts by ``embedding``, ``positions``, ``attention``, ``feed-forward``, ``norms`` and ``head``; a tied head
        counts 0. The sum is the model's actual number of parameters.
    """
    d, ffn, layers = config.d_model, config.ffn_size, config.n_layers
    queries, keys = config.n_heads * config.head_size, config.kv_heads * config.head_size
    attention, feed_forward = block_matrices(config)
    attention += config.qkv_bias * (queries + 2 * keys) + config.out_bias * d
    feed_forward += config.ffn_bias * (_INTO_FFN[config.feed_forward] * ffn + d)
    norm = {"layernorm": 2, "rmsnorm": 1}[config.norm] * d
    head_norms = 2 * config.head_size * config.qk_norm
    return {
        "embedding": config.vocab_size * d,
        "positions": config.context_length * d if config.position == "learned" else 0,
        "attention": layers * attention,
        "feed-forward": layers * feed_forward,
        "norms": layers * (2 * norm + head_norms) + norm,
        "head": 0 if config.tie_word_embeddings else config.vocab_size * d,
    }


def num_parameters(config: ModelConfig) -> int:
    """Return the number of parameters; a tied head is not counted again."""
    return sum(parameter_table(config).values())


def flops_per_token(config: ModelConfig, length: int) -> int:
    """Return the floating-point operations per training token, in closed form.

    ``6 N + 12 L H K T``, as PaLM counts for its model FLOPs utilization (Chowdhery et al. 2022, arXiv:2204.02311,
    appendix B): 2 for each weight that multiplies the token in the forward pass and 4 in the backward pass, and the
    same for the products of queries with keys and of weights with values. N are the weights of all matrices, including
    the head but not the embedding, which is a look-up. Attention counts all T x T pairs, as is usual, though a causal
    kernel may skip half of them; recomputation by gradient checkpointing is not counted.

    Args:
        config: the config of any family.
        length: number of tokens T in a training sequence.
    """
    matrices = config.n_layers * sum(block_matrices(config)) + config.vocab_size * config.d_model
    return 6 * matrices + 12 * config.n_layers * config.n_heads * config.head_size * length
