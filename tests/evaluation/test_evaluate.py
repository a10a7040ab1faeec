"""What `tiny-lm eval` measures, on a run that was really trained."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tiny_lm.data import BinDataConfig
from tiny_lm.data.bin.dataset import BinTokenDataset
from tiny_lm.data.bin.stream import open_stream, read_in_order
from tiny_lm.errors import UserError
from tiny_lm.evaluation.evaluate import (
    EvaluationOptions,
    LoadedRun,
    bucket_positions,
    evaluate_run,
    load_run,
    measure_loss,
)
from tiny_lm.evaluation.generation import evaluation_prompts
from tiny_lm.evaluation.quality import measure_overlap
from tiny_lm.inference.request import Completion
from tiny_lm.inference.scoring import LossStats, token_losses
from tiny_lm.runs import Run

Silent = Callable[[str, int, int], None]

OPTIONS = EvaluationOptions(samples=5, max_new_tokens=40)


@pytest.fixture(scope="module")
def loaded(trained: Run) -> LoadedRun:
    return load_run(trained.folder, OPTIONS)


def test_blocked_loss_is_the_one_that_training_saw(loaded: LoadedRun, trained: Run, silent: Silent) -> None:
    last = load_run(trained.last_checkpoint, OPTIONS)
    reading, positions = measure_loss(last, None, silent)
    metrics = trained.read_metadata()["metrics"]
    nats, tokens = math.fsum(part.nats for part in positions), sum(part.tokens for part in positions)
    assert nats / tokens == pytest.approx(metrics["val_loss"], rel=1e-6)
    assert tokens == reading.tokens == last.val.tokens - 1
    assert (reading.method, reading.window, reading.stride) == ("blocked", 32, 32)


@pytest.mark.parametrize("stride", [1, 5, 31])
def test_sliding_predicts_each_token_once_with_enough_context(loaded: LoadedRun, stride: int, silent: Silent) -> None:
    """Against the definition, at the beginning of the stream: windows cut and scored one by one."""
    reading, _ = measure_loss(loaded, stride, silent)
    assert (reading.method, reading.tokens) == ("sliding", loaded.val.tokens - 1)
    tokens = torch.from_numpy(next(read_in_order(loaded.val, 500)).astype("int64"))
    dataset = BinTokenDataset(loaded.val, loaded.config, every_token=True, overlap=32 - stride)
    done = 0  # targets that were predicted
    for number in range(12):
        begin = number * stride
        with torch.no_grad():
            logits = loaded.generator.model(tokens[begin : begin + 32][None])
            x, y = dataset[number]
            found = token_losses(loaded.generator.model(x[None]), y[None]).sum()
        expected = token_losses(logits[:, done - begin :], tokens[done + 1 : begin + 33][None]).sum()
        assert float(found) == pytest.approx(float(expected), rel=1e-5)
        assert int((y != -100).sum()) == begin + 32 - done
        assert number == 0 or done - begin >= 32 - stride
        done = begin + 32


@pytest.mark.parametrize("block_size", [1, 7, 32])
@pytest.mark.parametrize("overlap_", [0, 3, 6])
def test_overlapping_windows_hold_each_target_once(
    data_config: Callable[..., BinDataConfig], block_size: int, overlap_: int
) -> None:
    if overlap_ >= block_size:
        overlap_ = block_size - 1
    config = data_config(block_size=block_size)
    stream = open_stream(config.val_path, config)
    dataset = BinTokenDataset(stream, config, every_token=True, overlap=overlap_)
    _, y = dataset[range(len(dataset))]
    targets = y[y != -100]
    assert len(targets) == stream.tokens - 1
    plain, _ = BinTokenDataset(stream, data_config(block_size=1), every_token=True)[range(1, stream.tokens - 1)]
    assert torch.equal(targets[:-1], plain[:, 0])


def test_buckets_hold_every_position_and_grow() -> None:
    for window in (1, 2, 3, 4, 31, 32, 256, 300):
        parts = bucket_positions([LossStats(2.0 * place, 2) for place in range(1, window + 1)])
        assert [part.first for part in parts] == [1, *(part.last + 1 for part in parts[:-1])]
        assert parts[-1].last == window
        assert sum(part.tokens for part in parts) == 2 * window
        assert all(part.loss == (part.first + part.last) / 2 for part in parts)
    assert [(part.first, part.last) for part in bucket_positions([LossStats(1.0, 1)] * 32)] == [
        (1, 1), (2, 3), (4, 7), (8, 15), (16, 32)
    ]  # fmt: skip


def test_an_evaluation_repeats_and_is_written_whole(loaded: LoadedRun, trained: Run, silent: Silent) -> None:
    first, second = (evaluate_run(loaded, OPTIONS, silent).to_dict() for _ in range(2))
    assert {**first, "created": ""} == {**second, "created": ""}
    other = evaluate_run(loaded, EvaluationOptions(samples=5, max_new_tokens=40, seed=1), silent)
    assert [story.text for story in other.samples] != [story["text"] for story in first["samples"]]
    path = other.save(trained)
    assert json.loads(path.read_text(encoding="utf-8")) == json.loads(json.dumps(other.to_dict()))
    assert other.quality.length.max <= 40
    assert other.bits_per_byte == pytest.approx(
        other.loss / math.log(2) * loaded.val.tokens / other.stream.bytes, rel=1e-9
    )


def test_memorised_text_shows(loaded: LoadedRun, stories: list[str], silent: Silent) -> None:
    tokenizer = loaded.generator.tokenizer
    known = tokenizer.encode(stories[3])[5:65]
    samples = [
        Completion("", tokenizer.decode(known), known, "stop", []),
        Completion("", "x", tokenizer.encode("xxxxxxxx"), "stop", []),
    ]
    stats, matches = measure_overlap(samples, loaded.train, loaded.val, tokenizer, silent)
    assert (stats.longest, matches[0].length, stats.text) == (60, 60, tokenizer.decode(known))
    assert matches[1].length < 8
    assert stats.share == pytest.approx(60 / (60 + len(samples[1].ids)))
    assert stats.validation is not None
    assert stats.validation.stories == 2


def test_evaluation_prompts_are_24_different_ones() -> None:
    prompts = evaluation_prompts()
    assert len(set(prompts)) == 24
    assert all(text == text.strip() and len(text.split()) > 5 for text in prompts)


@pytest.mark.parametrize(
    ("spoil", "settings", "message"),
    [
        ("checkpoints", (), "has no checkpoint yet"),
        ("", ("data.val_path=gone.bin",), "gone.bin: no such token stream"),
        ("", ("data.train_path=gone.bin",), "gone.bin: no such token stream"),
        ("tokenizer", (), "tokenizer"),
        ("run.json", (), "is not a run folder"),
    ],
)
def test_what_is_missing_is_named(
    spoil: str, settings: tuple[str, ...], message: str, trained: Run, tmp_path: Path
) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(trained.folder, copy)
    if spoil == "run.json":
        (copy / spoil).unlink()
    elif spoil:
        shutil.rmtree(copy / spoil)
    with pytest.raises(UserError, match=message):
        load_run(copy, EvaluationOptions(settings=settings))


def test_stride_beyond_block_size_is_rejected(trained: Run) -> None:
    with pytest.raises(UserError, match="--stride must be between 1 and block_size=32"):
        load_run(trained.folder, EvaluationOptions(stride=33))
