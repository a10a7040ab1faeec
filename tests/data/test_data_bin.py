import json
import pickle
import shutil
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch

from tiny_lm.data import BinDataConfig, StreamMetadata
from tiny_lm.data.bin import IGNORE_INDEX, BinTokenDataset, open_stream
from tiny_lm.data.module import BinTokenDataModule, ShuffledBatches
from tiny_lm.errors import UserError
from tiny_lm.tokenizer import Tokenizer

MakeConfig = Callable[..., BinDataConfig]


def open_dataset(config: BinDataConfig, **options: bool) -> BinTokenDataset:
    return BinTokenDataset(open_stream(config.train_path, config), config, **options)


@pytest.fixture
def ids(stream_folder: Path) -> np.ndarray:
    return np.fromfile(stream_folder / "train.bin", dtype="<u2").astype(np.int64)


@pytest.mark.parametrize("stride", [None, 1, 7, 32])
def test_windows_are_slices_of_the_stream(data_config: MakeConfig, ids: np.ndarray, stride: int | None) -> None:
    dataset = open_dataset(data_config(stride=stride))
    step = stride or 32
    assert len(dataset) == (len(ids) - 33) // step + 1
    for index in (0, 1, len(dataset) // 2, len(dataset) - 1):
        x, y = dataset[index]
        assert x.tolist() == ids[index * step : index * step + 32].tolist()
        assert y.tolist() == ids[index * step + 1 : index * step + 33].tolist()
    assert x.dtype == y.dtype == torch.int64


def test_a_batch_is_its_windows(data_config: MakeConfig) -> None:
    dataset = open_dataset(data_config())
    x, y = dataset[[5, 0, 5]]
    assert x.shape == y.shape == (3, 32)
    for row, index in enumerate([5, 0, 5]):
        assert torch.equal(x[row], dataset[index][0])
        assert torch.equal(y[row], dataset[index][1])


def test_evaluation_windows_hold_each_target_once(data_config: MakeConfig, ids: np.ndarray) -> None:
    dataset = open_dataset(data_config(stride=5), every_token=True)
    x, y = dataset[range(len(dataset))]
    counted = y[y != IGNORE_INDEX]
    assert counted.tolist() == ids[1:].tolist()
    assert x.flatten()[: len(ids) - 1].tolist() == ids[:-1].tolist()


def test_mask_after_eos_keeps_targets_up_to_the_first(data_config: MakeConfig, tokenizer: Tokenizer) -> None:
    plain, masked = (
        open_dataset(data_config(block_size=400)),
        open_dataset(data_config(block_size=400, mask_after_eos=True)),
    )
    y, y_masked = plain[range(20)][1], masked[range(20)][1]
    for row, row_masked in zip(y, y_masked, strict=True):
        ends = (row == tokenizer.eos_id).nonzero()
        end = int(ends[0]) + 1 if len(ends) else len(row)
        assert torch.equal(row_masked[:end], row[:end])
        assert (row_masked[end:] == IGNORE_INDEX).all()
    assert (y_masked == IGNORE_INDEX).any()


def test_a_glob_of_shards_is_one_stream(data_config: MakeConfig, stream_folder: Path, tmp_path: Path) -> None:
    ids = np.fromfile(stream_folder / "train.bin", dtype="<u2")
    shutil.copytree(stream_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "train.bin").unlink()
    metadata = json.loads((tmp_path / "metadata.json").read_text())
    whole = metadata["files"].pop("train.bin")
    parts = np.array_split(ids, 3)
    for number, part in enumerate(parts):
        part.tofile(tmp_path / f"train_{number}.bin")
        metadata["files"][f"train_{number}.bin"] = {**whole, "tokens": len(part)}
    (tmp_path / "metadata.json").write_text(json.dumps(metadata))
    dataset = open_dataset(data_config(train_path=str(tmp_path / "train_*.bin")))
    expected = [part[start : start + 32].tolist() for part in parts for start in range(0, len(part) - 32, 32)]
    assert dataset[range(len(dataset))][0].tolist() == expected


def test_shuffling_is_a_function_of_seed_and_batch() -> None:
    def take(count: int, *, seed: int = 1, start: int = 0, drop_last: bool = True) -> list[list[int]]:
        batches = iter(ShuffledBatches(10, 3, seed=seed, drop_last=drop_last, start=start))
        return [next(batches).tolist() for _ in range(count)]

    first = take(9)
    assert take(9) == first
    assert take(5, start=4) == first[4:]
    assert take(9, seed=2) != first
    epochs = [[window for batch in first[start : start + 3] for window in batch] for start in (0, 3, 6)]
    assert all(len(set(epoch)) == 9 for epoch in epochs)  # three batches of three different windows
    assert first[:3] != first[3:6]
    everything = take(4, drop_last=False)
    assert sorted(window for batch in everything for window in batch) == list(range(10))


def test_loader_gives_what_the_sampler_says_and_resumes_behind_it(data_config: MakeConfig) -> None:
    data = BinTokenDataModule(data_config(), seed=3)
    order = iter(ShuffledBatches(len(data.train_dataset), 4, seed=3, drop_last=True))
    expected = [data.train_dataset[next(order).tolist()] for _ in range(9)]
    loaded = iter(data.train_dataloader())
    for x, y in expected:
        batch = next(loaded)
        assert torch.equal(batch[0], x)
        assert torch.equal(batch[1], y)
    data.load_state_dict({"batches_seen": 7})
    assert torch.equal(next(iter(data.train_dataloader()))[0], expected[7][0])


def test_reading_leaves_the_resident_set_flat(tmp_path: Path, data_config: MakeConfig, stream_folder: Path) -> None:
    """4,096 windows spread over a sparse stream of 8 GB add less than 64 MiB to the resident set."""
    tokens = 4 * 10**9
    metadata = StreamMetadata.read(stream_folder).to_dict()
    metadata["files"] = {"train.bin": {**metadata["files"]["train.bin"], "tokens": tokens}}
    (tmp_path / "metadata.json").write_text(json.dumps(metadata))
    with (tmp_path / "train.bin").open("wb") as file:
        file.truncate(2 * tokens)
    dataset = open_dataset(data_config(train_path=str(tmp_path / "train.bin"), block_size=1024))

    def resident_mib() -> float:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * 4096 / 2**20

    rng = np.random.default_rng(0)
    dataset[rng.integers(len(dataset), size=16)]
    before = resident_mib()
    for _ in range(256):
        dataset[rng.integers(len(dataset), size=16)]
    assert resident_mib() - before < 64


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"eos_token_id": 2}, r"eos_token_id: the data config says 2, the metadata.json beside .* says 509"),
        ({"dtype": "uint32"}, r"dtype: the data config says uint32, the metadata.json beside .* says uint16"),
        (
            {"train_path": "nowhere/train.bin"},
            r"nowhere/train.bin: no such token stream; write one with `tiny-lm tokenize`",
        ),
        ({"block_size": 2**20}, r"tokens are too few for one window of block_size 1048576"),
        ({"batch_size": 2**19}, r"windows, fewer than batch_size 524288; use more text"),
    ],
)
def test_what_does_not_fit_is_one_line(data_config: MakeConfig, values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        BinTokenDataModule(data_config(**values))
    assert "\n" not in str(caught.value)


def test_damaged_stream_is_one_line(data_config: MakeConfig, stream_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(stream_folder, tmp_path, dirs_exist_ok=True)
    with (tmp_path / "train.bin").open("ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match=r"train.bin: has [\d,]+ bytes where its metadata.json says"):
        BinTokenDataModule(data_config(train_path=str(tmp_path / "train.bin")))
    (tmp_path / "other.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"other.bin: is not listed in"):
        BinTokenDataModule(data_config(train_path=str(tmp_path / "other.bin")))


def test_an_id_outside_the_vocabulary_is_one_line(data_config: MakeConfig, stream_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(stream_folder, tmp_path, dirs_exist_ok=True)
    ids = np.fromfile(tmp_path / "train.bin", dtype="<u2")
    ids[40] = 60_000
    ids.tofile(tmp_path / "train.bin")
    dataset = open_dataset(data_config(train_path=str(tmp_path / "train.bin")))
    assert dataset[[0]][0].max() < 512
    with pytest.raises(UserError, match="holds the token id 60000, but its tokenizer has 512 tokens"):
        dataset[[1]]


def test_a_loader_process_gets_no_copy_of_the_tokens(data_config: MakeConfig) -> None:
    dataset = open_dataset(data_config())
    window = dataset[3]
    sent = pickle.dumps(dataset)
    assert len(sent) < 10_000
    received = ForkingPickler.loads(sent)  # as a loader process reads it
    assert torch.equal(received[3][0], window[0])


@pytest.mark.parametrize("path", ["", ".", "a**/b", "/", "~nobody/x.bin", "[", "\0"])
def test_paths_that_are_none(path: str, data_config: MakeConfig) -> None:
    with pytest.raises(UserError, match="no such token stream"):
        open_stream(path, data_config())


def test_streams_of_two_tokenizers_are_refused(data_config: MakeConfig, stream_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(stream_folder, tmp_path, dirs_exist_ok=True)
    metadata = json.loads((tmp_path / "metadata.json").read_text())
    (tmp_path / "metadata.json").write_text(json.dumps({**metadata, "tokenizer_hash": "0" * 64}))
    with pytest.raises(UserError, match="were written by different tokenizers"):
        BinTokenDataModule(data_config(val_path=str(tmp_path / "val.bin")))
