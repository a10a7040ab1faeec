"""The device and the precision that a run chooses for itself, and memory spared by gradient checkpointing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.plugins.precision import MixedPrecision
from tiny_runs import losses, model, training

from tiny_lm.hardware.device import choose_device, fastest_device
from tiny_lm.model import build_model
from tiny_lm.runs import Run
from tiny_lm.training.fit import TrainingResult
from tiny_lm.training.loss import next_token_loss
from tiny_lm.training.optim import build_optimizer
from tiny_lm.training.precision import choose_precision, describe_choice

Machine = Callable[..., None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Let torch see other hardware than there is."""

    def build(*, gpu: bool = False, gpu_has_bf16: bool = True, mps: bool = False, cpu_has_bf16: bool = False) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: gpu_has_bf16)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: cpu_has_bf16)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)

    return build


@pytest.mark.parametrize(
    ("hardware", "kind"), [({}, "cpu"), ({"mps": True}, "mps"), ({"gpu": True, "mps": True}, "cuda")]
)
def test_training_generation_and_evaluation_choose_the_same_device(
    hardware: dict[str, bool], kind: str, machine: Machine
) -> None:
    machine(**hardware)
    assert fastest_device() == choose_device(None).type == kind


@pytest.mark.parametrize(
    ("hardware", "wanted", "line"),
    [
        ({"gpu": True}, "bf16-mixed", "training on Some GPU in bf16-mixed"),
        ({"gpu": True}, "16-mixed", "training on Some GPU in 16-mixed"),
        ({"gpu": True, "mps": True}, "32-true", "training on Some GPU in 32-true"),
        (
            {"gpu": True, "gpu_has_bf16": False},
            "bf16-mixed",
            "training on Some GPU in 16-mixed: this GPU has no bf16; fp16 has loss scaling",
        ),
        (
            {"mps": True},
            "16-mixed",
            "training on Apple GPU (MPS) (no CUDA device was found) in 32-true: 16-mixed would not be faster there",
        ),
        ({}, "32-true", "training on CPU, 8 threads (no GPU was found) in 32-true"),
        (
            {},
            "bf16-mixed",
            "training on CPU, 8 threads (no GPU was found) in 32-true: bf16-mixed would not be faster there",
        ),
        ({"cpu_has_bf16": True}, "bf16-mixed", "training on CPU, 8 threads (no GPU was found) in bf16-mixed"),
        (
            {"cpu_has_bf16": True},
            "16-mixed",
            "training on CPU, 8 threads (no GPU was found) in bf16-mixed: 16-mixed needs a GPU",
        ),
    ],
)
def test_a_run_says_what_it_chose_and_why(hardware: dict[str, bool], wanted: str, line: str, machine: Machine) -> None:
    machine(**hardware)
    device = fastest_device()
    precision, reason = choose_precision(training(precision=wanted), device)
    assert describe_choice(device, precision, reason) == line


@pytest.mark.filterwarnings("ignore:.*GradScaler is enabled, but CUDA is not available")
def test_fp16_has_loss_scaling_and_an_optimizer_that_leaves_it_to_lightning() -> None:
    """A fused AdamW would unscale the gradients itself, after they were clipped."""
    assert isinstance(MixedPrecision("16-mixed", "cuda").scaler, torch.amp.GradScaler)
    network = build_model(model())
    fused = {
        precision: build_optimizer(network, training(precision=precision)).defaults["fused"]
        for precision in ("16-mixed", "bf16-mixed", "32-true")
    }
    assert fused == {"16-mixed": False, "bf16-mixed": True, "32-true": True}


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_gradient_checkpointing_changes_no_loss(
    family: str, fit: Callable[..., TrainingResult], tmp_path: Path
) -> None:
    """Bit for bit on a CPU, dropout included: the second pass through a block draws the numbers of the first."""
    runs = {checkpointing: Run(tmp_path / str(checkpointing)) for checkpointing in (False, True)}
    for checkpointing, run in runs.items():
        fit(run=run, config=model(family), max_steps=6, gradient_checkpointing=checkpointing)
    assert len(losses(runs[True])) == 6
    assert losses(runs[True]) == losses(runs[False])


def test_gradient_checkpointing_keeps_less_for_the_backward_pass() -> None:
    network = build_model(model(dropout=0.0, n_layers=8))
    weights = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    ids = torch.zeros((16, 32), dtype=torch.int64)

    def kept() -> int:
        """Bytes that a forward pass keeps, besides the weights."""
        storages: dict[int, Any] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                storages[storage.data_ptr()] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = next_token_loss(network, ids, ids, -100)
            total = sum(storage.nbytes() for storage in storages.values())
        loss.backward()
        return total

    plain = kept()
    network.enable_gradient_checkpointing()
    inputs_of_blocks = 8 * 16 * 32 * 32 * 4  # kept by torch's checkpoint, out of sight of the hooks
    assert kept() + inputs_of_blocks < plain / 3
