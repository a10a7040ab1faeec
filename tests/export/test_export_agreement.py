"""The measure of an export: a right program always passes, and twelve kinds of wrong ones never do."""

import copy
import dataclasses
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from tiny_exports import FAMILIES, TrainedRun
from torch import Tensor, nn

from tiny_lm.export.agreement import Reference, TableGELU, check_settings
from tiny_lm.export.source import ExportSource, load_source
from tiny_lm.model import RoPE, Transformer, build_model


class Program:
    """Log-probabilities of a model, as another program would report them."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model.eval()

    @torch.no_grad()
    def log_probabilities(self, ids: Sequence[int]) -> Tensor:
        return F.log_softmax(self._model(torch.tensor([list(ids)]))[0].float(), dim=-1)


class SequentialLinear(nn.Module):
    """Adds one product after the other in float32: the least accurate order that a right kernel may take."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        total = x.new_zeros(*x.shape[:-1], len(self.weight))
        for column, values in zip(self.weight.T, x.unbind(-1), strict=True):
            total = total + values[..., None] * column
        return total if self.bias is None else total + self.bias


def make_source(trained_run: TrainedRun, family: str, kind: str) -> ExportSource:
    """Return a trained model, the same with logits six times as large, or one with its first weights."""
    source = load_source(trained_run(family).folder)
    if kind == "trained":
        return source
    torch.manual_seed(0)
    model = build_model(source.config) if kind == "untrained" else copy.deepcopy(source.model)
    if kind == "sharp":
        with torch.no_grad():
            for parameter in model.final_norm.parameters():
                parameter *= 6
    return dataclasses.replace(source, model=model.eval())


KINDS = ("trained", "sharp", "untrained")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_float32_in_another_order_agrees(family: str, kind: str, trained_run: TrainedRun) -> None:
    source = make_source(trained_run, family, kind)
    model = copy.deepcopy(source.model)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, SequentialLinear(child))
    checks = Reference(source).check(Program(model))
    assert [check.result for check in checks if not check.passed] == []


def test_a_gelu_of_half_precision_is_judged_by_its_own_arithmetic(trained_run: TrainedRun) -> None:
    source = load_source(trained_run("gpt2").folder)
    model = copy.deepcopy(source.model)
    for block in model.blocks:
        block.ffn.activation = TableGELU()
    assert all(check.passed for check in Reference(source, table_gelu=True).check(Program(model)))
    assert not all(check.passed for check in Reference(source).check(Program(model)))


# --- faults ----------------------------------------------------------------------------------------------------------


def swap_layers(model: Transformer) -> None:
    first, second = model.blocks[0].attn.out_proj, model.blocks[1].attn.out_proj
    first.weight, second.weight = second.weight, first.weight


def transpose_a_head(model: Transformer) -> None:
    size = model.config.head_size
    with torch.no_grad():
        block = model.blocks[0].attn.W_v.weight[:size, :size]
        block.copy_(block.T.clone())


def transpose_a_matrix(model: Transformer) -> None:
    with torch.no_grad():
        weight = model.blocks[1].attn.out_proj.weight
        size = min(weight.shape)
        weight[:size, :size] = weight[:size, :size].T.clone()


def swap_gate_and_up(model: Transformer) -> None:
    ffn = model.blocks[0].ffn
    ffn.w1, ffn.w3 = ffn.w3, ffn.w1


def swap_two_tokens(model: Transformer) -> None:
    with torch.no_grad():
        model.token_emb.weight[[20, 21]] = model.token_emb.weight[[21, 20]]


def raise_epsilon(model: Transformer) -> None:
    for module in model.modules():
        if isinstance(module, nn.LayerNorm | nn.RMSNorm):
            module.eps *= 1000


def change_rotary_base(model: Transformer) -> None:
    model.rope = RoPE(model.config.head_size, model.config.context_length, model.config.rope_theta * 1.01)


def pair_neighbours(model: Transformer) -> None:
    """Rotate 2i with 2i + 1, which is what files for another program need."""
    config = model.config
    with torch.no_grad():
        for projection, heads in (
            (model.blocks[0].attn.W_q, config.n_heads),
            (model.blocks[0].attn.W_k, config.kv_heads),
        ):
            weight = projection.weight
            weight.copy_(weight.reshape(heads, 2, -1, config.d_model).transpose(1, 2).reshape(weight.shape).clone())


def use_erf_gelu(model: Transformer) -> None:
    for block in model.blocks:
        block.ffn.activation = nn.GELU()


def drop_a_bias(model: Transformer) -> None:
    nn.init.zeros_(model.blocks[0].ffn.fc1.bias)


def round_a_matrix(model: Transformer) -> None:
    with torch.no_grad():
        weight = model.blocks[1].attn.W_v.weight
        weight.copy_(weight.bfloat16().float())


def scale_a_channel(model: Transformer) -> None:
    with torch.no_grad():
        model.final_norm.weight[3] *= 1.01


def lose_a_weight(model: Transformer) -> None:
    with torch.no_grad():
        weight = model.blocks[0].attn.W_v.weight
        weight[0, int(weight[0].abs().argmax())] *= 2


def shift_positions(model: Transformer) -> None:
    with torch.no_grad():
        weight = model.pos_emb.pos_emb.weight
        weight.copy_(weight.roll(1, dims=0).clone())


FAULTS: dict[Callable[[Transformer], None], Sequence[str]] = {
    swap_layers: tuple(FAMILIES),
    transpose_a_head: tuple(FAMILIES),
    transpose_a_matrix: tuple(FAMILIES),
    swap_two_tokens: tuple(FAMILIES),
    raise_epsilon: tuple(FAMILIES),
    round_a_matrix: tuple(FAMILIES),
    scale_a_channel: tuple(FAMILIES),
    lose_a_weight: tuple(FAMILIES),
    swap_gate_and_up: ("llama3", "qwen3"),
    change_rotary_base: ("llama3", "qwen3", "smalllm"),
    pair_neighbours: ("llama3", "smalllm"),
    use_erf_gelu: ("gpt2", "smalllm"),
    drop_a_bias: ("gpt2", "smalllm"),
    shift_positions: ("gpt2",),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_fault_is_never_taken_for_rounding(family: str, kind: str, trained_run: TrainedRun) -> None:
    source = make_source(trained_run, family, kind)
    reference = Reference(source)
    unseen = []
    for fault, families in FAULTS.items():
        if family not in families or (fault is drop_a_bias and kind == "untrained"):  # first biases are 0
            continue
        model = copy.deepcopy(source.model)
        fault(model)
        found = reference.agreement(Program(model))
        if all(check.passed for check in reference.checks_of(found)):
            unseen.append((fault.__name__, found))
    assert unseen == []


def test_a_program_that_returns_nan_does_not_pass(trained_run: TrainedRun) -> None:
    source = load_source(trained_run().folder)
    model = copy.deepcopy(source.model)
    with torch.no_grad():
        model.final_norm.weight[0] = float("nan")
    assert not any(check.passed for check in Reference(source).check(Program(model))[:2])


@pytest.mark.parametrize(
    ("changed", "passes"),
    [
        ({}, True),
        ({"eps": 1.1e-5}, False),
        ({"heads": 3}, False),
        ({"eps": None}, False),
        ({"eps": 9.9999997e-06}, True),
    ],
)
def test_settings_are_compared_as_stored(changed: dict[str, float], passes: bool) -> None:
    expected = {"eps": 1e-5, "heads": 4}
    assert check_settings(expected, {**expected, **changed}).passed is passes
