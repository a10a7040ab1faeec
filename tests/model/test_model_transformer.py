"""The transformer as a whole: public keys, tied head, initial weights, causality, compilation, checkpointing, bf16."""

import copy

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, family_config, family_model
from reference import randomize
from torch import nn

from tiny_lm.errors import UserError
from tiny_lm.model import GPT2, GPT2Config, Llama3, Qwen3, SmallLM, build_model
from tiny_lm.model.activation import GELU
from tiny_lm.model.architectures.gpt2 import GPT2Block
from tiny_lm.model.architectures.llama3 import Llama3Block
from tiny_lm.model.feedforward import FeedForward, SwiGLU
from tiny_lm.model.position import LearnedPositionalEmbedding, RoPE

IDS = torch.randint(61, (2, 17), generator=torch.Generator().manual_seed(0))


def loss_of(model, ids=IDS):
    logits = model(ids[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def gradients(model, ids=IDS):
    model.zero_grad()
    loss_of(model, ids).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_documented_constructors_take_keywords_and_build_the_same_model():
    sizes = {"vocab_size": 61, "context_length": 24, "d_model": 32, "n_layers": 2, "n_heads": 4}
    dropouts = {"emb_dropout": 0.1, "attn_dropout": 0.1, "resid_dropout": 0.1, "ffn_dropout": 0.1}
    model = GPT2(**sizes, d_ff=64, **dropouts)
    assert isinstance(model.blocks[0], GPT2Block)
    assert model.state_dict().keys() == GPT2(GPT2Config(**sizes, d_ff=64)).state_dict().keys()
    assert isinstance(Llama3(**sizes).blocks[0], Llama3Block)
    with pytest.raises(UserError, match="did you mean 'd_model'"):
        GPT2(**{**sizes, "d_modle": 32})
    with pytest.raises(UserError, match=r"ffn_dropout: must equal resid_dropout=0\.0"):
        GPT2(**sizes, ffn_dropout=0.1)
    x, positions = torch.zeros(1, 3, 32), torch.arange(3)
    assert LearnedPositionalEmbedding(24, 32)(x, positions).shape == SwiGLU(32, 48)(x).shape == x.shape
    assert isinstance(FeedForward(d_model=32, d_ff=64).activation, GELU)
    assert RoPE(8, 24)(positions)[0].shape == (1, 3, 8)


def test_each_family_has_its_class():
    kinds = {"gpt2": GPT2, "llama3": Llama3, "smalllm": SmallLM, "qwen3": Qwen3}
    assert {name: type(family_model(name)) for name in kinds} == kinds


@pytest.mark.parametrize(
    ("family", "block", "top"),
    [
        (
            "gpt2",
            "norm1.weight norm1.bias norm2.weight norm2.bias attn.W_q.weight attn.W_k.weight attn.W_v.weight "
            "attn.out_proj.weight attn.out_proj.bias ffn.fc1.weight ffn.fc1.bias ffn.fc2.weight ffn.fc2.bias",
            "pos_emb.pos_emb.weight final_norm.weight final_norm.bias",
        ),
        (
            "smalllm",
            "norm1.weight norm1.bias norm2.weight norm2.bias attn.W_q.weight attn.W_q.bias attn.W_k.weight "
            "attn.W_k.bias attn.W_v.weight attn.W_v.bias attn.out_proj.weight attn.out_proj.bias "
            "ffn.fc1.weight ffn.fc1.bias ffn.fc2.weight ffn.fc2.bias",
            "final_norm.weight final_norm.bias",
        ),
        (
            "llama3",
            "norm1.weight norm2.weight attn.W_q.weight attn.W_k.weight attn.W_v.weight attn.out_proj.weight "
            "ffn.w1.weight ffn.w2.weight ffn.w3.weight",
            "final_norm.weight",
        ),
        (
            "qwen3",
            "norm1.weight norm2.weight attn.W_q.weight attn.W_k.weight attn.W_v.weight attn.out_proj.weight "
            "attn.q_norm.weight attn.k_norm.weight ffn.w1.weight ffn.w2.weight ffn.w3.weight",
            "final_norm.weight",
        ),
    ],
)
def test_public_state_dict_keys(family, block, top):
    expected = {"token_emb.weight", "lm_head.weight", *top.split()}
    expected |= {f"blocks.{i}.{name}" for i in range(2) for name in block.split()}
    model = family_model(family)
    assert set(model.state_dict()) == expected
    model.enable_gradient_checkpointing()
    assert set(model.state_dict()) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_is_the_embedding_whatever_happens_to_the_model(family):
    model = family_model(family)
    moved = build_model(family_config(family), device="meta").to_empty(device="cpu")
    assigned = build_model(family_config(family), device="meta")
    assigned.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(assigned.lm_head.weight, model.lm_head.weight)
    for each in (model, moved, assigned, model.to(torch.bfloat16), model.to(torch.float64), copy.deepcopy(model)):
        assert each.lm_head.weight is each.token_emb.weight


@pytest.mark.parametrize("family", FAMILIES)
def test_initial_weights(family):
    torch.manual_seed(0)
    model = family_model(family, vocab_size=512, d_model=128, n_layers=4, qkv_bias=True)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            writes_to_residual = name.endswith(("out_proj.weight", "fc2.weight", "w2.weight"))
            std = 0.02 / 8**0.5 if writes_to_residual else 0.02
            assert parameter.std().item() == pytest.approx(std, rel=0.05), name
            assert abs(parameter.mean().item()) < std / 10, name
    ids = torch.randint(512, (4, 24))
    assert loss_of(model, ids).item() == pytest.approx(torch.tensor(512.0).log().item(), abs=0.15)


def test_initial_weights_follow_the_seed():
    def weights(seed):
        torch.manual_seed(seed)
        return family_model("qwen3").state_dict()

    first, again, other = weights(1), weights(1), weights(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["blocks.1.ffn.w2.weight"], other["blocks.1.ffn.w2.weight"])


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_token_changes_nothing_before_it(family):
    model = family_model(family).eval()
    randomize(model, seed=1)
    before = model(IDS)
    for t in (1, 8, 16):
        changed = IDS.clone()
        changed[:, t] = (changed[:, t] + 1) % 61
        after = model(changed)
        torch.testing.assert_close(after[:, :t], before[:, :t], rtol=0, atol=1e-4)
        assert ((after[:, t] - before[:, t]).abs().amax(dim=-1) > 0.01).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_order_of_tokens_matters(family):
    model = family_model(family).eval()
    randomize(model, seed=1)
    swapped = IDS.clone()
    swapped[:, 0], swapped[:, 1] = 3, 5
    other = swapped.clone()
    other[:, 0], other[:, 1] = 5, 3
    assert (model(swapped)[:, -1] - model(other)[:, -1]).abs().max() > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_head_of_the_hidden_states(family):
    model = family_model(family)
    hidden = model.hidden_states(IDS)
    assert hidden.shape == (2, 17, 32)
    assert torch.equal(model(IDS), hidden @ model.token_emb.weight.T)


def test_dropout_works_in_training_only_and_is_absent_at_zero():
    model = family_model("gpt2", dropout=0.5)
    assert not torch.equal(model(IDS), model(IDS))
    model.eval()
    assert torch.equal(model(IDS), model(IDS))
    assert any(isinstance(module, nn.Dropout) for module in model.modules())
    assert not any(isinstance(module, nn.Dropout) for module in family_model("gpt2").modules())


def test_each_dropout_acts_by_itself():
    for name in ("emb_dropout", "attn_dropout", "resid_dropout"):
        model = family_model("gpt2", **{name: 0.5})
        assert not torch.equal(model(IDS), model(IDS)), name


@pytest.mark.parametrize("family", ["gpt2", "smalllm", "llama3", "qwen3"])
def test_compiles_into_one_graph(family):
    model = family_model(family)
    expected = gradients(model)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.zero_grad()
    loss_of(compiled).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=1e-5)


def test_compiles_into_one_graph_with_checkpointing_and_dropout():
    model = family_model("gpt2", dropout=0.1)
    model.enable_gradient_checkpointing()
    torch.compiler.reset()
    loss_of(torch.compile(model, fullgraph=True, backend="aot_eager")).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_changes_no_gradient(family):
    model = family_model(family, dropout=0.2)
    torch.manual_seed(5)
    expected = gradients(model)
    model.enable_gradient_checkpointing()
    torch.manual_seed(5)
    checkpointed = gradients(model)
    assert all(torch.equal(checkpointed[name], expected[name]) for name in expected)


def test_gradient_checkpointing_keeps_less():
    def saved_elements(model):
        sizes = []

        def keep(tensor):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss_of(model)
        return sum(sizes)

    model = family_model("gpt2", n_layers=6)
    everything = saved_elements(model)
    model.enable_gradient_checkpointing()
    assert saved_elements(model) < everything / 3


@torch.no_grad()
def test_gradient_checkpointing_leaves_decoding_alone():
    model = family_model("llama3").eval()
    expected = model(IDS)
    model.enable_gradient_checkpointing()
    cache = model.new_cache(2)
    cached = torch.cat([model(IDS[:, :9], cache), model(IDS[:, 9:], cache)], dim=1)
    torch.testing.assert_close(cached, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_autocast_and_weights_are_close_to_float32(family):
    model = family_model(family)
    expected = gradients(model)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(model)
        with torch.no_grad():
            cache = model.new_cache(2)
            decoded = torch.cat([model(IDS[:, :9], cache), model(IDS[:, 9:10], cache)], dim=1)
    for name, gradient in expected.items():
        assert found[name].dtype == torch.float32
        assert (found[name] - gradient).norm() < 0.05 * gradient.norm() + 1e-4, name
    with torch.no_grad():
        full = model(IDS)[:, :10]
        assert (decoded.float() - full).norm() < 0.05 * full.norm()
        assert (model.to(torch.bfloat16)(IDS)[:, :10].float() - full).norm() < 0.05 * full.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_learns_a_sentence_by_heart(family):
    torch.manual_seed(0)
    model = family_model(family)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss = loss_of(model, IDS[:1])
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1
    with torch.no_grad():
        assert model(IDS[:1, :-1]).argmax(dim=-1).equal(IDS[:1, 1:])
