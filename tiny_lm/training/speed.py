"""How fast this machine trains a model, measured."""

import time

import torch

from tiny_lm.data.module import BinTokenDataModule
from tiny_lm.inference.scoring import measure_surprise
from tiny_lm.model import ModelConfig
from tiny_lm.training.config import TrainingConfig
from tiny_lm.training.module import CausalLMModule
from tiny_lm.training.optim import build_optimizer

_DTYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def measure_seconds(
    model_config: ModelConfig, config: TrainingConfig, data: BinTokenDataModule, *, steps: int = 20
) -> tuple[float, float]:
    """Train a throw-away copy of the model for a few steps on the CPU or the GPU.

    Returns:
        seconds of an optimizer step, and seconds of one pass over the validation stream.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module = CausalLMModule(model_config, config, tokenizer_hash="").to(device)
    optimizer = build_optimizer(module.model, config)
    autocast = torch.autocast(device.type, dtype=_DTYPES.get(config.precision), enabled=config.precision in _DTYPES)
    batches = iter(data.train_dataloader())

    def step() -> None:
        for _ in range(config.accumulate_grad_batches):
            x, y = next(batches)
            with autocast:
                loss = module.training_step((x.to(device), y.to(device)), 0)
            torch.autograd.backward(loss)
        module.configure_gradient_clipping(optimizer)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for the device

    for _ in range(3):  # the first steps take memory and choose kernels
        step()
    started = time.perf_counter()
    for _ in range(steps):
        step()
    step_seconds = (time.perf_counter() - started) / steps

    module.eval()
    started = time.perf_counter()
    with autocast:
        measure_surprise(module, data.val_dataloader(), device=device)
    return step_seconds, time.perf_counter() - started
