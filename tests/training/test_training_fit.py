import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import FAMILIES, losses, model, training

from tiny_lm.data import BinDataConfig
from tiny_lm.errors import UserError
from tiny_lm.model.checkpoint import load_checkpoint_model, read_checkpoint
from tiny_lm.runs import Run, read_metrics
from tiny_lm.tokenizer import TokenizerConfig, train_tokenizer
from tiny_lm.training.fit import TrainingResult, train

GOLDEN = Path(__file__).with_name("golden_loss.txt")

Fit = Callable[..., TrainingResult]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_learns(family: str, fit: Fit, run: Run) -> None:
    result = fit(config=model(family, dropout=0.0), max_steps=40, val_every_n_steps=20, learning_rate=1e-2)
    assert result.finished
    curve = losses(run)
    assert curve[1] == pytest.approx(6.24, abs=0.3)  # ln 512: a fresh model knows nothing
    assert curve[40] < curve[1] - 0.7


def test_run_folder_holds_what_the_design_says(fit: Fit, run: Run, stream_folder: Path) -> None:
    result = fit(keep_checkpoints=2)
    names = sorted(path.name for path in run.checkpoints.iterdir())
    assert names == ["best.ckpt", "last.ckpt", "step-00000008.ckpt", "step-00000012.ckpt"]
    assert sorted(path.name for path in run.configs.iterdir()) == ["data.yaml", "model.yaml", "training.yaml"]
    assert (run.tokenizer / "tokenizer.json").read_bytes() == (
        stream_folder / "tokenizer" / "tokenizer.json"
    ).read_bytes()
    record = json.loads(run.metadata_file.read_text())
    assert record["status"] == "finished"
    assert record["steps"] == 12
    assert record["tokens"] == 12 * 4 * 32
    assert record["metrics"]["val_loss"] == result.metrics["val_loss"]
    assert record["environment"]["versions"]["torch"] == torch.__version__
    assert record["environment"]["processor"].endswith(f" {os.cpu_count()} cores")
    events = read_metrics(run.metrics)
    assert all("step" in event and "timestamp" in event for event in events)
    assert {"train_loss", "train_ppl", "val_loss", "val_ppl", "val_bpb", "lr", "tokens", "tokens_per_sec"} <= {
        *events[-1]
    }
    assert [event["step"] for event in events if "val_loss" in event] == [6, 12]
    assert [event["step"] for event in events if "process_peak_memory_mb" in event] == [5, 10]
    formats = (Path(__file__).parents[2] / "docs" / "formats.md").read_text()
    assert [key for key in {*chain(*events)} - {"step", "timestamp"} if f"`{key}`" not in formats] == []


def test_val_loss_is_the_mean_over_every_token(fit: Fit, run: Run, data_config: Callable[..., BinDataConfig]) -> None:
    """The reported loss is what one pass over the stream by hand gives, and bits per byte follow from it."""
    import numpy as np

    result = fit()
    network = load_checkpoint_model(run.last_checkpoint).model
    folder = Path(data_config().val_path).parent
    ids = torch.from_numpy(np.fromfile(folder / "val.bin", dtype="<u2").astype(np.int64))
    nats = 0.0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, 32):
            window = ids[start : start + 33]
            log_probabilities = network(window[None, :-1])[0].log_softmax(-1)
            nats -= float(log_probabilities.gather(1, window[1:, None]).sum())
    assert result.metrics["val_loss"] == pytest.approx(nats / (len(ids) - 1), abs=1e-4)
    assert result.metrics["val_ppl"] == pytest.approx(2.718281828 ** result.metrics["val_loss"], rel=1e-6)
    text_bytes = json.loads((folder / "metadata.json").read_text())["files"]["val.bin"]["bytes"]
    assert result.metrics["val_bpb"] == pytest.approx(nats / 0.69314718 / text_bytes, rel=1e-3)


def test_golden_loss_curve(fit: Fit, run: Run) -> None:
    """A refactor must not move the curve of a seeded run. To accept a new one: delete the file and run the test."""
    fit(seed=7, max_steps=30, accumulate_grad_batches=2, config=model("qwen3"))
    curve = losses(run)
    if not GOLDEN.exists():
        GOLDEN.write_text("".join(f"{step} {loss:.5f}\n" for step, loss in curve.items()))
        pytest.fail(f"there was no golden curve; this one was written to {GOLDEN}: look at it and commit it")
    golden = {int(step): float(loss) for step, loss in map(str.split, GOLDEN.read_text().splitlines())}
    assert curve == pytest.approx(golden, abs=2e-4)


