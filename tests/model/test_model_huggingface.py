"""Folders in Hugging Face's layout: real ones that transformers wrote, and broken ones."""

import json
from pathlib import Path

import pytest
import torch
from reference import randomize, reference_model
from safetensors.torch import load_file, save_file

from tiny_lm.errors import UserError
from tiny_lm.model import build_model, model_config_from_dict, num_parameters
from tiny_lm.model.huggingface import from_huggingface_config, to_huggingface_config
from tiny_lm.model.huggingface_folder import load_huggingface_model
from tiny_lm.model.huggingface_weights import EMBEDDING, to_huggingface_state

SHAPE = {"vocab_size": 61, "context_length": 24, "d_model": 32, "n_layers": 2, "n_heads": 4}
FAMILIES = {
    "gpt2": {"d_ff": 72},
    "smalllm": {"d_ff": 128},
    "llama3": {"n_kv_heads": 2, "ffn_hidden_dim": 48, "rope_theta": 500000.0, "norm_eps": 1e-5},
    "qwen3": {"n_kv_heads": 1, "ffn_hidden_dim": 48, "head_dim": 16},
}


def make_config(family, **changes):
    return model_config_from_dict({"architecture": family, **SHAPE, **FAMILIES[family], **changes})


def to_dict(config, **ids):
    return to_huggingface_config(config, **{"bos_id": 1, "eos_id": 2, "pad_id": 0, **ids})


@pytest.fixture(params=FAMILIES)
def folder(request, tmp_path):
    """A folder that transformers saved, of a model that is ours by its values."""
    config = make_config(request.param)
    ours, theirs = build_model(config), reference_model(config)
    randomize(ours, seed=0)
    theirs.load_state_dict(to_huggingface_state(config, ours.state_dict()), strict=False)
    theirs.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_survives_the_way_to_transformers_and_back(family):
    config = make_config(family)
    content = reference_model(config).config.to_dict()
    back = from_huggingface_config(content)
    assert type(back) is type(config)
    for name in ("vocab_size", "context_length", "d_model", "n_layers", "n_heads", "kv_heads", "head_size", "ffn_size"):
        assert getattr(back, name) == getattr(config, name), name
    assert (back.norm_eps, back.rope_theta) == (config.norm_eps, config.rope_theta)
    assert from_huggingface_config(to_dict(config)) == back


def test_a_config_says_what_older_engines_read():
    gpt2 = to_dict(make_config("gpt2"))
    assert gpt2["n_ctx"] == gpt2["n_positions"] == 24
    assert gpt2["activation_function"] == "gelu_pytorch_tanh"
    llama = to_dict(make_config("llama3"), dtype="bfloat16")
    assert llama["rope_theta"] == llama["rope_parameters"]["rope_theta"] == 500000.0
    assert llama["dtype"] == llama["torch_dtype"] == "bfloat16"
    assert to_dict(make_config("qwen3"))["head_dim"] == 16


