"""The four families compute what the models of transformers compute, weights converted in either direction."""

import pytest
import torch
from reference import randomize, reference_model

from tiny_lm.model import build_model, model_config_from_dict
from tiny_lm.model.huggingface_weights import from_huggingface_state, to_huggingface_state

SHAPE = {"vocab_size": 97, "context_length": 48, "d_model": 48, "n_layers": 3, "n_heads": 4}

CASES = {
    "gpt2": {"architecture": "gpt2"},
    "gpt2, qkv_bias, own d_ff": {"architecture": "gpt2", "qkv_bias": True, "d_ff": 100},
    "gpt2, one head": {"architecture": "gpt2", "n_heads": 1, "n_layers": 1},
    "smalllm": {"architecture": "smalllm"},
    "smalllm, no qkv_bias": {"architecture": "smalllm", "qkv_bias": False, "d_ff": 36, "n_heads": 6},
    "llama3, MHA": {"architecture": "llama3", "multiple_of": 32},
    "llama3, GQA": {"architecture": "llama3", "n_kv_heads": 2, "ffn_hidden_dim": 130, "norm_eps": 1e-5},
    "llama3, MQA, theta": {"architecture": "llama3", "n_kv_heads": 1, "rope_theta": 500000.0},
    "llama3, biases": {"architecture": "llama3", "n_kv_heads": 2, "qkv_bias": True, "ffn_bias": True},
    "qwen3, GQA": {"architecture": "qwen3", "n_kv_heads": 2},
    "qwen3, MQA, head_dim": {"architecture": "qwen3", "n_kv_heads": 1, "head_dim": 32, "d_model": 40, "n_heads": 6},
    "qwen3, MHA, qkv_bias": {"architecture": "qwen3", "qkv_bias": True, "multiple_of": 8},
}
BATCHES = [(1, 1), (2, 7), (3, 48)]


def logits(model, ids):
    with torch.no_grad():
        result = model(ids)
    return getattr(result, "logits", result)


def load_tied(model, state):
    """Load a state dict that has all but the head."""
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])


def assert_same_logits(ours, theirs, vocab_size):
    generator = torch.Generator().manual_seed(1)
    for batch in BATCHES:
        ids = torch.randint(vocab_size, batch, generator=generator)
        expected = logits(theirs, ids)
        assert expected.std() > 0.1, "the weights are too small for this comparison to mean anything"
        torch.testing.assert_close(logits(ours, ids), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_our_weights_in_their_model(case):
    config = model_config_from_dict({**SHAPE, **CASES[case]})
    ours, theirs = build_model(config).eval(), reference_model(config)
    randomize(ours, seed=0)
    load_tied(theirs, to_huggingface_state(config, ours.state_dict()))
    assert_same_logits(ours, theirs, config.vocab_size)


@pytest.mark.parametrize("case", CASES)
def test_their_weights_in_our_model(case):
    config = model_config_from_dict({**SHAPE, **CASES[case]})
    ours, theirs = build_model(config).eval(), reference_model(config)
    randomize(theirs, seed=2)
    state = theirs.state_dict()
    for name in set(state) & set(biases_without_a_place(config)):
        state[name].zero_()
    ours.load_state_dict(from_huggingface_state(config, state), strict=True)
    assert_same_logits(ours, theirs, config.vocab_size)


def biases_without_a_place(config):
    """Name the biases that their class cannot leave out and our config does not have."""
    projections = ["o_proj"] if not config.out_bias else []
    projections += ["q_proj", "k_proj", "v_proj", "c_attn"] if not config.qkv_bias else []
    prefix = "transformer.h.{}.attn" if config.architecture == "gpt2" else "model.layers.{}.self_attn"
    return [f"{prefix.format(i)}.{name}.bias" for i in range(config.n_layers) for name in projections]


@pytest.mark.parametrize("case", ["gpt2, qkv_bias, own d_ff", "smalllm", "llama3, biases", "qwen3, GQA"])
def test_conversion_and_back_is_the_identity(case):
    config = model_config_from_dict({**SHAPE, **CASES[case]})
    ours = build_model(config)
    randomize(ours, seed=3)
    state = ours.state_dict()
    back = from_huggingface_state(config, to_huggingface_state(config, state))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_the_comparison_notices_a_wrong_tensor():
    config = model_config_from_dict({**SHAPE, **CASES["qwen3, GQA"]})
    ours, theirs = build_model(config).eval(), reference_model(config)
    randomize(ours, seed=0)
    load_tied(theirs, to_huggingface_state(config, ours.state_dict()))
    for name in ("blocks.1.attn.k_norm.weight", "blocks.2.ffn.w1.weight", "final_norm.weight"):
        tensor = ours.state_dict()[name]
        tensor.mul_(1.5)
        with pytest.raises(AssertionError):
            assert_same_logits(ours, theirs, config.vocab_size)
        tensor.div_(1.5)
    assert_same_logits(ours, theirs, config.vocab_size)