def test_accumulation_is_a_larger_batch(data_config: Callable[..., BinDataConfig], tmp_path: Path) -> None:
    """Two micro-batches of 4 take the step that one of 8 takes: the sampler draws the same windows in order."""
    quiet = model(dropout=0.0)
    runs = [Run(tmp_path / "one"), Run(tmp_path / "two")]
    train(quiet, training(), data_config(batch_size=8), runs[0])
    train(quiet, training(accumulate_grad_batches=2), data_config(batch_size=4), runs[1])
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), abs=1e-4)


def test_validation_may_be_cut_but_not_after_the_last_step(fit: Fit, run: Run, tmp_path: Path) -> None:
    full = fit(run=Run(tmp_path / "full"))
    cut = fit(val_max_tokens=64)
    curves = [
        [event["val_loss"] for event in read_metrics(result.run.metrics) if "val_loss" in event]
        for result in (full, cut)
    ]
    assert curves[0][0] != curves[1][0]
    assert curves[0][1] == curves[1][1]


def test_bf16_compile_and_gradient_checkpointing_train(fit: Fit, tmp_path: Path) -> None:
    plain, other = Run(tmp_path / "plain"), Run(tmp_path / "other")
    fit(run=plain, max_steps=4)
    fit(run=other, max_steps=4, gradient_checkpointing=True)
    assert losses(other) == pytest.approx(losses(plain), abs=1e-5)
    fit(run=Run(tmp_path / "bf16"), max_steps=4, precision="bf16-mixed")
    assert losses(Run(tmp_path / "bf16")) == pytest.approx(losses(plain), abs=0.05)


def test_compiled_run_leaves_an_ordinary_checkpoint(fit: Fit, run: Run) -> None:
    torch._dynamo.reset()  # other tests may have used up the number of times that one function is compiled
    fit(max_steps=2, compile=True, config=model(dropout=0.0))
    keys = torch.load(run.last_checkpoint, weights_only=True)["state_dict"]
    assert not [key for key in keys if "_orig_mod" in key]
    assert load_checkpoint_model(run.last_checkpoint).step == 2


def test_ctrl_c_leaves_a_checkpoint_to_go_on_from(stream_folder: Path, tmp_path: Path) -> None:
    endless = training(max_steps=100_000, val_every_n_steps=10**6, save_every_n_steps=10**6)
    code = f"""
        from pathlib import Path
        from tiny_lm.data import BinDataConfig
        from tiny_lm.model import model_config_from_dict
        from tiny_lm.runs import Run
        from tiny_lm.training import TrainingConfig
        from tiny_lm.training.fit import train
        model = model_config_from_dict({model().to_dict()!r}, source="test")
        training = TrainingConfig.from_dict({endless.to_dict()!r})
        data = BinDataConfig(
            train_path={str(stream_folder / "train.bin")!r}, val_path={str(stream_folder / "val.bin")!r},
            block_size=32, batch_size=4,
        )
        result = train(model, training, data, Run(Path({str(tmp_path / "run")!r})))
        print(result.finished, result.steps)
    """
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    run = Run(tmp_path / "run")
    deadline = time.monotonic() + 120
    while not (run.metrics.exists() and len(run.metrics.read_text().splitlines()) > 3):
        assert child.poll() is None, child.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.kill(child.pid, signal.SIGINT)
    stdout, stderr = child.communicate(timeout=120)
    finished, steps = stdout.split()
    assert finished == "False"
    assert "stopping after this step" in stderr
    assert load_checkpoint_model(run.last_checkpoint).step == int(steps)
    assert json.loads(run.metadata_file.read_text())["status"] == "stopped"


# --- mistakes --------------------------------------------------------------------------------------------------------


def test_block_size_above_the_context(fit: Fit) -> None:
    with pytest.raises(UserError, match="block_size 32 of the data config is above context_length 16"):
        fit(config=model(context_length=16))


def test_model_with_too_small_a_vocabulary(fit: Fit) -> None:
    with pytest.raises(UserError, match="vocab_size 300 of the model config is below the 512 tokens"):
        fit(config=model(vocab_size=300))


