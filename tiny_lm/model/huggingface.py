"""The four families as Hugging Face's ``config.json`` describes them, in both directions.

| family  | class in transformers    |
|---------|--------------------------|
| gpt2    | ``GPT2LMHeadModel``      |
| llama3  | ``LlamaForCausalLM``     |
| smalllm | ``Starcoder2ForCausalLM``|
| qwen3   | ``Qwen3ForCausalLM``     |

There is one table of keys per family, read both ways; ``huggingface_weights`` has the tables of tensors.
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
"""The class of transformers that computes what a family computes."""

_MODEL_TYPES = {"gpt2": "gpt2", "llama3": "llama", "smalllm": "starcoder2", "qwen3": "qwen3"}

_REQUIRED = object()


@dataclass(frozen=True)
class Key:
    """A key of ``config.json`` that says what one of our fields says.

    Attributes:
        theirs: the key.
        attribute: attribute of our config with the value in force.
        field: field of our config that takes the value.
        default: what transformers takes where the key is absent.
    """

    theirs: str
    attribute: str
    field: str
    default: Any = _REQUIRED


@dataclass(frozen=True)
class Fact:
    """A key of ``config.json`` whose value our family fixes.

    Attributes:
        theirs: the key.
        value: what we write.
        equals: further values that mean the same.
        default: what transformers takes where the key is absent.
    """

    theirs: str
    value: Any
    equals: tuple[Any, ...] = ()
    default: Any = None


_SHARED_KEYS = (
    Key("vocab_size", "vocab_size", "vocab_size"),
    Key("max_position_embeddings", "context_length", "context_length"),
    Key("hidden_size", "d_model", "d_model"),
    Key("num_hidden_layers", "n_layers", "n_layers"),
    Key("num_attention_heads", "n_heads", "n_heads"),
)
_TIED_BY_DEFAULT = Key("tie_word_embeddings", "tie_word_embeddings", "tie_word_embeddings", default=True)
_SWIGLU_KEYS = (
    *_SHARED_KEYS,
    Key("intermediate_size", "ffn_size", "ffn_hidden_dim"),
    Key("num_key_value_heads", "kv_heads", "n_kv_heads", default=None),
    Key("rms_norm_eps", "norm_eps", "norm_eps", default=1e-6),
    Key("attention_bias", "qkv_bias", "qkv_bias", default=False),
    dataclasses.replace(_TIED_BY_DEFAULT, default=False),
)
_KEYS: Mapping[str, tuple[Key, ...]] = {
    "gpt2": (
        Key("vocab_size", "vocab_size", "vocab_size"),
        Key("n_positions", "context_length", "context_length"),
        Key("n_embd", "d_model", "d_model"),
        Key("n_layer", "n_layers", "n_layers"),
        Key("n_head", "n_heads", "n_heads"),
        Key("n_inner", "ffn_size", "d_ff", default=None),
        _TIED_BY_DEFAULT,
    ),
    "smalllm": (*_SHARED_KEYS, Key("intermediate_size", "ffn_size", "d_ff"), _TIED_BY_DEFAULT),
    "llama3": (*_SWIGLU_KEYS, Key("mlp_bias", "ffn_bias", "ffn_bias", default=False)),
    "qwen3": (*_SWIGLU_KEYS, Key("head_dim", "head_size", "head_dim", default=128)),
}
# The tanh form of GELU under the one name that every engine computes as such.
_TANH_GELU = ("gelu_pytorch_tanh", ("gelu_new", "gelu_fast"))
_SWIGLU_FACTS = (Fact("hidden_act", "silu", ("swish",), default="silu"),)
_FACTS: Mapping[str, tuple[Fact, ...]] = {
    "gpt2": (
        Fact("activation_function", *_TANH_GELU, default="gelu_new"),
        Fact("layer_norm_epsilon", 1e-5, default=1e-5),
        Fact("scale_attn_weights", True, default=True),
        Fact("scale_attn_by_inverse_layer_idx", False, default=False),
        Fact("add_cross_attention", False, default=False),
    ),
    "smalllm": (
        Fact("hidden_act", *_TANH_GELU, default="gelu_pytorch_tanh"),
        Fact("norm_epsilon", 1e-5, default=1e-5),
        Fact("use_bias", True, default=True),
        Fact("sliding_window", None),
    ),
    "llama3": _SWIGLU_FACTS,
    "qwen3": (*_SWIGLU_FACTS, Fact("use_sliding_window", False, default=False)),
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
    """Return the content of the ``config.json`` that makes transformers build our model.

    Older and newer names of a thing stand side by side where engines read only one of them: ``dtype`` and
    ``torch_dtype``, ``rope_parameters`` and ``rope_theta``, ``n_positions`` and ``n_ctx``.

    Args:
        config: the config of any family.
        bos_id: token that begins a text.
        eos_id: token that ends one.
        pad_id: token that fills a batch.
        dtype: of the weights beside it.
    """
    family = config.architecture
    content: dict[str, Any] = {"architectures": [ARCHITECTURES[family]], "model_type": _MODEL_TYPES[family]}
    content |= {key.theirs: getattr(config, key.attribute) for key in _KEYS[family]}
    content |= {fact.theirs: fact.value for fact in _FACTS[family]}
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
    """Return the config of our model that computes what a ``config.json`` describes.

    Biases that a class always has (q, k and v of GPT-2 and Starcoder2) are there in ours too; dropout is 0.

    Args:
        content: a ``config.json``.
        source: what an error names as the place.

    Raises:
        UserError: it is of another class, or has a part that our families do not have.
    """
    family = _family(content, source)
    for fact in _FACTS[family]:
        value = content.get(fact.theirs, fact.default)
        if value not in (fact.value, *fact.equals):
            raise UserError(f"{source}: {fact.theirs} is {shorten(value)}, but our {family} has {fact.value!r} only")
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
    _check_rest(config, content, theta, source)
    return config


def _family(content: Mapping[str, Any], source: str) -> str:
    classes = content.get("architectures")
    name = classes[0] if isinstance(classes, list) and classes else content.get("model_type")
    for family, known in ARCHITECTURES.items():
        if name in (known, _MODEL_TYPES[family]):
            return family
    hint = nearest(str(name), ARCHITECTURES.values())
    raise UserError(f"{source}: {shorten(name)} is no class that tiny-lm has{hint}")


def _rope_theta(content: Mapping[str, Any], source: str) -> float:
    """Return the base of the rotary wavelengths; transformers 5 keeps it in ``rope_parameters``."""
    parameters = content.get("rope_parameters") or content.get("rope_scaling") or {}
    if not isinstance(parameters, dict):
        raise UserError(f"{source}: rope_parameters is {shorten(parameters)}, no mapping")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind != "default" or parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"{source}: scales or shortens its rotary positions ({shorten(parameters)}), which ours do not")
    theta: float = parameters.get("rope_theta", content.get("rope_theta", 10_000.0))
    return theta


def _check_rest(config: ModelConfig, content: Mapping[str, Any], theta: float, source: str) -> None:
    """Check the keys that say again what follows from others in our families."""
    expected: list[tuple[str, Any, Any]] = []
    if config.architecture == "smalllm":
        expected.append(("num_key_value_heads", config.n_heads, content.get("num_key_value_heads", 2)))
        expected.append(("rope_theta", config.rope_theta, theta))
    if config.architecture in ("llama3", "smalllm") and content.get("head_dim") is not None:
        expected.append(("head_dim", config.head_size, content["head_dim"]))
    for key, ours, theirs in expected:
        if ours != theirs:
            raise UserError(f"{source}: {key} is {shorten(theirs)}, but our {config.architecture} has {ours} here")
