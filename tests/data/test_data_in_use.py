"""Token streams in use: who holds them, and what happens where they are written again all the same."""

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tiny_lm.data import BinDataConfig
from tiny_lm.data.bin.data_module import BinTokenDataModule
from tiny_lm.data.bin.dataset import BinTokenDataset
from tiny_lm.data.bin.stream import hold_streams, open_stream, read_in_order
from tiny_lm.data.tokenize import tokenize_corpus
from tiny_lm.errors import UserError
from tiny_lm.tokenizer import Tokenizer

_HOLD = """
import sys
from tiny_lm.data import BinDataConfig
from tiny_lm.data.bin.stream import hold_streams, open_stream
config = BinDataConfig(train_path=sys.argv[1], val_path=sys.argv[1], block_size=8, batch_size=1)
with hold_streams(open_stream(sys.argv[1], config)):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def config(tmp_path: Path, stream_folder: Path) -> BinDataConfig:
    """Of a copy of the stream, which a test may change."""
    shutil.copytree(stream_folder, tmp_path / "stream")
    paths = {f"{name}_path": str(tmp_path / "stream" / f"{name}.bin") for name in ("train", "val")}
    return BinDataConfig(**paths, block_size=32, batch_size=4)


def test_a_stream_that_others_read_is_not_written_again(
    config: BinDataConfig, tokenizer: Tokenizer, stories: list[str], tmp_path: Path
) -> None:
    before = Path(config.train_path).read_bytes()
    command = [sys.executable, "-c", _HOLD, config.val_path]
    with subprocess.Popen(command, stdin=-1, stdout=-1, text=True) as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "held\n"
        with hold_streams(open_stream(config.train_path, config)):  # readers share it
            pass
        with pytest.raises(
            UserError, match=r"stream: another process uses this token stream; wait until it has finished"
        ):
            tokenize_corpus(tokenizer, {"train": stories[:5]}, tmp_path / "stream", source="other")
        assert Path(config.train_path).read_bytes() == before
        reader.kill()
    tokenize_corpus(tokenizer, {"train": stories[:5]}, tmp_path / "stream", source="other")
    assert Path(config.train_path).read_bytes() != before


@pytest.mark.parametrize("in_place", [True, False])
def test_a_validation_stream_that_was_written_again_is_not_read(config: BinDataConfig, in_place: bool) -> None:
    """Of as many bytes, before it is mapped for the first time."""
    data = BinTokenDataModule(config)
    _write_again(Path(config.val_path), in_place)
    with pytest.raises(UserError, match=r"val.bin: was rewritten since this command opened it"):
        next(iter(data.val_dataloader()))


def test_a_stream_that_was_replaced_is_still_read_as_it_was(config: BinDataConfig) -> None:
    """Once it is mapped; what was overwritten in place is gone."""
    data = BinTokenDataModule(config)
    x, _ = next(iter(data.val_dataloader()))
    _write_again(Path(config.val_path), in_place=False)
    again, _ = next(iter(data.val_dataloader()))
    assert x.equal(again)


def test_overwriting_a_mapped_stream_is_noticed_at_the_next_validation(config: BinDataConfig) -> None:
    data = BinTokenDataModule(config)
    next(iter(data.train_dataloader()))
    _write_again(Path(config.train_path), in_place=True)
    with pytest.raises(UserError, match=r"train.bin: was rewritten"):
        data.val_dataloader()


_READ_AFTER_CUT = """
import os, sys
from pathlib import Path
from tiny_lm.data import BinDataConfig
from tiny_lm.data.bin.dataset import BinTokenDataset
from tiny_lm.data.bin.stream import open_stream, read_in_order
from tiny_lm.errors import UserError
path = sys.argv[1]
config = BinDataConfig(train_path=path, val_path=path, block_size=8, batch_size=1)
stream = open_stream(path, config)
dataset, pieces = BinTokenDataset(stream, config), read_in_order(stream, 100)
dataset[0], next(pieces)
os.truncate(path, 1000)
for read in (lambda: dataset[len(dataset) - 1], lambda: next(pieces)):
    try:
        read()
    except UserError as error:
        print(error)
"""


def test_a_mapped_stream_that_is_cut_short_is_an_error_and_no_bus_error(config: BinDataConfig) -> None:
    """To read such a map behind the end of its file kills the process."""
    command = [sys.executable, "-c", _READ_AFTER_CUT, config.train_path]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result
    lines = result.stdout.splitlines()
    assert lines == [f"{config.train_path}: was rewritten since this command opened it; run the command again"] * 2


def test_a_stream_that_changed_before_it_was_held(config: BinDataConfig) -> None:
    stream = open_stream(config.train_path, config)
    _write_again(stream.files[0], in_place=False)
    with pytest.raises(UserError, match=r"train.bin: was rewritten"), hold_streams(stream):
        pass
    with pytest.raises(UserError, match=r"train.bin: was rewritten"):
        next(read_in_order(stream, 100))


def _write_again(file: Path, in_place: bool) -> None:
    """Write as many other bytes; the time is set, since the clock of files may tick slowly."""
    data = bytes(file.stat().st_size)
    if not in_place:
        file.unlink()
    file.write_bytes(data)
    os.utime(file, ns=(0, 1))


def test_more_shards_than_file_descriptors(tmp_path: Path, tokenizer: Tokenizer, stories: list[str]) -> None:
    """They are written and read, and each window is what it is with all files open at once."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(list(Path("/dev/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 60, hard))
    try:
        corpus = {f"train-{number:03d}": [stories[number]] for number in range(200)}
        tokenize_corpus(tokenizer, corpus, tmp_path, source="shards")
        path = str(tmp_path / "train-*.bin")
        config = BinDataConfig(train_path=path, val_path=path, block_size=16, batch_size=4)
        dataset = BinTokenDataset(open_stream(path, config), config)
        x, _ = dataset[range(len(dataset))]
        assert dataset[len(dataset) - 1][0].equal(x[-1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    whole, _ = BinTokenDataset(open_stream(path, config), config)[range(len(dataset))]
    assert x.equal(whole)
