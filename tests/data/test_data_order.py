"""The order of training windows: a function of (seed, place), shared between ranks, in no memory."""

import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tiny_lm.data import BinDataConfig, StreamMetadata
from tiny_lm.data.bin.data_module import BinTokenDataModule
from tiny_lm.data.bin.sampler import SequentialBatchSampler, ShuffledBatchSampler, permute

MakeConfig = Callable[..., BinDataConfig]


# --- the permutation -------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(size=st.integers(1, 5000), seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 10**6))
def test_an_epoch_is_a_permutation(size: int, seed: int, epoch: int) -> None:
    assert sorted(permute(np.arange(size), size, seed=seed, epoch=epoch).tolist()) == list(range(size))


def test_a_place_is_the_same_window_whatever_is_asked_with_it() -> None:
    whole = permute(np.arange(1000), 1000, seed=5, epoch=2)
    places = np.random.default_rng(0).integers(1000, size=64)
    assert permute(places, 1000, seed=5, epoch=2).tolist() == whole[places].tolist()


def test_an_epoch_of_windows_beyond_any_memory() -> None:
    size = 2**45 + 12345
    places = np.arange(10**15 % size, 10**15 % size + 5000)
    sequences = permute(places, size, seed=0, epoch=0)
    assert len(set(sequences.tolist())) == 5000
    assert sequences.min() >= 0
    assert sequences.max() < size
    assert np.abs(np.histogram(sequences, bins=10, range=(0, size))[0] - 500).max() < 100  # 4.7 standard deviations


def test_every_order_of_three_windows_is_about_equally_likely() -> None:
    orders = [tuple(permute(np.arange(3), 3, seed=seed, epoch=0).tolist()) for seed in range(6000)]
    counts = [orders.count(order) for order in set(orders)]
    assert len(counts) == 6
    assert all(abs(count - 1000) < 150 for count in counts)  # five standard deviations


def test_neighbours_in_an_epoch_have_nothing_to_do_with_each_other() -> None:
    size = 20_000
    for epoch in range(3):
        order = permute(np.arange(size), size, seed=1, epoch=epoch)
        assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.04  # more than five standard deviations
        assert abs(np.corrcoef(np.arange(size), order)[0, 1]) < 0.04
        following = permute(np.arange(size), size, seed=1, epoch=epoch + 1)
        assert abs(np.corrcoef(order, following)[0, 1]) < 0.04
        assert np.count_nonzero(order == following) < 12  # one expected


# --- batches ---------------------------------------------------------------------------------------------------------


def take(count: int, *, sequences: int = 10, batch_size: int = 3, seed: int = 1, **options: object) -> list[list[int]]:
    options = {"drop_last": True, **options}
    return [
        batch.tolist() for batch in islice(ShuffledBatchSampler(sequences, batch_size, seed=seed, **options), count)
    ]


def test_shuffling_is_a_function_of_seed_and_place() -> None:
    first = take(9)
    assert take(9) == first
    assert take(5, start=4 * 3) == first[4:]
    assert take(9, seed=2) != first
    epochs = [[window for batch in first[start : start + 3] for window in batch] for start in (0, 3, 6)]
    assert all(len(set(epoch)) == 9 for epoch in epochs)  # three batches of three different windows
    assert first[:3] != first[3:6]


def test_the_next_epoch_fills_the_last_batch_unless_it_is_dropped() -> None:
    sequences = [window for batch in take(10, drop_last=False) for window in batch]
    assert [sorted(sequences[start : start + 10]) for start in (0, 10, 20)] == [list(range(10))] * 3
    (batch,) = take(1, sequences=2, batch_size=7, drop_last=False)  # a text of fewer windows than a batch
    assert sorted(batch) == [0, 0, 0, 0, 1, 1, 1] or sorted(batch) == [0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 6), (1, 2), (2, 6), (3, 4), (4, 3), (12, 1)])
@pytest.mark.parametrize("drop_last", [True, False])
def test_ranks_read_disjoint_windows_that_are_those_of_one_process(
    world_size: int, micro_batch: int, drop_last: bool
) -> None:
    """The config says 6 sequences in a micro-batch and 2 micro-batches in a step; 50 windows make 8.3 micro-batches."""
    options = {"sequences": 50, "batch_size": 6, "seed": 4, "drop_last": drop_last}
    share = {"world_size": world_size, "micro_batch": micro_batch}
    steps = 9  # more than two epochs
    alone = np.array(take(2 * steps, **options)).reshape(steps, 12)
    count = steps * 12 // world_size // micro_batch
    of_ranks = [take(count, rank=rank, **share, **options) for rank in range(world_size)]
    shared = np.array(of_ranks).reshape(world_size, steps, -1)  # [rank, step, window]
    for step in range(steps):
        assert sorted(shared[:, step].ravel().tolist()) == sorted(alone[step].tolist())
    # Going on with these ranks behind three steps of one process.
    behind = [take(1, start=36, rank=rank, **share, **options)[0] for rank in range(world_size)]
    assert behind == [list(shared[rank, 3, :micro_batch]) for rank in range(world_size)]


