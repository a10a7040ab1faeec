from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tiny_lm.model import build_model, load_model_config
from tiny_lm.training import TrainingConfig, muon
from tiny_lm.training.optim import MuonAdamW, Schedule, build_optimizer, learning_rate_at, weight_decay_share

SMALL = {"d_model": 32, "n_layers": 2, "n_heads": 2, "vocab_size": 300, "context_length": 16}


def config(**values: object) -> TrainingConfig:
    defaults = {"max_steps": 100, "learning_rate": 1e-2, "min_lr": 1e-3, "warmup_ratio": 0.1}
    return TrainingConfig.from_dict({**defaults, **values})


def test_cosine_rises_to_the_peak_and_falls_to_the_minimum() -> None:
    rates = [learning_rate_at(step, config()) for step in range(100)]
    assert rates[0] == pytest.approx(1e-3)  # a tenth of the peak: the warm-up is 10 steps
    assert rates[9:11] == pytest.approx([1e-2, 1e-2])
    assert rates[99] == pytest.approx(1e-3)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[10 + 89 // 2] == pytest.approx((1e-2 + 1e-3) / 2, rel=0.02)


@pytest.mark.parametrize(
    ("scheduler", "first", "middle", "last"),
    [("linear", 1e-3, 5.5e-3, 1e-3), ("constant", 1e-3, 1e-2, 1e-2), ("none", 1e-2, 1e-2, 1e-2)],
)
def test_other_schedules(scheduler: str, first: float, middle: float, last: float) -> None:
    chosen = config(scheduler=scheduler)
    rates = [learning_rate_at(step, chosen) for step in (0, 54, 99)]
    assert rates == pytest.approx([first, middle, last], rel=0.02)


def test_wsd_holds_the_peak_and_falls_in_a_line_over_its_share_of_the_run() -> None:
    chosen = config(scheduler="wsd", decay_ratio=0.6)
    rates = [learning_rate_at(step, chosen) for step in range(100)]
    assert rates[:10] == pytest.approx([1e-3 * step for step in range(1, 11)])
    assert rates[10:40] == pytest.approx([1e-2] * 30)
    falls = [before - after for before, after in pairwise(rates[39:])]
    assert falls == pytest.approx([(1e-2 - 1e-3) / 60] * 60)  # the last 60 steps
    assert rates[99] == pytest.approx(1e-3)


def test_wsd_whose_parts_overlap_has_no_stable_one() -> None:
    chosen = config(scheduler="wsd", decay_ratio=1.0)
    rates = [learning_rate_at(step, chosen) for step in range(100)]
    assert rates[9:11] == pytest.approx([1e-2, 1e-2], rel=0.02)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[99] == pytest.approx(1e-3)


def test_weight_decay_is_whole_at_first_and_nothing_at_the_end() -> None:
    shares = {
        schedule: [weight_decay_share(step, config(weight_decay_schedule=schedule)) for step in (0, 33, 66, 99)]
        for schedule in ("constant", "linear", "cosine")
    }
    assert shares["constant"] == [1, 1, 1, 1]
    assert shares["linear"] == pytest.approx([1, 2 / 3, 1 / 3, 0])
    assert shares["cosine"] == pytest.approx([1, 0.75, 0.25, 0])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_optimizer_decays_as_the_schedule_says(optimizer: str) -> None:
    """Of a step at which the rate is known and no gradient is, a weight loses rate x decay x share."""
    chosen = config(
        optimizer=optimizer, weight_decay=0.5, weight_decay_schedule="linear", scheduler="none", max_steps=5
    )
    network = build_model(load_model_config("gpt2-8k-2l", SMALL))
    optimizer_ = build_optimizer(network, chosen)
    schedule = Schedule(optimizer_, chosen)
    weight = network.blocks[0].attn.W_q.weight
    for share in (1, 0.75, 0.5, 0.25, 0):
        before = weight.detach().clone()
        for parameter in network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer_.step()
        assert torch.allclose(weight, before * (1 - 1e-2 * 0.5 * share), rtol=1e-6, atol=0)
        schedule.step()


def test_the_scheduler_sets_the_rate_of_each_step() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2, 2))
    optimizer = torch.optim.AdamW([parameter], lr=1e-2)
    scheduler = Schedule(optimizer, config())
    for step in range(100):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(learning_rate_at(step, config()))
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("model", ["gpt2-8k-2l", "quickstart"])
def test_weight_decay_touches_matrices_only_and_nothing_is_left_out(model: str, optimizer: str) -> None:
    network = build_model(load_model_config(model, {**SMALL, **({"n_kv_heads": 2} if model == "quickstart" else {})}))
    groups = build_optimizer(network, config(optimizer=optimizer)).param_groups
    decayed = [id(p) for group in groups if group["weight_decay"] > 0 for p in group["params"]]
    plain = [id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]]
    assert sorted(decayed + plain) == sorted(id(p) for p in network.parameters())
    assert set(decayed) == {id(p) for p in network.parameters() if p.dim() >= 2}


