"""What watches a run: sample stories, MFU, the machine's figures, the progress bar."""

import json
import os
import pty
import re
import select
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import losses, model, training
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tiny_lm.data import BinDataConfig
from tiny_lm.hardware.flops import data_sheet_peak, peak_flops
from tiny_lm.hardware.memory import peak_memory
from tiny_lm.inference import TextGenerator
from tiny_lm.model import build_model, flops_per_token
from tiny_lm.runs import Run, read_metrics
from tiny_lm.tokenizer import Tokenizer
from tiny_lm.training.callbacks.gpu import GpuStatsMonitor
from tiny_lm.training.callbacks.samples import SEED, TEMPERATURE, _quote, truncate_samples
from tiny_lm.training.fit import TrainingResult, train

Fit = Callable[..., TrainingResult]


@pytest.fixture
def fit(data_config: Callable[..., BinDataConfig], run: Run) -> Fit:
    def do(run: Run = run, resume_from: Path | None = None, **values: Any) -> TrainingResult:
        return train(model(), training(**{"sample_tokens": 8, **values}), data_config(), run, resume_from=resume_from)

    return do


# --- sample stories --------------------------------------------------------------------------------------------------


def sections(run: Run) -> list[int]:
    return [int(step) for step in re.findall(r"^## Step (\d+)$", run.samples.read_text(), flags=re.MULTILINE)]


def test_each_validation_tells_the_stories_that_generate_would_tell(fit: Fit, run: Run, tokenizer: Tokenizer) -> None:
    prompts = ["Once upon a time", "One day"]
    fit(sample_prompts=prompts)
    text = run.samples.read_text(encoding="utf-8")
    assert sections(run) == [6, 12]
    last = {event["step"]: event for event in read_metrics(run.metrics)}[12]
    assert f"val loss {last['val_loss']:.4f}, {12 * 4 * 32:,} tokens seen" in text
    generator = TextGenerator.from_checkpoint(run.last_checkpoint, run.tokenizer)
    generator.model.use_blocked_attention()  # as training did
    final = text.split("## Step 12")[1]
    for prompt in prompts:
        story = generator.generate(prompt, 8, temperature=TEMPERATURE, seed=SEED)
        assert _quote(prompt, story) in final


def test_stories_leave_training_as_it_was(fit: Fit, tmp_path: Path) -> None:
    """Dropout is drawn from the same random numbers with them and without."""
    told, untold = Run(tmp_path / "told"), Run(tmp_path / "untold")
    fit(run=told, val_every_n_steps=2)
    fit(run=untold, val_every_n_steps=2, sample_tokens=0)
    assert losses(told) == losses(untold)
    assert not untold.samples.exists()


def test_a_resumed_run_tells_each_story_once_and_the_same(fit: Fit, run: Run) -> None:
    fit(val_every_n_steps=2, keep_checkpoints=9)
    whole = run.samples.read_bytes()
    fit(val_every_n_steps=2, keep_checkpoints=9, resume_from=run.checkpoints / "step-00000004.ckpt")
    assert run.samples.read_bytes() == whole
    assert sections(run) == [2, 4, 6, 8, 10, 12]


def test_a_story_cannot_pass_for_a_heading(tmp_path: Path) -> None:
    path = tmp_path / "samples.md"
    path.write_text("# head\n\n## Step 2\n\n> told  \n> ## Step 9\n\n## Step 5\n\n> gone\n", encoding="utf-8")
    truncate_samples(path, 2)
    assert path.read_text(encoding="utf-8") == "# head\n\n## Step 2\n\n> told  \n> ## Step 9\n\n"
    truncate_samples(tmp_path / "none.md", 2)  # nothing to forget


def test_samples_of_a_very_long_run_do_not_stop_it(tmp_path: Path) -> None:
    path = tmp_path / "samples.md"
    section = b"## Step 2\n\n> " + b"x" * 2**20 + b"\n\n"
    path.write_bytes(section * 40 + b"## Step 5\n\n> gone\n\n## Ste")  # killed while it wrote
    truncate_samples(path, 2)
    assert path.read_bytes() == section * 40


@pytest.mark.parametrize(
    ("prompt", "story"),
    [
        ("Once", "Once *upon* a <b>time</b>\n# no heading\n\n    no code `x` [link](http://x)\n1. one\n- two"),
        ("", "\x1b[31mred\x00"),
        ("A dot.", "A dot.B & c | d ~ e $f$"),
        ("two\nlines ", "two\nlines here\\"),
    ],
)
def test_markdown_shows_a_story_as_it_is(prompt: str, story: str) -> None:
    markdown_it = pytest.importorskip("markdown_it")
    rendered = markdown_it.MarkdownIt().render(_quote(prompt, story))
    tags = set(re.findall(r"<(/?\w+)", rendered))
    assert tags <= {"blockquote", "/blockquote", "p", "/p", "br", "strong", "/strong"}
    import html

    shown = html.unescape(re.sub(r"<[^>]*>", "", rendered)).replace("\xa0", " ")
    expected = re.sub(r"[\x00-\x09\x0b-\x1f]", "\N{REPLACEMENT CHARACTER}", story)
    assert " ".join(shown.split()).replace("**", "") == " ".join(expected.split())


