"""The command that lists the profiles."""

from tiny_lm.config import shipped_configs


def profiles() -> None:
    """List what `tiny-lm train` knows by name.

    For each profile its size, its tokens and what its guide promises.
    """
    from tiny_lm.data import BinDataConfig
    from tiny_lm.model.config import load_model_config, num_parameters
    from tiny_lm.training import TrainingConfig
    from tiny_lm.training.profile import Profile

    for file in sorted((shipped_configs() / Profile.folder).glob("*.yaml")):
        profile = Profile.from_yaml(file)
        training, data = TrainingConfig.from_yaml(profile.training), BinDataConfig.from_yaml(profile.data)
        tokens = training.max_steps * training.accumulate_grad_batches * data.batch_size * data.block_size
        parameters = num_parameters(load_model_config(profile.model))
        size = f"{parameters / 1e6:>6.1f}M parameters {tokens / 1e6:>9,.1f}M tokens"
        print(f"{file.stem:<12} {size}  {profile.description}")
        if profile.expect:
            print(f"{'':<12} its guide promises {profile.expect}")