def test_stream_without_its_tokenizer_or_with_another(
    data_config: Callable[..., BinDataConfig], run: Run, tmp_path: Path, stories: list[str]
) -> None:
    stream = tmp_path / "stream"
    shutil.copytree(Path(data_config().train_path).parent, stream)
    data = data_config(train_path=str(stream / "train.bin"), val_path=str(stream / "val.bin"))
    shutil.rmtree(stream / "tokenizer")
    with pytest.raises(UserError, match="tokenizer"):
        train(model(), training(), data, run)
    config = TokenizerConfig(name="other", vocab_size=512, dataset_config="x")
    train_tokenizer(config, stories[:3]).save(stream / "tokenizer")
    with pytest.raises(UserError, match=r"tokenizer: tokenizer does not match .*train.bin"):
        train(model(), training(), data, run)
    assert not run.folder.exists()


def test_damaged_and_foreign_checkpoints(fit: Fit, run: Run, tmp_path: Path) -> None:
    fit(max_steps=1)
    whole = run.last_checkpoint.read_bytes()

    truncated = tmp_path / "truncated.ckpt"
    truncated.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"truncated.ckpt: is damaged or not a checkpoint"):
        read_checkpoint(truncated)

    foreign = tmp_path / "foreign.ckpt"
    torch.save({"state_dict": {}}, foreign)
    with pytest.raises(UserError, match=r"foreign.ckpt: is not a tiny-lm checkpoint"):
        read_checkpoint(foreign)

    with pytest.raises(UserError, match=r"missing.ckpt: no such checkpoint"):
        read_checkpoint(tmp_path / "missing.ckpt")


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_a_pickle_in_disguise_is_refused_and_not_run(tmp_path: Path) -> None:
    evidence = tmp_path / "executed"
    plain = tmp_path / "plain.ckpt"
    plain.write_bytes(pickle.dumps(Bomb(evidence)))
    with pytest.raises(UserError, match="is damaged or not a checkpoint"):
        read_checkpoint(plain)
    zipped = tmp_path / "zipped.ckpt"
    torch.save({"tiny_lm": Bomb(evidence)}, zipped)
    with pytest.raises(UserError, match="rejected: damaged, or contains more than weights"):
        read_checkpoint(zipped)
    assert not evidence.exists()
    function, arguments = Bomb(evidence).__reduce__()
    function(*arguments)
    assert evidence.exists()  # the bomb is a real one


def test_a_full_disk_ends_in_one_line_and_keeps_the_last_good_checkpoint(
    fit: Fit, run: Run, stream_folder: Path, tmp_path: Path
) -> None:
    """The limit on the size of a file stands for the end of the disk: both end a write in the middle."""
    fit(max_steps=4)
    good = run.last_checkpoint.read_bytes()
    code = f"""
        import resource
        from pathlib import Path
        from tiny_lm.data import BinDataConfig
        from tiny_lm.errors import UserError
        from tiny_lm.model import model_config_from_dict
        from tiny_lm.runs import Run
        from tiny_lm.training import TrainingConfig
        from tiny_lm.training.fit import train
        run = Run(Path({str(run.folder)!r}))
        model = model_config_from_dict({model().to_dict()!r}, source="test")
        data = BinDataConfig(
            train_path={str(stream_folder / "train.bin")!r}, val_path={str(stream_folder / "val.bin")!r},
            block_size=32, batch_size=4,
        )
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            train(model, TrainingConfig.from_dict({training().to_dict()!r}), data, run, resume_from=run.last_checkpoint)
        except UserError as error:
            print(error)
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert "could not be written" in result.stdout, result.stderr[-3000:]
    assert run.last_checkpoint.read_bytes() == good
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["best.ckpt", "last.ckpt", "step-00000004.ckpt"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the memory of a process in this way")
def test_too_little_memory_ends_in_one_line(data_config: Callable[..., BinDataConfig], run: Run) -> None:
    """On a CPU torch has no error class for it. The logits alone would take 2 GB, a quarter of a GB is left."""
    import resource

    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    taken = int(status["VmData"].split()[0]) * 2**10
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (taken + 2**28, limits[1]))
    try:
        with pytest.raises(UserError, match=r"^out of memory: lower batch_size and raise accumulate_grad_batches") as e:
            train(model(), training(), data_config(batch_size=2**15, drop_last=False), run)
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, limits)
    assert "\n" not in str(e.value)
    assert run.read_metadata()["status"] == "failed"


def test_a_checkpoint_moved_elsewhere_still_loads(fit: Fit, run: Run, tmp_path: Path) -> None:
    fit(max_steps=1)
    shutil.copy(run.last_checkpoint, tmp_path / "copy.ckpt")
    assert load_checkpoint_model(tmp_path / "copy.ckpt").config == model()
    with pytest.raises(UserError, match="was trained with another model config: d_model is 32, not 64"):
        load_checkpoint_model(tmp_path / "copy.ckpt", config=model(d_model=64))