# --- MFU -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "smalllm", "llama3", "qwen3"])
@pytest.mark.parametrize("values", [{}, {"qkv_bias": True, "n_layers": 1, "vocab_size": 77}])
def test_flops_in_closed_form_are_what_torch_counts(family: str, values: dict[str, Any]) -> None:
    config = model(family, **values)
    network = build_model(config)
    ids = torch.zeros(3, 20, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        network(ids).sum().backward()
    assert counter.get_total_flops() == ids.numel() * flops_per_token(config, 20)


def test_a_run_notes_mfu_and_what_it_is_a_share_of(fit: Fit, run: Run) -> None:
    fit()
    record = json.loads(run.metadata_file.read_text())
    assert record["peak_flops"]["source"] in ("measured", "table")
    assert record["flops_per_token"] == flops_per_token(model(), 32)
    for event in read_metrics(run.metrics):
        ideal = record["flops_per_token"] / record["peak_flops"]["value"]
        assert event["mfu"] == pytest.approx(event["tokens_per_sec"] * ideal)
        assert 0 < event["mfu"] < 1


def test_the_probe_draws_no_random_numbers_and_runs_once() -> None:
    peak_flops.cache_clear()
    state = torch.get_rng_state()
    first = peak_flops("cpu", "32-true")
    assert torch.equal(torch.get_rng_state(), state)
    assert first.source == "measured"
    assert first.value > 1e8
    assert peak_flops("cpu", "32-true") is first


def test_data_sheets_know_devices_by_their_whole_name() -> None:
    assert data_sheet_peak("NVIDIA H100 80GB HBM3", "bf16-mixed") == 989.4e12
    assert data_sheet_peak("NVIDIA A100-SXM4-40GB", "32-true") == 156e12
    assert data_sheet_peak("NVIDIA L4", "bf16-mixed") == 121e12
    assert data_sheet_peak("Tesla T4", "16-mixed") == 65e12
    for other in ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA L4 Laptop GPU", "x"):
        assert data_sheet_peak(other, "bf16-mixed") is None


# --- the machine -----------------------------------------------------------------------------------------------------


def test_memory_and_load_of_the_process_are_noted(fit: Fit, run: Run) -> None:
    fit(system_metrics_every_n_steps=5)
    events = [event for event in read_metrics(run.metrics) if "process_cpu_percent" in event]
    assert [event["step"] for event in events] == [5, 10]
    for event in events:
        assert 0 < event["process_cpu_percent"] < 100 * (os.cpu_count() or 1) + 50
        assert 50 < event["process_memory_mb"] <= event["process_peak_memory_mb"] * 1.01
    assert (
        json.loads(run.metadata_file.read_text())["memory"]["process_peak_memory_mb"]
        <= peak_memory()["process_peak_memory_mb"]
    )


@pytest.mark.parametrize("library_is_there", [True, False])
def test_what_a_gpu_tells_is_noted_and_the_rest_left_out(
    library_is_there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU is played: its memory torch knows itself, load and temperature need a library."""

    def answer(value: int) -> Callable[[], int]:
        def tell() -> int:
            if not library_is_there:
                raise ModuleNotFoundError("pynvml does not seem to be installed")
            return value

        return tell

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 3 * 2**20)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5 * 2**20)
    monkeypatch.setattr(torch.cuda, "utilization", answer(97))
    monkeypatch.setattr(torch.cuda, "temperature", answer(61))
    event: dict[str, float] = {}
    monitor = GpuStatsMonitor(10, event)
    trainer: Any = None  # it asks nothing of it
    monitor.on_step_end(trainer, None, 9)
    assert event == {}
    monitor.on_step_end(trainer, None, 10)
    told = {key: value for key, value in event.items() if key.startswith("gpu_")}
    load = {"gpu_utilization_percent": 97, "gpu_temperature_c": 61} if library_is_there else {}
    assert told == {"gpu_memory_mb": 3, "gpu_peak_memory_mb": 5, **load}


# --- the progress bar ------------------------------------------------------------------------------------------------


def test_the_progress_bar_fits_into_80_columns_of_a_terminal(stream_folder: Path, tmp_path: Path) -> None:
    config = training(max_steps=60, val_every_n_steps=20, sample_tokens=0)
    code = f"""
        from pathlib import Path
        from tiny_lm.data import BinDataConfig
        from tiny_lm.model import model_config_from_dict
        from tiny_lm.runs import Run
        from tiny_lm.training import TrainingConfig
        from tiny_lm.training.fit import train
        model = model_config_from_dict({model().to_dict()!r}, source="test")
        data = BinDataConfig(
            train_path={str(stream_folder / "train.bin")!r}, val_path={str(stream_folder / "val.bin")!r},
            block_size=32, batch_size=4,
        )
        run = Run(Path({str(tmp_path / "run")!r}))
        train(model, TrainingConfig.from_dict({config.to_dict()!r}), data, run)
    """
    main, terminal = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stderr=terminal, env=environment)
    os.close(terminal)
    screen = b""
    while select.select([main], [], [], 120)[0]:
        try:
            part = os.read(main, 65536)
        except OSError:  # the terminal is closed
            break
        if not part:
            break
        screen += part
    os.close(main)
    assert child.wait(timeout=60) == 0
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.decode()))
    bars = [line for line in lines if "/60" in line]
    assert max(map(len, bars)) <= 80
    assert any(re.search(r"\d+/60 +loss \d\.\d+  val \d\.\d+  [\d,]+ tok/s ETA +[\d:]+", line) for line in bars), bars
