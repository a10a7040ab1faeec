"""The moving average of the weights: how it moves, and that everything that looks at the model looks at it."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tiny_runs import losses, model

from tiny_lm.data import BinDataConfig
from tiny_lm.data.bin.data_module import BinTokenDataModule
from tiny_lm.inference import TextGenerator
from tiny_lm.inference.scoring import evaluate_loss
from tiny_lm.model.checkpoint import AVERAGE_KEY, load_checkpoint_model, read_checkpoint
from tiny_lm.runs import Run, read_metrics
from tiny_lm.training.fit import TrainingResult

Fit = Callable[..., TrainingResult]

EVERY_STEP = {"save_every_n_steps": 1, "keep_checkpoints": 99, "scheduler": "constant", "sample_tokens": 8}


def test_the_average_moves_as_it_says(fit: Fit, run: Run) -> None:
    """By the recurrence, from each checkpoint to the next; a young one follows the weights closely."""
    fit(**EVERY_STEP, ema_decay=0.5)
    states = [read_checkpoint(run.step_checkpoint(step)) for step in range(1, 13)]
    for step, (before, after) in enumerate(pairwise(states), start=2):
        decay = min(0.5, (1 + step) / (10 + step))
        for name, average in after[AVERAGE_KEY].items():
            expected = decay * before[AVERAGE_KEY][name] + (1 - decay) * after["state_dict"][name]
            assert torch.allclose(average, expected, atol=1e-6), (step, name)


def test_whoever_looks_at_the_model_sees_the_average(
    fit: Fit, run: Run, data_config: Callable[..., BinDataConfig]
) -> None:
    """Validation, the stories, and whatever reads a checkpoint: generating, evaluation and the exports."""
    fit(**EVERY_STEP, ema_decay=0.9)
    checkpoint = read_checkpoint(run.last_checkpoint)
    loaded = load_checkpoint_model(run.last_checkpoint).model
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, checkpoint[AVERAGE_KEY][f"model.{name}"])
    batches = BinTokenDataModule(data_config()).val_dataloader
    averaged = evaluate_loss(loaded, batches(), device=torch.device("cpu"))
    noted = read_metrics(run.metrics)[-1]["val_loss"]
    assert noted == pytest.approx(averaged.loss, abs=1e-5)
    generator = TextGenerator.from_checkpoint(run.last_checkpoint, run.tokenizer)
    generator.model.use_blocked_attention()  # as training did
    story = generator.generate("Once upon a time", 8, temperature=0.8, seed=0).removeprefix("Once upon a time")
    assert story.strip().split()[0] in run.samples.read_text().split("## Step 12")[1]
    loaded.load_state_dict({name: checkpoint["state_dict"][f"model.{name}"] for name in loaded.state_dict()})
    plain = evaluate_loss(loaded, batches(), device=torch.device("cpu"))
    assert abs(plain.loss - noted) > 1e-3  # the weights themselves are somewhere else


def test_training_goes_on_with_the_weights(fit: Fit, run: Run, tmp_path: Path) -> None:
    """An average, looked at at every other step, changes nothing of the run beside which it is kept."""
    other = Run(tmp_path / "plain")
    fit(val_every_n_steps=2, ema_decay=0.9, config=model("qwen3"))
    fit(val_every_n_steps=2, run=other, config=model("qwen3"))
    assert losses(run) == losses(other)
