"""Convert model configs to and from Hugging Face's ``config.json``.

| family  | class in transformers    |
|---------|--------------------------|
| gpt2    | ``GPT2LMHeadModel``      |
| llama3  | ``LlamaForCausalLM``     |
| smalllm | ``Starcoder2ForCausalLM``|
| qwen3   | ``Qwen3ForCausalLM``     |

There is one table of keys per family, used in both directions; ``huggingface_weights`` has the tables of tensors.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tiny_lm.config import nearest, shorten
from tiny_lm.errors import UserError
from tiny_lm.model.config import ModelConfig, model_config_from_dict

Dtype = Literal["float32", "float16", "bfloat16"]

ARCHITECTURES = {
    "gpt2": "GPT2LMHeadModel",
    "llama3": "LlamaForCausalLM",
    "smalllm": "Starcoder2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
"""The equivalent class of transformers."""

_MODEL_TYPES = {"gpt2": "gpt2", "llama3": "llama", "smalllm": "starcoder2", "qwen3": "qwen3"}

_REQUIRED = object()


@dataclass(frozen=True)
class ConfigKey:
    """A key of ``config.json`` that corresponds to a field of our config.

    Attributes:
        theirs: the key.
        attribute: attribute of our config with the effective value.
        field: field of our config that takes the value.
        default: the default in transformers.
    """

    theirs: str
    attribute: str
    field: str
    default: Any = _REQUIRED


@dataclass(frozen=True)
class FixedConfigKey:
    """A key of ``config.json`` whose value is fixed by the family.

    Attributes:
        theirs: the key.
        value: the value we write.
        equals: other values with the same meaning.
        default: the default in transformers.
    """

    theirs: str
    value: Any
    equals: tuple[Any, ...] = ()
    default: Any = None


_SHARED_KEYS = (
    ConfigKey("vocab_size", "vocab_size", "vocab_size"),
    ConfigKey("max_position_embeddings", "context_length", "context_length"),
    ConfigKey("hidden_size", "d_model", "d_model"),
    ConfigKey("num_hidden_layers", "n_layers", "n_layers"),
    ConfigKey("num_attention_heads", "n_heads", "n_heads"),
)
_TIED_BY_DEFAULT = ConfigKey("tie_word_embeddings", "tie_word_embeddings", "tie_word_embeddings", default=True)
_SWIGLU_KEYS = (
    *_SHARED_KEYS,
    ConfigKey("intermediate_size", "ffn_size", "ffn_hidden_dim"),
    ConfigKey("num_key_value_heads", "kv_heads", "n_kv_heads", default=None),
    ConfigKey("rms_norm_eps", "norm_eps", "norm_eps", default=1e-6),
    ConfigKey("attention_bias", "qkv_bias", "qkv_bias", default=False),
    dataclasses.replace(_TIED_BY_DEFAULT, default=False),
)
_KEYS: Mapping[str, tuple[ConfigKey, ...]] = {
    "gpt2": (
        ConfigKey("vocab_size", "vocab_size", "vocab_size"),
        ConfigKey("n_positions", "context_length", "context_length"),
        ConfigKey("n_embd", "d_model", "d_model"),
        ConfigKey("n_layer", "n_layers", "n_layers"),
        ConfigKey("n_head", "n_heads", "n_heads"),
        ConfigKey("n_inner", "ffn_size", "d_ff", default=None),
        _TIED_BY_DEFAULT,
    ),
    "smalllm": (*_SHARED_KEYS, ConfigKey("intermediate_size", "ffn_size", "d_ff"), _TIED_BY_DEFAULT),
    "llama3": (*_SWIGLU_KEYS, ConfigKey("mlp_bias", "ffn_bias", "ffn_bias", default=False)),
    "qwen3": (*_SWIGLU_KEYS, ConfigKey("head_dim", "head_size", "head_dim", default=128)),
}
# The tanh form of GELU, under the one name that every engine implements correctly.
_TANH_GELU = ("gelu_pytorch_tanh", ("gelu_new", "gelu_fast"))
_SWIGLU_FIXED = (FixedConfigKey("hidden_act", "silu", ("swish",), default="silu"),)
_FIXED_KEYS: Mapping[str, tuple[FixedConfigKey, ...]] = {
    "gpt2": (
        FixedConfigKey("activation_function", *_TANH_GELU, default="gelu_new"),
        FixedConfigKey("layer_norm_epsilon", 1e-5, default=1e-5),
        FixedConfigKey("scale_attn_weights", True, default=True),
        FixedConfigKey("scale_attn_by_inverse_layer_idx", False, default=False),
        FixedConfigKey("add_cross_attention", False, default=False),
    ),
    "smalllm": (
        FixedConfigKey("hidden_act", *_TANH_GELU, default="gelu_pytorch_tanh"),
        FixedConfigKey("norm_epsilon", 1e-5, default=1e-5),
        FixedConfigKey("use_bias", True, default=True),
        FixedConfigKey("sliding_window", None),
    ),
    "llama3": _SWIGLU_FIXED,
    "qwen3": (*_SWIGLU_FIXED, FixedConfigKey("use_sliding_window", False, default=False)),
}
_DROPOUTS = {
    "gpt2": ("resid_pdrop", "embd_pdrop", "attn_pdrop"),
    "smalllm": ("attention_dropout", "residual_dropout", "embedding_dropout"),
    "llama3": ("attention_dropout",),
    "qwen3": ("attention_dropout",),
}


def to_huggingface_config(
    config: ModelConfig, *, bos_id: int | None, eos_id: int | None, pad_id: int | None, dtype: Dtype = "float32"
) -> dict[str, Any]:
    """Return the ``config.json`` with which transformers builds the equivalent model.

    Both the older and the newer name of a key are written where engines read only one of them: ``dtype`` and
    ``torch_dtype``, ``rope_parameters`` and ``rope_theta``, ``n_positions`` and ``n_ctx``.

    Args:
        config: the config of any family.
        bos_id: beginning-of-sequence token.
        eos_id: end-of-sequence token.
        pad_id: padding token.
        dtype: dtype of the weights.
    """
    family = config.architecture
    content: dict[str, Any] = {"architectures": [ARCHITECTURES[family]], "model_type": _MODEL_TYPES[family]}
    content |= {key.theirs: getattr(config, key.attribute) for key in _KEYS[family]}
    content |= {fixed.theirs: fixed.value for fixed in _FIXED_KEYS[family]}
    content |= dict.fromkeys(_DROPOUTS[family], 0.0)
    if family == "gpt2":
        content["n_ctx"] = config.context_length
    else:
        content |= {
            "num_key_value_heads": config.kv_heads,
            "head_dim": config.head_size,
            "rope_theta": config.rope_theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        }
    ids = {"bos_token_id": bos_id, "eos_token_id": eos_id, "pad_token_id": pad_id}
    return {**content, **ids, "initializer_range": 0.02, "use_cache": True, "dtype": dtype, "torch_dtype": dtype}


def from_huggingface_config(content: Mapping[str, Any], *, source: str = "config.json") -> ModelConfig:
    """Return our config for the model that a ``config.json`` describes.

    Biases that a class always has (q, k and v of GPT-2 and Starcoder2) are enabled; dropout is 0.

    Args:
        content: parsed ``config.json``.
        source: prefix of error messages.

    Raises:
        UserError: the class or one of its options is not supported.
    """
    family = _family(content, source)
    for fixed in _FIXED_KEYS[family]:
        value = content.get(fixed.theirs, fixed.default)
        if value not in (fixed.value, *fixed.equals):
            raise UserError(f"{source}: {fixed.theirs} is {shorten(value)}, but {family} only supports {fixed.value!r}")
    kinds = content.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise UserError(f"{source}: layer_types is {shorten(kinds)}, but only full_attention is supported")
    if content.get("quantization_config"):
        raise UserError(f"{source}: the weights are quantized; export or download the model without quantization")
    values: dict[str, Any] = {"architecture": family}
    for key in _KEYS[family]:
        value = content.get(key.theirs, key.default)
        if value is _REQUIRED:
            raise UserError(f"{source}: the key {key.theirs!r} is missing")
        values[key.field] = value
    if family in ("gpt2", "smalllm"):
        values["qkv_bias"] = True
    theta = 10_000.0 if family == "gpt2" else _rope_theta(content, source)
    if family in ("llama3", "qwen3"):
        values["rope_theta"] = theta
    config = model_config_from_dict(values, source=source)
    _check_redundant_keys(config, content, theta, source)
    return config


def _family(content: Mapping[str, Any], source: str) -> str:
    classes = content.get("architectures")
    name = classes[0] if isinstance(classes, list) and classes else content.get("model_type")
    for family, known in ARCHITECTURES.items():
        if name in (known, _MODEL_TYPES[family]):
            return family
    hint = nearest(str(name), ARCHITECTURES.values())
    raise UserError(f"{source}: unsupported class {shorten(name)}{hint}")


def _rope_theta(content: Mapping[str, Any], source: str) -> float:
    """Return the base of the rotary wavelengths, which transformers 5 keeps in ``rope_parameters``."""
    parameters = content.get("rope_parameters") or content.get("rope_scaling") or {}
    if not isinstance(parameters, dict):
        raise UserError(f"{source}: rope_parameters is {shorten(parameters)}, not a mapping")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind != "default" or parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"{source}: scaled or partial rotary positions are not supported ({shorten(parameters)})")
    theta: float = parameters.get("rope_theta", content.get("rope_theta", 10_000.0))
    return theta


def _check_redundant_keys(config: ModelConfig, content: Mapping[str, Any], theta: float, source: str) -> None:
    """Check the keys that are redundant in our families."""
    expected: list[tuple[str, Any, Any]] = []
    if config.architecture == "smalllm":
        expected.append(("num_key_value_heads", config.n_heads, content.get("num_key_value_heads", 2)))
        expected.append(("rope_theta", config.rope_theta, theta))
    if config.architecture in ("llama3", "smalllm") and content.get("head_dim") is not None:
        expected.append(("head_dim", config.head_size, content["head_dim"]))
    for key, ours, theirs in expected:
        if ours != theirs:
            raise UserError(f"{source}: {key} is {shorten(theirs)}, but {config.architecture} requires {ours}")
