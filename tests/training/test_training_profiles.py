"""Every shipped profile trains: its own model, optimizer, schedule and precision, on little text."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tiny_lm.config import shipped_configs
from tiny_lm.data import BinDataConfig
from tiny_lm.model.checkpoint import load_checkpoint_model
from tiny_lm.model.config import load_model_config
from tiny_lm.profile import Profile
from tiny_lm.runs import Run, read_metrics
from tiny_lm.training import TrainingConfig
from tiny_lm.training.fit import train

PROFILES = sorted(path.stem for path in (shipped_configs() / Profile.folder).glob("*.yaml"))


@pytest.mark.parametrize("name", PROFILES)
def test_profile_trains(name: str, data_config: Callable[..., BinDataConfig], run: Run) -> None:
    profile = Profile.from_yaml(name)
    model = load_model_config(profile.model)
    BinDataConfig.from_yaml(profile.data)
    training = replace(
        TrainingConfig.from_yaml(profile.training),
        max_steps=3,
        accumulate_grad_batches=1,
        log_every_n_steps=1,
        val_max_tokens=64,
        sample_tokens=0,
    )
    result = train(model, training, data_config(block_size=64, batch_size=2), run)
    curve = [event["train_loss"] for event in read_metrics(run.metrics)]
    assert result.finished
    assert len(curve) == 3
    assert curve[0] == pytest.approx(math.log(model.vocab_size), abs=0.5)  # a fresh model knows nothing
    assert math.isfinite(result.metrics["val_loss"])
    assert load_checkpoint_model(run.last_checkpoint).config == model


def test_profiles_of_ours_are_no_larger_than_they_say() -> None:
    from tiny_lm.model.config import num_parameters

    for name, most in (("turbo", 6_791_424), ("turbo-llama", 6_700_000), ("turbo-qwen", 6_700_000)):
        assert num_parameters(load_model_config(name)) <= most


def test_every_profile_names_files_that_are_there() -> None:
    for name in PROFILES:
        profile = Profile.from_yaml(name)
        for folder in ("models", "training", "data"):
            part = getattr(profile, {"models": "model"}.get(folder, folder))
            assert (shipped_configs() / folder / f"{Path(part).stem}.yaml").is_file()
