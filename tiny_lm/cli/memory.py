"""The commands that estimate memory, and that find the largest micro-batch."""

from typing import TYPE_CHECKING, Annotated

import typer

from tiny_lm.cli.options import Settings
from tiny_lm.config import override, parse_overrides
from tiny_lm.console import print_result
from tiny_lm.errors import UserError
from tiny_lm.training.launch import check_variables

if TYPE_CHECKING:
    from tiny_lm.training.planning.batch_size import BatchSizes, BatchSizeTrial
    from tiny_lm.training.planning.memory import MemoryConfig

Profile = Annotated[str | None, typer.Argument(help="Profile, such as speed: a named set of three configs.")]
ModelConfig = Annotated[str | None, typer.Option(help="Model config: a YAML file or a shipped name.")]
TrainingConfig = Annotated[str | None, typer.Option(help="Training config; default: AdamW in bf16-mixed.")]
DataConfig = Annotated[str | None, typer.Option(help="Data config; default: sequences of the model's context length.")]


def estimate(
    profile: Profile = None,
    model_config: ModelConfig = None,
    training_config: TrainingConfig = None,
    data_config: DataConfig = None,
    settings: Settings = None,
) -> None:
    """Estimate the memory of training, by formula: nothing is allocated."""
    check_variables()
    from tiny_lm.hardware.memory import free_memory
    from tiny_lm.training.planning.memory import estimate_memory, find_savings

    config, _ = _load(profile, model_config, training_config, data_config, settings)
    memory = estimate_memory(config)
    parts = {name.replace("_", " "): size for name, size in vars(memory).items()}
    for name, size in {**parts, "at the peak": memory.total, "free here": free_memory(config.device)}.items():
        print_result(f"{name:<16} {size / 2**20:>12,.1f} MiB")
    shape = f"{config.sequences} sequences of {config.block_size} tokens"
    print_result(
        f"for {shape} on this {config.device.upper()} in {config.precision}; Python and torch add about 500 MiB"
    )
    for saving in find_savings(config):
        settings_line = " ".join(f"--set {setting}" for setting in saving.settings.split())
        print_result(f"{saving.bytes / 2**20:,.0f} MiB less, for {saving.cost}: {settings_line}")


def find_batch_size(
    profile: Profile = None,
    model_config: ModelConfig = None,
    training_config: TrainingConfig = None,
    data_config: DataConfig = None,
    margin: Annotated[float, typer.Option(min=0.0, max=0.9, help="Fraction of the free memory to leave.")] = 0.1,
    memory: Annotated[float | None, typer.Option(min=0.1, help="GB to use; default: what is free.")] = None,
    most: Annotated[int | None, typer.Option("--max", min=1, help="Maximum sequences in a micro-batch.")] = None,
    seconds: Annotated[float, typer.Option(min=1.0, help="On a CPU: about how long to try.")] = 60.0,
    settings: Settings = None,
) -> None:
    """Find the largest micro-batch that fits into memory, and the fastest.

    Each is tried with optimizer state and a validation. If a data config or a profile sets the sequences of a step,
    only micro-batches that divide them are tried, and accumulation keeps the step unchanged.
    """
    check_variables()
    from tiny_lm.hardware.memory import free_memory
    from tiny_lm.training.planning.batch_size import find_batch_sizes

    config, sequences_per_step = _load(profile, model_config, training_config, data_config, settings)
    free = memory * 1e9 if memory is not None else free_memory(config.device) * (1 - margin)
    print_result(f"{'sequences':>9} {'memory':>12} {'speed':>18}")
    found = find_batch_sizes(
        config, sequences_per_step, limit=most, memory=int(free), seconds=seconds, on_trial=_print_trial
    )
    _print_choice(found, sequences_per_step, free)


def _load(
    profile: str | None,
    model_config: str | None,
    training_config: str | None,
    data_config: str | None,
    settings: list[str] | None,
) -> "tuple[MemoryConfig, int | None]":
    """Return what would be trained, and the sequences per step if the configs set them."""
    from tiny_lm.data import BinDataConfig
    from tiny_lm.hardware.device import fastest_device
    from tiny_lm.model.config import load_model_config
    from tiny_lm.profile import Profile
    from tiny_lm.training import TrainingConfig
    from tiny_lm.training.fit import check_block_size
    from tiny_lm.training.planning.memory import MemoryConfig
    from tiny_lm.training.precision import choose_precision

    if profile:
        named = Profile.from_yaml(profile)
        model_config, training_config = model_config or named.model, training_config or named.training
        data_config = data_config or named.data
    if not model_config:
        raise UserError("name a profile (such as speed) or give --model-config")
    overrides = parse_overrides(settings or [], ["model", "training", "data"])
    model = load_model_config(model_config, overrides["model"])
    if training_config:
        training = TrainingConfig.from_yaml(training_config, overrides["training"])
    else:
        steps = {"max_steps": 1000, "learning_rate": 1e-3}
        training = TrainingConfig.from_dict(override(steps, overrides["training"]), source="--set")
    if data_config:
        data = BinDataConfig.from_yaml(data_config, overrides["data"])
    else:
        sizes = {"block_size": model.context_length, "batch_size": 1}
        defaults = {"train_path": "train.bin", "val_path": "val.bin", **sizes}  # the streams are not opened
        data = BinDataConfig.from_dict(override(defaults, overrides["data"]), source="--set")
    check_block_size(model, data)
    device = fastest_device()
    precision, _ = choose_precision(training, device)
    config = MemoryConfig(model, training, data.batch_size, data.block_size, device, precision)
    given = data_config or "batch_size" in overrides["data"]
    return config, data.batch_size * training.accumulate_grad_batches if given else None


def _print_trial(trial: "BatchSizeTrial") -> None:
    speed = f"{trial.tokens_per_second:,.0f} tokens/s" if trial.tokens_per_second is not None else "not tried"
    outcome = speed if trial.fits else "does not fit"
    print_result(f"{trial.sequences:>9,} {trial.memory / 1e9:>9.2f} GB {outcome:>18}")


def _print_choice(found: "BatchSizes", sequences_per_step: int | None, free: float) -> None:
    """Print the sizes to choose, and the settings for them."""
    fastest, largest = found.fastest, found.largest
    print_result(f"largest that fits into {free / 1e9:.1f} GB: {largest.sequences}")
    print_result(f"smallest of the fastest: {fastest.sequences}")
    accumulation = (sequences_per_step or fastest.sequences) // fastest.sequences
    print_result(
        f"use: --set data.batch_size={fastest.sequences} --set training.accumulate_grad_batches={accumulation}"
        + (f"  # {sequences_per_step} sequences in a step, as before" if sequences_per_step else "")
    )