def train(network: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        ids = torch.randint(0, 300, (2, 16), generator=generator)

        def closure(ids: Tensor = ids) -> Tensor:
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(network(ids).flatten(0, 1), ids.flatten())
            loss.backward()
            return loss

        losses.append(optimizer.step(closure).item())
    return losses


def test_muon_goes_on_from_its_state() -> None:
    chosen = config(optimizer="muon")
    torch.manual_seed(0)
    network = build_model(
        load_model_config(
            "gpt2-8k-2l", {**SMALL, "dropout": 0.0, "emb_dropout": 0.0, "attn_dropout": 0.0, "resid_dropout": 0.0}
        )
    )
    optimizer = build_optimizer(network, chosen)
    assert isinstance(optimizer, MuonAdamW)
    before = train(network, optimizer, 5, seed=1)
    weights = {key: value.clone() for key, value in network.state_dict().items()}
    state = optimizer.state_dict()
    state = torch.load(_saved(state), weights_only=True)
    expected = train(network, optimizer, 5, seed=2)

    network.load_state_dict(weights)
    resumed = build_optimizer(network, chosen)
    resumed.load_state_dict(state)
    assert train(network, resumed, 5, seed=2) == expected
    assert expected[-1] < before[0]


def _saved(value: object) -> "object":
    import io

    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return buffer


def test_muon_moves_hidden_matrices_by_orthogonal_steps() -> None:
    torch.manual_seed(0)
    network = build_model(load_model_config("gpt2-8k-2l", SMALL))
    weight = network.blocks[0].attn.W_q.weight
    before = weight.detach().clone()
    optimizer = build_optimizer(network, config(optimizer="muon", weight_decay=0.0))
    train(network, optimizer, 1, seed=0)
    singular = torch.linalg.svdvals(weight.detach() - before)
    # Newton-Schulz brings the singular values of an update near each other; those of a gradient fall off steeply.
    assert singular.median() > 0.5 * singular.max()


@pytest.mark.parametrize(("in_bf16", "tolerance"), [(True, 0.0), (False, 0.04)])
@pytest.mark.parametrize("shape", [(48, 16), (16, 48), (32, 32)])
def test_muon_updates_as_torch_does(
    shape: tuple[int, int], in_bf16: bool, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit in bf16; in float32 to what bf16's eight bits leave after five iterations."""
    monkeypatch.setattr(muon, "computes_in_bf16", lambda device: in_bf16)
    torch.manual_seed(0)
    start = torch.randn(shape)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    options = {"lr": 0.1, "weight_decay": 0.3, "momentum": 0.85, "adjust_lr_fn": "match_rms_adamw"}
    optimizers = [muon.Muon([ours], **options), torch.optim.Muon([theirs], **options)]
    for _ in range(4):
        gradient = torch.randn(shape)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert (ours - theirs).norm() <= tolerance * (theirs - start).norm()
    our_state, their_state = (optimizer.state_dict()["state"][0] for optimizer in optimizers)
    assert our_state.keys() == their_state.keys()
    assert torch.equal(our_state["momentum_buffer"], their_state["momentum_buffer"])
