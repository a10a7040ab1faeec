import json
import pickle
import shutil
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch

from tiny_lm.data import BinDataConfig
from tiny_lm.data.bin.data_module import BinTokenDataModule
from tiny_lm.data.bin.dataset import IGNORE_INDEX, BinTokenDataset
from tiny_lm.data.bin.stream import open_stream
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


def test_a_glob_below_a_folder_with_brackets(data_config: MakeConfig, stream_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(stream_folder, tmp_path / "d [1]" / "s")
    config = data_config(train_path=str(tmp_path / "d [1]" / "s" / "trai*.bin"))
    assert open_stream(config.train_path, config).tokens == open_stream(data_config().train_path, config).tokens


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


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"eos_token_id": 2}, r"eos_token_id: is 2 in the data config but 509 in the metadata.json of"),
        ({"dtype": "uint32"}, r"dtype: is uint32 in the data config but uint16 in the metadata.json of"),
        (
            {"train_path": "nowhere/train.bin"},
            r"nowhere/train.bin: no such token stream; write one with `tiny-lm tokenize`",
        ),
        ({"block_size": 2**20}, r"tokens are too few for one sequence of block_size 1048576"),
        ({"batch_size": 2**19}, r"sequences, fewer than batch_size 524288; use more text"),
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
    with pytest.raises(UserError, match=r"train.bin: has [\d,]+ bytes but [\d,]+ according to its metadata.json"):
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


def test_the_folder_of_a_stream_is_not_its_file(data_config: MakeConfig, stream_folder: Path) -> None:
    with pytest.raises(UserError, match=r"but a folder; name a file in it, such as /\S+/train.bin$"):
        open_stream(str(stream_folder), data_config())


@pytest.mark.parametrize("path", ["", ".", "a**/b", "/", "~nobody/x.bin", "[", "\0"])
def test_paths_that_are_none(path: str, data_config: MakeConfig) -> None:
    with pytest.raises(UserError, match="no such token stream"):
        open_stream(path, data_config())


def test_streams_of_two_tokenizers_are_refused(data_config: MakeConfig, stream_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(stream_folder, tmp_path, dirs_exist_ok=True)
    metadata = json.loads((tmp_path / "metadata.json").read_text())
    (tmp_path / "metadata.json").write_text(json.dumps({**metadata, "tokenizer_hash": "0" * 64}))
    with pytest.raises(UserError, match="tokenizer does not match"):
        BinTokenDataModule(data_config(val_path=str(tmp_path / "val.bin")))
