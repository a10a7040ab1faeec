"""GGUF files in the real llama.cpp (extra ``llamacpp``; ``make test-llamacpp`` installs it)."""

import json
import sys
from pathlib import Path

import pytest
from tiny_exports import FAMILIES, TrainedRun

from tiny_lm.cli import main
from tiny_lm.errors import UserError
from tiny_lm.export import gguf, gguf_file
from tiny_lm.export.gguf import export_gguf
from tiny_lm.export.llamacpp_engine import LlamaCppEngine
from tiny_lm.export.source import load_source

pytestmark = pytest.mark.llamacpp


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_is_the_same_model_in_llama_cpp(family: str, trained_run: TrainedRun, tmp_path: Path) -> None:
    source = load_source(trained_run(family).folder)
    proof, kept = export_gguf(source, tmp_path / "out", ["Q8_0"])
    assert [check.passed for check in (*proof.checks, *kept.checks)] == [True] * 14
    probabilities = next(check for check in proof.checks if check.name.startswith("log-probabilities"))
    assert probabilities.value <= (1e-4 if family in ("llama3", "qwen3") else 5e-3)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [kept.name, "verification.json"]
    report = json.loads((tmp_path / "out" / "verification.json").read_text())
    assert report["passed"] is True
    assert report["files"][kept.name]["bits_per_weight"] == kept.facts.bits_per_weight


@pytest.mark.parametrize(("kind", "unused_rows"), [("sentencepiece", 0), ("BPE", 16)])
def test_other_vocabularies(kind: str, unused_rows: int, trained_run: TrainedRun, tmp_path: Path) -> None:
    source = load_source(trained_run("llama3", kind, unused_rows).folder)
    files = export_gguf(source, tmp_path / "out", ["F32"])
    assert all(check.passed for check in files[0].checks)
    assert (tmp_path / "out" / files[0].name).is_file()


@pytest.mark.parametrize("architecture", ["llama3", "smalllm"])
def test_biases_of_every_place(architecture: str, trained_run: TrainedRun, tmp_path: Path) -> None:
    import dataclasses

    import torch

    from tiny_lm.model import build_model

    source = load_source(trained_run(architecture).folder)
    changes = {"qkv_bias": True, "ffn_bias": True} if architecture == "llama3" else {"qkv_bias": True}
    config = dataclasses.replace(source.config, **changes)
    model = build_model(config).eval()
    model.load_state_dict(source.model.state_dict(), strict=False)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    biased = dataclasses.replace(source, config=config, model=model)
    assert all(check.passed for check in export_gguf(biased, tmp_path / "out", ["F32"])[0].checks)


def test_the_command_tells_sizes_and_perplexities(
    trained_run: TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["export", "gguf", str(trained_run().folder), "--output-dir", str(out), "--outtype", "f16"]
    monkeypatch.setattr(sys, "argv", ["tiny-lm", *words, "--quantize", "Q4_K_M,Q4_0"])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert not exit_.value.code
    captured = capsys.readouterr()
    assert "not a multiple of 256, so Q4_K_M will be larger" in captured.err
    assert captured.out.count(" bits per weight (") == 3
    assert captured.out.count("    perplexity ") == 3
    assert "Q5_0" in captured.out  # what Q4_K_M really holds here
    assert len(list(out.glob("*.gguf"))) == 3


def test_a_wrong_order_of_rows_is_noticed_and_nothing_stays(
    trained_run: TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_file, "interleave_pairs", lambda weight, heads: weight)
    with pytest.raises(UserError, match=r"does not match the trained model \(log-probabilities"):
        export_gguf(load_source(trained_run().folder), tmp_path / "out", ["F16"])
    assert list(tmp_path.iterdir()) == []


def test_a_missing_split_is_noticed(trained_run: TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    right = gguf.to_gguf_vocabulary
    monkeypatch.setattr(gguf, "to_gguf_vocabulary", lambda *a: dataclasses.replace(right(*a), pre="default"))
    with pytest.raises(UserError, match=r"token ids: hard strings: \d+ of \d+ texts differ"):
        export_gguf(load_source(trained_run().folder), tmp_path / "out", ["F16"])


def test_a_file_that_llama_cpp_does_not_take(trained_run: TrainedRun, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF and nothing else")
    with pytest.raises(UserError, match=r"llama.cpp cannot load it"):
        LlamaCppEngine(tmp_path / "x.gguf", load_source(trained_run().folder))
