"""The closed form of memory beside what torch keeps."""

from dataclasses import replace

import pytest
import torch
from tiny_runs import FAMILIES, model, training

from tiny_lm.model import build_model
from tiny_lm.training.loss import next_token_loss
from tiny_lm.training.optim import build_optimizer
from tiny_lm.training.planning.batch_size import BatchSizeTrial, find_batch_sizes, search, sizes_to_try
from tiny_lm.training.planning.memory import MemoryConfig, estimate_memory, find_savings

WINDOWS, BLOCK = 4, 32


def setup(family: str = "gpt2", dropout: float = 0.0, block_size: int = BLOCK, **values: object) -> MemoryConfig:
    shape = model(family, dropout=dropout, context_length=block_size)
    return MemoryConfig(shape, training(**values), WINDOWS, block_size, "cpu", "32-true")


def saved_bytes(made: MemoryConfig) -> int:
    """Count what the forward pass keeps, each storage once, without the parameters."""
    network = build_model(made.model)
    network.use_blocked_attention()
    own = {parameter.untyped_storage().data_ptr() for parameter in [*network.parameters(), *network.buffers()]}
    kept: dict[int, torch.UntypedStorage] = {}  # holding them keeps an address from being used twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    ids = torch.zeros(WINDOWS, made.block_size, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        next_token_loss(network, ids, ids, -100)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("block_size", [BLOCK, 300])
@pytest.mark.parametrize("family", FAMILIES)
def test_activations_are_what_torch_keeps(family: str, block_size: int) -> None:
    made = setup(family, block_size=block_size)
    estimate = estimate_memory(made)
    log_probabilities = 4 * WINDOWS * block_size * made.model.vocab_size
    assert saved_bytes(made) == pytest.approx(estimate.activations + log_probabilities, rel=0.15)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_optimizer_state_is_what_torch_keeps(optimizer: str) -> None:
    made = setup("qwen3", optimizer=optimizer)
    network = build_model(made.model)
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    state = build_optimizer(network, made.training)
    state.step()
    held = sum(value.nbytes for values in state.state.values() for value in values.values() if torch.is_tensor(value))
    assert held == pytest.approx(estimate_memory(made).optimizer, rel=0.01)


def test_savings_lower_the_estimate_and_keep_the_step() -> None:
    made = setup()
    savings = find_savings(made)
    assert "data.batch_size=2 training.accumulate_grad_batches=2" in [saving.settings for saving in savings]
    for saving in savings:
        assert 0 < saving.bytes < estimate_memory(made).total


def test_micro_batches_divide_the_step() -> None:
    assert sizes_to_try(12, None) == [1, 2, 3, 4, 6, 12]
    assert sizes_to_try(12, 5) == [1, 2, 3, 4]
    assert sizes_to_try(None, 20) == [1, 2, 4, 8, 16]


@pytest.mark.parametrize("limit", range(1, 13))
def test_the_search_on_a_gpu_finds_the_border(limit: int) -> None:
    """The device is played by a number here: there is no GPU on which the real search could run."""
    sizes = sizes_to_try(12, None)
    trials = list(search(sizes, lambda sequences: BatchSizeTrial(sequences, sequences <= limit, sequences, 1.0)))
    assert max(trial.sequences for trial in trials if trial.fits) == max(size for size in sizes if size <= limit)


@pytest.mark.deep
def test_real_trials_in_a_child_with_a_limit() -> None:
    """A limit that a few windows reach: the largest that fits is found, and a larger one is not tried."""
    made = replace(setup(), model=model(dropout=0.0, d_model=64, context_length=512), block_size=512)
    seen: list[BatchSizeTrial] = []
    found = find_batch_sizes(made, 8, memory=2**40, seconds=120.0, on_trial=seen.append)
    assert [trial.sequences for trial in found.trials] == [1, 2, 4, 8]
    assert all(trial.tokens_per_second for trial in found.trials)
    assert found.trials == tuple(seen)
    assert found.largest.sequences == 8
