"""Exports to Hugging Face of trained runs, loaded by the real transformers; and what is refused."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_exports import FAMILIES, TrainedRun, run_main

from tiny_lm.errors import UserError
from tiny_lm.export import huggingface
from tiny_lm.export.huggingface import export_huggingface
from tiny_lm.export.model_card import model_card
from tiny_lm.export.source import load_source
from tiny_lm.export.transformers_engine import TransformersEngine
from tiny_lm.export.verify import HARD_STRINGS
from tiny_lm.model.huggingface_folder import load_huggingface_model
from tiny_lm.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[2]
FILES = [
    "README.md",
    "config.json",
    "generation_config.json",
    "metadata.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "verification.json",
]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_is_the_same_model_in_transformers(family: str, trained_run: TrainedRun, tmp_path: Path) -> None:
    source = load_source(trained_run(family).folder)
    checks = export_huggingface(source, tmp_path / "out")
    assert [check.passed for check in checks] == [True] * 8
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == FILES
    report = json.loads((tmp_path / "out" / "verification.json").read_text())
    assert report["passed"] is True
    assert "transformers" in report["files"]["model.safetensors"]["engine"]
    # and ours again, from the same folder
    model, config = load_huggingface_model(tmp_path / "out")
    assert config.qkv_bias == source.config.qkv_bias
    assert all(torch.equal(value, source.model.state_dict()[key]) for key, value in model.state_dict().items())
    assert load_tokenizer(tmp_path / "out").hash == source.tokenizer.hash


@pytest.mark.parametrize("kind", ["sentencepiece", "char"])
def test_other_tokenizers_survive(kind: str, trained_run: TrainedRun, tmp_path: Path) -> None:
    source = load_source(trained_run("llama3", kind).folder)
    assert all(check.passed for check in export_huggingface(source, tmp_path / "out"))
    assert load_tokenizer(tmp_path / "out").hash == source.tokenizer.hash


def test_what_runs_begin_with_and_never_say(trained_run: TrainedRun, tmp_path: Path) -> None:
    source = load_source(trained_run("gpt2", unused_rows=16).folder)
    export_huggingface(source, tmp_path / "out")
    content = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    tokenizer = source.tokenizer
    assert content["eos_token_id"] == tokenizer.eos_id
    unused = list(range(tokenizer.vocab_size, tokenizer.vocab_size + 16))
    assert content["suppress_tokens"] == sorted([tokenizer.pad_id, tokenizer.bos_id, tokenizer.unk_id, *unused])
    engine = TransformersEngine(tmp_path / "out")
    for text in HARD_STRINGS:
        assert engine.encode_document_start(text) == tokenizer.encode(text, bos=True)


def test_half_precision_is_compared_with_rounded_weights(trained_run: TrainedRun, tmp_path: Path) -> None:
    source = load_source(trained_run("qwen3").folder)
    checks = export_huggingface(source, tmp_path / "out", dtype="bfloat16")
    assert checks[-1].name == "perplexity"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    export_huggingface(source, tmp_path / "wide")
    assert size < 0.55 * (tmp_path / "wide" / "model.safetensors").stat().st_size


@pytest.mark.parametrize(
    ("key", "value", "check"),
    [
        ("rms_norm_eps", 1e-2, "settings read back: norm_eps is 0.01, not 1e-06"),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 100.0}, "settings read back: rope_theta is 100.0"),
    ],
)
def test_a_wrong_model_is_noticed_and_nothing_stays(
    key: str, value: object, check: str, trained_run: TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = huggingface.to_huggingface_config
    monkeypatch.setattr(huggingface, "to_huggingface_config", lambda *a, **k: {**right(*a, **k), key: value})
    with pytest.raises(UserError, match=f"does not match the trained model \\({check}.*nothing was written"):
        export_huggingface(load_source(trained_run().folder), tmp_path / "out")
    assert names(tmp_path) == []


def test_a_wrong_tokenizer_is_noticed(trained_run: TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface, "begin_with_bos", lambda tokenizer: None)
    with pytest.raises(UserError, match=r"does not match the trained model \(beginning of a text"):
        export_huggingface(load_source(trained_run().folder), tmp_path / "out")
    assert names(tmp_path) == []


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_shows_a_table_and_refuses_what_is_there(
    trained_run: TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = trained_run().folder, tmp_path / "out"
    command = ("export", "huggingface", run, "--output-dir", out)
    assert run_main(monkeypatch, *command) == 0
    captured = capsys.readouterr()
    assert "greedy completion" in captured.err
    assert "FAILED" not in captured.err
    assert [line.split("  ")[0] for line in captured.out.splitlines()] == [str(out / name) for name in FILES]
    before = (out / "config.json").stat().st_mtime_ns
    assert run_main(monkeypatch, *command) == 2
    assert "holds files already" in capsys.readouterr().err
    assert (out / "config.json").stat().st_mtime_ns == before
    assert run_main(monkeypatch, *command, "--force") == 0
    capsys.readouterr()
    (out / "verification.json").unlink()
    assert run_main(monkeypatch, *command, "--force") == 2
    assert "holds files that no export wrote" in capsys.readouterr().err
    assert run_main(monkeypatch, *command, "--dtype", "float8") == 2
    assert "choose from: float32, float16, bfloat16" in capsys.readouterr().err
    assert run_main(monkeypatch, "export", "huggingface", run, "--output-dir", ".", "--force") == 2
    assert "is the working directory" in capsys.readouterr().err


def test_the_documented_script(trained_run: TrainedRun, tmp_path: Path) -> None:
    run = trained_run()
    words = [
        "--checkpoint", run.last_checkpoint, "--model-config", run.configs / "model.yaml",
        "--tokenizer", run.tokenizer / "tokenizer.pkl", "--tokenizer-config", "tinystories-8k",
        "--output-dir", tmp_path / "exports" / "x", "--dtype", "float32",
    ]  # fmt: skip
    script = ROOT / "scripts" / "export" / "convert_to_hf_gpt2.py"
    done = subprocess.run([sys.executable, script, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert names(tmp_path / "exports" / "x") == FILES


def test_a_run_whose_stream_is_gone_is_compared_on_built_in_stories(trained_run: TrainedRun, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(trained_run().folder, folder)
    (folder / "configs" / "data.yaml").unlink()
    assert "built-in stories" in load_source(folder).validation.origin


@pytest.mark.parametrize(
    "record",
    [
        {"tokens": "many", "seconds": [], "device": 1, "precision": None},
        {"tokens": None, "seconds": -1e300, "device": "CPU"},
        {"tokens": 1e300, "seconds": True, "precision": {}},
    ],
    ids=range(3),
)
def test_a_record_that_somebody_edited_leaves_rows_out_of_the_model_card(
    record: dict[str, object], trained_run: TrainedRun
) -> None:
    source = dataclasses.replace(load_source(trained_run().folder), record=record, scores={})
    card = model_card(source)
    assert "| parameters |" in card
    assert "training time" not in card and "| device |" not in card