@pytest.mark.parametrize(("sequences", "world_size"), [(1, 1), (7, 1), (7, 2), (9, 4), (3, 8), (64, 2)])
def test_ranks_validate_each_window_once_in_equally_many_batches(sequences: int, world_size: int) -> None:
    of_ranks = [
        list(SequentialBatchSampler(sequences, 2, rank=rank, world_size=world_size)) for rank in range(world_size)
    ]
    assert len({len(batches) for batches in of_ranks}) == 1
    assert len(of_ranks[0]) == len(SequentialBatchSampler(sequences, 2, rank=0, world_size=world_size))
    seen = [window for batches in of_ranks for batch in batches for window in batch]
    assert sorted(seen) == list(range(sequences))
    assert all(len(batch) <= 2 for batches in of_ranks for batch in batches)


def test_loader_gives_what_the_order_says_and_resumes_behind_it(data_config: MakeConfig) -> None:
    data = BinTokenDataModule(data_config(), seed=3)
    order = iter(ShuffledBatchSampler(len(data.train_dataset), 4, seed=3, drop_last=True))
    expected = [data.train_dataset[next(order)] for _ in range(9)]
    loaded = iter(data.train_dataloader())
    for x, y in expected:
        batch = next(loaded)
        assert torch.equal(batch[0], x)
        assert torch.equal(batch[1], y)
    data.load_state_dict({"windows_seen": 28})
    assert torch.equal(next(iter(data.train_dataloader()))[0], expected[7][0])
    data.load_state_dict({"batches_seen": 6})  # as older checkpoints say it
    assert torch.equal(next(iter(data.train_dataloader()))[0], expected[6][0])


def test_windows_seen_are_those_of_all_ranks(data_config: MakeConfig) -> None:
    data = BinTokenDataModule(data_config(), micro_batch=2)
    data.load_state_dict({"windows_seen": 100})
    data.trainer = SimpleNamespace(global_rank=1, world_size=3, global_step=25, accumulate_grad_batches=5)
    x, _ = next(iter(data.train_dataloader()))
    order = ShuffledBatchSampler(len(data.train_dataset), 4, seed=0, drop_last=True, start=102, micro_batch=2)
    assert torch.equal(x, data.train_dataset[next(iter(order))][0])
    data.trainer.global_step = 27
    assert data.state_dict() == {"windows_seen": 100 + 2 * 3 * 2 * 5}


# --- streams larger than memory --------------------------------------------------------------------------------------


@pytest.mark.deep
def test_training_batches_of_a_20_gb_stream_leave_the_resident_set_flat(
    tmp_path: Path, stream_folder: Path, data_config: MakeConfig
) -> None:
    """3,000 shuffled batches of a sparse stream add less than 64 MiB; a table of its windows alone would be 312 MiB.

    In a process of its own, whose resident set no other test has stretched.
    """
    tokens = 10**10
    metadata = StreamMetadata.read(stream_folder).to_dict()
    metadata["files"] = {"train.bin": {**metadata["files"]["train.bin"], "tokens": tokens}}
    (tmp_path / "metadata.json").write_text(json.dumps(metadata))
    with (tmp_path / "train.bin").open("wb") as file:
        file.truncate(2 * tokens)
    assert (tmp_path / "train.bin").stat().st_blocks * 512 < 2**20  # takes no disk
    code = f"""
        from itertools import islice
        from pathlib import Path
        from tiny_lm.data import BinDataConfig
        from tiny_lm.data.bin.data_module import BinTokenDataModule

        def resident_mib():
            return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

        data = BinTokenDataModule(BinDataConfig(
            train_path={str(tmp_path / "train.bin")!r}, val_path={data_config().val_path!r},
            block_size=256, batch_size=16,
        ))
        batches = iter(data.train_dataloader())
        next(batches)
        before, largest = resident_mib(), 0.0
        for x, y in islice(batches, 3000):
            assert x.shape == y.shape == (16, 256)
            largest = max(largest, resident_mib())
        print(len(data.train_dataset), largest - before)
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    sequences, grown = result.stdout.split()
    assert int(sequences) == (tokens - 257) // 256 + 1
    assert float(grown) < 64
