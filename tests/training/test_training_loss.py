"""The loss in fewer bytes: it and its gradients are those of the plain one."""

import pytest
import torch
import torch.nn.functional as F
from tiny_runs import model
from torch import Tensor

from tiny_lm.model import build_model
from tiny_lm.training import loss as loss_module
from tiny_lm.training.loss import LinearCrossEntropy, LossFunction, lean_next_token_loss, next_token_loss


@pytest.mark.parametrize("most_logits", [2**28, 333])  # all at once; in parts, the last one shorter
@pytest.mark.parametrize("ignored", [0, 3])
def test_a_fused_cross_entropy_has_the_loss_and_the_gradients_of_torchs_own(
    ignored: int, most_logits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "_MAX_LOGITS", most_logits)
    torch.manual_seed(0)
    hidden, weight = torch.randn(20, 8, dtype=torch.float64), torch.randn(50, 8, dtype=torch.float64)
    targets = torch.randint(0, 50, (20,))
    targets[:ignored] = -100

    def graded(loss_of: str) -> tuple[Tensor, Tensor, Tensor]:
        inputs = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if loss_of == "torch":
            loss = F.cross_entropy(inputs[0] @ inputs[1].T, targets, ignore_index=-100)
        else:
            loss = LinearCrossEntropy.apply(*inputs, targets, -100)
        (3 * loss).backward()
        assert inputs[0].grad is not None and inputs[1].grad is not None
        return loss.detach(), inputs[0].grad, inputs[1].grad

    for ours, theirs in zip(graded("ours"), graded("torch"), strict=True):
        # Logits are taken to float32, as autocast does for torch's loss.
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's compiler does so
@pytest.mark.parametrize("compiles", [False, pytest.param(True, marks=pytest.mark.deep)])
def test_a_lean_step_has_the_loss_and_the_gradients_of_a_plain_one(compiles: bool) -> None:
    torch.manual_seed(0)
    network = build_model(model(dropout=0.0))
    ids = torch.randint(0, network.config.vocab_size, (4, network.config.context_length + 1))
    x, y = ids[:, :-1], ids[:, 1:].clone()
    y[0, :5] = -100

    def graded(loss_of: LossFunction) -> tuple[Tensor, dict[str, Tensor]]:
        network.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(network, x, y, -100)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
        return loss.detach(), {name: gradient.clone() for name, gradient in gradients.items() if gradient is not None}

    plain, plain_gradients = graded(next_token_loss)
    lean, lean_gradients = graded(torch.compile(lean_next_token_loss) if compiles else lean_next_token_loss)
    assert abs(lean - plain) < 5e-4
    assert lean_gradients.keys() == plain_gradients.keys()
    for name, gradient in plain_gradients.items():
        error = (lean_gradients[name] - gradient).norm() / gradient.norm()
        assert error < 0.03, name  # bfloat16 keeps eight bits: 0.004 for each sum
