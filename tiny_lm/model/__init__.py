"""Language models: one transformer, four families."""

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
from tiny_lm.model.layers import FeedForward, LayerNorm, LearnedPositionalEmbedding, RMSNorm, RoPE, SwiGLU, rotate
from tiny_lm.model.transformer import GPT2, Llama3, Qwen3, SmallLM, Transformer, build_model

__all__ = [
    "FAMILY_NAMES",
    "GPT2",
    "MODEL_CONFIGS",
    "FeedForward",
    "GPT2Config",
    "KVCache",
    "LayerNorm",
    "LearnedPositionalEmbedding",
    "Llama3",
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
    "attend",
    "blocked_attention",
    "build_model",
    "flops_per_token",
    "load_model_config",
    "model_config_from_dict",
    "num_parameters",
    "parameter_table",
    "reference_attention",
    "rotate",
]