def test_a_folder_of_transformers_becomes_our_model(folder):
    from transformers import AutoModelForCausalLM

    ours, config = load_huggingface_model(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.randint(config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=0, atol=1e-4)
    assert ours.lm_head.weight is ours.token_emb.weight


def test_shards_and_half_precision(folder):
    from transformers import AutoModelForCausalLM

    whole, _ = load_huggingface_model(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder).bfloat16()
    (folder / "model.safetensors").unlink()
    theirs.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    widened, _ = load_huggingface_model(folder)
    stored, _ = load_huggingface_model(folder, dtype=None)
    for name, tensor in whole.state_dict().items():
        assert widened.state_dict()[name].dtype == torch.float32
        assert torch.equal(widened.state_dict()[name], tensor.bfloat16().float())
        assert stored.state_dict()[name].dtype == torch.bfloat16
    next(folder.glob("model-*.safetensors")).unlink()
    with pytest.raises(UserError, match="missing, though the index lists it"):
        load_huggingface_model(folder)


def test_biases_that_only_they_have_are_left_out_and_others_kept(tmp_path):
    config = make_config("gpt2")
    model = build_model(config)
    write_folder(tmp_path, config, to_huggingface_state(config, model.state_dict()))
    assert load_huggingface_model(tmp_path)[1].qkv_bias is False
    state = to_huggingface_state(config, model.state_dict())
    state["transformer.h.1.attn.c_attn.bias"][5] = 1.0
    write_folder(tmp_path, config, state)
    assert load_huggingface_model(tmp_path)[1].qkv_bias is True


def test_a_bare_model_and_its_tables_are_read(tmp_path):
    """As in the GPT-2 that OpenAI published: no prefix, and causal masks among the weights."""
    config = make_config("gpt2")
    model = build_model(config)
    state = to_huggingface_state(config, model.state_dict())
    bare = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 24, 24)
    write_folder(tmp_path, config, bare)
    loaded, _ = load_huggingface_model(tmp_path)
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def write_folder(folder: Path, config, state, **changes):
    (folder / "config.json").write_text(json.dumps({**to_dict(config), **changes}))
    save_file(state, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama3", {"architectures": ["MistralForCausalLM"]}, "unsupported class 'MistralForCausalLM'"),
        ("llama3", {"architectures": ["LlamaForCausalLm"]}, "did you mean 'LlamaForCausalLM'"),
        ("llama3", {"tie_word_embeddings": "no"}, "tie_word_embeddings: input should be a valid boolean"),
        ("llama3", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "scaled or partial rotary positions"),
        ("llama3", {"head_dim": 32}, "head_dim is 32, but llama3 requires 8"),
        ("llama3", {"hidden_size": None}, "d_model: input should be a valid integer"),
        ("llama3", {"hidden_act": "gelu"}, "hidden_act is 'gelu', but llama3 only supports 'silu'"),
        ("gpt2", {"activation_function": "gelu"}, "activation_function is 'gelu'"),
        ("gpt2", {"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06"),
        ("smalllm", {"num_key_value_heads": 2}, "num_key_value_heads is 2, but smalllm requires 4"),
        ("smalllm", {"sliding_window": 8}, "sliding_window is 8"),
        ("qwen3", {"use_sliding_window": True}, "use_sliding_window is True"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is"),
        ("qwen3", {"quantization_config": {"bits": 4}}, "the weights are quantized"),
    ],
)
def test_what_our_families_cannot_express_is_refused(family, changes, message):
    with pytest.raises(UserError, match=message):
        from_huggingface_config({**to_dict(make_config(family)), **changes}, source="config.json")


def test_a_missing_key_is_named():
    content = to_dict(make_config("gpt2"))
    del content["n_embd"]
    with pytest.raises(UserError, match="the key 'n_embd' is missing"):
        from_huggingface_config(content)


def damage(folder, how):
    file = folder / "model.safetensors"
    state = {name: tensor.clone() for name, tensor in load_file(file).items()} if file.is_file() else {}
    embedding = next(name for name in EMBEDDING.values() if name in state)
    match how:
        case "no config":
            (folder / "config.json").unlink()
        case "no weights":
            file.unlink()
        case "pickle":
            file.rename(folder / "pytorch_model.bin")
        case "cut":
            file.write_bytes(file.read_bytes()[:-100])
        case "noise":
            file.write_bytes(b"no safetensors at all")
        case "nan":
            state[embedding][3, 2] = float("nan")
            save_file(state, file)
        case "shape":
            state[embedding] = state[embedding][:-1].contiguous()
            save_file(state, file)
        case "missing":
            del state[max(state)]
            save_file(state, file)
        case "extra":
            state["something.else"] = torch.zeros(1)
            save_file(state, file)
        case "untied":
            state["lm_head.weight"] = state[embedding] + 1
            save_file(state, file)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no config", r"config\.json is missing"),
        ("no weights", r"model\.safetensors is missing\)$"),
        ("pickle", "pickled weights are not supported"),
        ("cut", "is damaged or not a safetensors file"),
        ("noise", "is damaged or not a safetensors file"),
        ("nan", r"token_emb\.weight contains NaN"),
        ("shape", r"has the shape \(60, 32\), but the config says \(61, 32\)"),
        ("missing", "is missing$"),
        ("extra", r"unexpected tensor 'something\.else'"),
        ("untied", "the head differs from the embedding"),
    ],
)
def test_a_broken_folder_is_refused_in_one_line(folder, how, message):
    damage(folder, how)
    with pytest.raises(UserError, match=message) as caught:
        load_huggingface_model(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_an_index_cannot_lead_out_of_its_folder(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../x.safetensors"}}))
    with pytest.raises(UserError, match="is outside the folder"):
        load_huggingface_model(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_untied_head_goes_both_ways(family, tmp_path):
    config = make_config(family, tie_word_embeddings=False)
    ours, theirs = build_model(config), reference_model(config)
    randomize(ours, seed=3)
    assert not torch.equal(ours.lm_head.weight, ours.token_emb.weight)
    state = to_huggingface_state(config, ours.state_dict())
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert (missing, unexpected) == ([], [])
    ids = torch.randint(config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=0, atol=1e-4)
    theirs.save_pretrained(tmp_path)
    loaded, found = load_huggingface_model(tmp_path)
    assert found.tie_word_embeddings is False
    with torch.no_grad():
        assert torch.equal(loaded(ids), ours(ids))
    assert num_parameters(config) == sum(p.numel() for p in ours.parameters())
    assert num_parameters(config) - num_parameters(make_config(family)) == 61 * 32


def test_an_untied_config_without_a_head_is_refused(tmp_path):
    config = make_config("llama3")
    state = to_huggingface_state(config, build_model(config).state_dict())
    write_folder(tmp_path, config, state, tie_word_embeddings=False)
    with pytest.raises(UserError, match=r"the tensor lm_head\.weight is missing"):
        load_huggingface_model(tmp_path)


def test_weights_of_eight_bits_are_named(tmp_path):
    config = make_config("llama3")
    state = to_huggingface_state(config, build_model(config).state_dict())
    for dtype, name in ((torch.int8, "int8"), (torch.float8_e4m3fn, "float8_e4m3fn")):
        changed = {key: tensor.to(dtype) if "mlp" in key else tensor for key, tensor in state.items()}
        write_folder(tmp_path, config, changed)
        with pytest.raises(UserError, match=f"is stored as {name}; weights must be float32"):
            load_huggingface_model(tmp_path)


def test_messages_about_damage_are_short(tmp_path):
    config = make_config("gpt2")
    write_folder(tmp_path, config, to_huggingface_state(config, build_model(config).state_dict()))
    file = tmp_path / "model.safetensors"
    header = json.dumps({"x" * 70_000: {"dtype": "F32", "shape": [10**9], "data_offsets": [0, 4]}}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(UserError, match="is damaged or not a safetensors file") as caught:
        load_huggingface_model(tmp_path)
    assert len(str(caught.value)) < 600
    file.unlink()
    for name, problem in (("x" * 70_000, "too long for a file name"), ("a\0b", "is outside the folder")):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
        with pytest.raises(UserError, match=problem) as caught:
            load_huggingface_model(tmp_path)
        assert len(str(caught.value)) < 600
