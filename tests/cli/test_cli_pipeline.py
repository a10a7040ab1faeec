"""Every command on real stories, as a user types them."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tiny_lm.runs import read_metrics

MODELS = {
    "gpt2": "n_heads: 2\nd_ff: 64\nqkv_bias: false\n",
    "smalllm": "n_heads: 2\nd_ff: 64\n",
    "llama3": "n_heads: 4\nn_kv_heads: 2\n",
    "qwen3": "n_heads: 4\nn_kv_heads: 2\n",
}


@pytest.fixture
def corpus(workplace: Path, tinystories: Path) -> Path:
    """Config files in the working directory for the real stories, a small tokenizer and a short training."""
    (workplace / "stories.yaml").write_text(
        f"name: {tinystories}\nsource: local\nsplits: {{train: train.txt, validation: valid.txt}}\n"
    )
    (workplace / "bpe.yaml").write_text("name: bpe\ntype: BPE\nvocab_size: 1024\ndataset_config: stories.yaml\n")
    (workplace / "training.yaml").write_text(
        "max_steps: 6\nlearning_rate: 3.0e-3\nprecision: 32-true\nval_every_n_steps: 3\nsave_every_n_steps: 3\n"
    )
    (workplace / "data.yaml").write_text(
        "train_path: data/bpe-tokenized/train.bin\nval_path: data/bpe-tokenized/val.bin\n"
        "block_size: 64\nbatch_size: 8\ndtype: uint16\n"
    )
    for family, rest in MODELS.items():
        (workplace / f"{family}.yaml").write_text(
            f"architecture: {family}\nvocab_size: 1024\ncontext_length: 64\nd_model: 32\nn_layers: 2\n{rest}"
        )
    return workplace


def test_raw_text_to_a_story_for_every_family(corpus: Path, cli: Callable[..., object]) -> None:
    result = cli("data", "download", "--config", "stories.yaml")
    assert (result.code, result.stdout.split("  ", 1)[1].count("documents")) == (0, 2)
    assert "train: 4,540 documents" in result.stdout
    result = cli("tokenizer", "train", "--config", "bpe.yaml")
    assert result.stdout == "tokenizers/bpe: 1,024 tokens\n"
    result = cli("tokenizer", "inspect", "tokenizers/bpe", "--text", "The bear")
    assert "'The'" in result.stdout
    result = cli("tokenize", "--config", "bpe.yaml")
    assert re.search(r"train.bin: [\d,]+ tokens, 4,540 documents", result.stdout), result
    for family in MODELS:
        name = f"run-{family}"
        options = [
            "--training-config",
            "training.yaml",
            "--data-config",
            "data.yaml",
            "--set",
            f"training.run_name={name}",
        ]
        result = cli("train", "--model-config", f"{family}.yaml", *options)
        assert result.code == 0, result.stderr
        assert "bits per byte" in result.stdout
        assert (corpus / "runs" / name / "plots" / "loss.png").read_bytes().startswith(b"\x89PNG")
        assert [e["step"] for e in read_metrics(corpus / "runs" / name / "metrics.jsonl") if "val_loss" in e] == [3, 6]
        told = [
            cli("generate", f"runs/{name}", "--prompt", "One day", "--max-new-tokens", "12", "--seed", "1")
            for _ in "ab"
        ]
        assert told[0].code == 0
        assert told[0].stdout == told[1].stdout
        assert told[0].stdout.startswith("One day")
        assert told[0].stderr == ""


@pytest.fixture
def streams(corpus: Path, cli: Callable[..., object]) -> Path:
    """The corpus, tokenized."""
    cli("tokenizer", "train", "--config", "bpe.yaml")
    cli("tokenize", "--config", "bpe.yaml")
    return corpus


TRAIN = ["train", "--model-config", "gpt2.yaml", "--training-config", "training.yaml", "--data-config", "data.yaml"]


def test_resuming_by_itself_and_by_name(streams: Path, cli: Callable[..., object]) -> None:
    result = cli(*TRAIN, "--resume", "auto")  # nothing to resume from: a new run
    assert "a new run" in result.stderr
    (run,) = (streams / "runs").iterdir()
    assert re.fullmatch(r"gpt2-data-\d{8}-\d{6}", run.name)
    result = cli(*TRAIN, "--resume", "auto", "--set", "training.max_steps=9")
    assert f"resuming from runs/{run.name}/checkpoints/last.ckpt" in result.stderr
    assert json.loads((run / "run.json").read_text())["steps"] == 9
    result = cli("train", "--resume", f"runs/{run.name}", "--set", "training.max_steps=12")
    assert json.loads((run / "run.json").read_text())["steps"] == 12
    result = cli(
        "train", "--resume", f"runs/{run.name}/checkpoints/step-00000009.ckpt", "--set", "training.max_steps=10"
    )
    assert "step-00000009.ckpt" in result.stderr
    assert list((streams / "runs").iterdir()) == [run]
    steps = [event["step"] for event in read_metrics(run / "metrics.jsonl") if "val_loss" in event]
    assert steps == [3, 6, 9, 10]


def test_a_run_that_fails_shows_how_it_came_to_that(streams: Path, cli: Callable[..., object]) -> None:
    """The loss is no number from the first update on; the curve up to there and the report are drawn all the same."""
    wild = {"learning_rate": 10.0, "weight_decay": 3e38, "grad_clip_norm": 0, "scheduler": "none"}
    settings = [f"--set=training.{key}={value}" for key, value in {**wild, "log_every_n_steps": 1}.items()]
    result = cli(*TRAIN, *settings)
    assert result.code == 2
    assert result.stdout == ""
    assert result.stderr.splitlines()[-1].startswith("error: the loss is ")
    (run,) = (streams / "runs").iterdir()
    assert json.loads((run / "run.json").read_text())["status"] == "failed"
    assert (run / "plots" / "loss.png").is_file()
    assert "failed" in (run / "report.html").read_text()


def test_a_run_that_is_there_is_not_overwritten(streams: Path, cli: Callable[..., object]) -> None:
    command = [*TRAIN, "--set", "training.run_name=mine"]
    assert cli(*command).code == 0
    result = cli(*command)
    assert result.code == 2
    assert result.stderr == "error: runs/mine: already exists; resume with --resume auto, or choose another run_name\n"


def test_dry_run_prints_resolved_configs_and_writes_nothing(workplace: Path, cli: Callable[..., object]) -> None:
    result = cli("train", "speed", "--set", "training.max_steps=7", "--dry-run")
    assert result.code == 0
    assert "max_steps: 7" in result.stdout
    assert "d_model: 384" in result.stdout
    assert "train_path: data/tinystories-8k-tokenized/train.bin" in result.stdout
    assert cli("tokenize", "--config", "tinystories-8k", "--dry-run").stdout.count("roneneldan/TinyStories") == 1
    assert list(workplace.iterdir()) == []


def test_stories_are_written_and_read_back(workplace: Path, cli: Callable[..., object]) -> None:
    assert cli("data", "stories", "--count", "50", "-o", "s.txt").stdout == "s.txt: 50 stories\n"
    assert (workplace / "s.txt").read_text().count("<|endoftext|>") == 50
    (workplace / "own.yaml").write_text("name: s.txt\nsource: local\n")
    assert "train: 50 documents" in cli("data", "download", "--config", "own.yaml").stdout


def test_quickstart_tells_three_stories(workplace: Path, cli: Callable[..., object]) -> None:
    result = cli("quickstart", "--minutes", "0.05")
    assert result.code == 0, result.stderr
    assert result.stdout.count("--- ") == 3
    assert "20,000 for training, 100 for validation" in result.stdout
    assert "tiny-lm generate runs/quickstart" in result.stdout
    run = workplace / "runs" / "quickstart"
    assert (run / "plots" / "loss.png").exists()
    assert "Samples during training" in (run / "report.html").read_text()
    assert json.loads((run / "run.json").read_text())["status"] == "finished"


def test_quickstart_takes_ones_own_text_and_keeps_the_run_before(
    workplace: Path, tinystories: Path, cli: Callable[..., object]
) -> None:
    for _ in range(2):
        result = cli("quickstart", "--minutes", "0.05", "--text", tinystories / "valid.txt")
        assert result.code == 0, result.stderr
    assert len(list((workplace / "runs").glob("quickstart*"))) == 2
    assert "valid.txt" in result.stdout
