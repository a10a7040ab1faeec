"""Language models: one transformer, four architectures."""

from tiny_lm.model.activation import GELU
from tiny_lm.model.architectures import GPT2, GPT2Block, Llama3, Llama3Block, Qwen3, SmallLM, build_model
from tiny_lm.model.attention import MultiHeadAttention, attend, blocked_attention, reference_attention
from tiny_lm.model.cache import KVCache
from tiny_lm.model.config import (
    FAMILY_NAMES,
    MODEL_CONFIGS,
    GPT2Config,
    Llama3Config,
    ModelConfig,
    Qwen3Config,
    SmallLMConfig,
    flops_per_token,
    load_model_config,
    model_config_from_dict,
    num_parameters,
    parameter_table,
)
from tiny_lm.model.feedforward import FeedForward, SwiGLU
from tiny_lm.model.normalization import LayerNorm, RMSNorm
from tiny_lm.model.position import LearnedPositionalEmbedding, RoPE, apply_rotary_emb
from tiny_lm.model.transformer import Transformer

__all__ = [
    "FAMILY_NAMES",
    "GELU",
    "GPT2",
    "MODEL_CONFIGS",
    "FeedForward",
    "GPT2Block",
    "GPT2Config",
    "KVCache",
    "LayerNorm",
    "LearnedPositionalEmbedding",
    "Llama3",
    "Llama3Block",
    "Llama3Config",
    "ModelConfig",
    "MultiHeadAttention",
    "Qwen3",
    "Qwen3Config",
    "RMSNorm",
    "RoPE",
    "SmallLM",
    "SmallLMConfig",
    "SwiGLU",
    "Transformer",
    "apply_rotary_emb",
    "attend",
    "blocked_attention",
    "build_model",
    "flops_per_token",
    "load_model_config",
    "model_config_from_dict",
    "num_parameters",
    "parameter_table",
    "reference_attention",
]
