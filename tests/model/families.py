"""One small config per family, and one with grouped heads, for the tests of this room."""

from tiny_lm.model import build_model, model_config_from_dict

SHAPE = {"vocab_size": 61, "context_length": 24, "d_model": 32, "n_layers": 2, "n_heads": 4}
FAMILIES = {
    "gpt2": {"architecture": "gpt2"},
    "smalllm": {"architecture": "smalllm"},
    "llama3": {"architecture": "llama3", "n_kv_heads": 2, "multiple_of": 16},
    "llama3, MQA": {"architecture": "llama3", "n_kv_heads": 1, "multiple_of": 16},
    "qwen3": {"architecture": "qwen3", "n_kv_heads": 2, "head_dim": 16, "multiple_of": 16},
}


def family_config(family, **changes):
    return model_config_from_dict({**SHAPE, **FAMILIES[family], **changes})


def family_model(family, **changes):
    return build_model(family_config(family, **changes))
