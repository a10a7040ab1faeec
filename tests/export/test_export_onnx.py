"""Exports to ONNX of trained runs, run by the real ONNX Runtime; and the program that stands beside them."""

import dataclasses
import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from tiny_exports import FAMILIES, TrainedRun, run_main

from tiny_lm.errors import UserError
from tiny_lm.export import onnx as onnx_export
from tiny_lm.export import onnx_graph
from tiny_lm.export.onnx import CACHED, PLAIN, PROGRAM, QUANTIZED, export_onnx
from tiny_lm.export.onnx_generate import OnnxModel, draw
from tiny_lm.export.onnx_graph import write_graph
from tiny_lm.export.source import load_source
from tiny_lm.inference import TextGenerator
from tiny_lm.model import build_model

FILES = [
    "README.md",
    "config.json",
    "generate.py",
    "generation_config.json",
    "metadata.json",
    "onnx",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "verification.json",
]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def exported(trained_run: TrainedRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of a llama3 run."""
    folder = tmp_path_factory.mktemp("onnx") / "out"
    export_onnx(load_source(trained_run().folder), folder)
    return folder


@pytest.mark.parametrize(
    "family", [pytest.param(family, marks=[] if family == "llama3" else pytest.mark.deep) for family in FAMILIES]
)
def test_each_family_is_the_same_model_in_onnx_runtime(family: str, trained_run: TrainedRun, tmp_path: Path) -> None:
    source = load_source(trained_run(family).folder)
    files = export_onnx(source, tmp_path / "out")
    assert [file.name for file in files] == [CACHED, PLAIN, QUANTIZED]
    assert [[check.passed for check in file.checks] for file in files] == [[True] * 9, [True] * 6, [True]]
    assert max(check.value for file in files for check in file.checks if "largest" in check.result) < 1e-4
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == FILES
    report = json.loads((tmp_path / "out" / "verification.json").read_text())
    assert report["passed"] is True
    assert report["files"][CACHED]["opset"] == 20
    assert report["files"][CACHED]["engine"] == f"onnxruntime {onnxruntime.__version__}"
    assert report["files"][QUANTIZED]["bits_per_weight"] < 0.5 * report["files"][CACHED]["bits_per_weight"]


def test_the_graph_has_the_usual_names_and_free_sizes(exported: Path) -> None:
    model = onnx.load(exported / CACHED)
    onnx.checker.check_model(model, full_check=True)
    shapes = {
        value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    past, present = (["batch", 2, length, 16] for length in ("past", "past + sequence"))
    assert list(shapes.values())[:3] == [["batch", "sequence"], ["batch", "total"], past]
    assert [name for name in shapes if name.startswith("past")] == [
        f"past_key_values.{i}.{kind}" for i in (0, 1) for kind in ("key", "value")
    ]
    assert shapes["logits"] == ["batch", "sequence", 512]
    assert shapes["present.1.value"] == present
    assert [value.name for value in onnx.load(exported / PLAIN).graph.input] == ["input_ids", "attention_mask"]


def test_the_embedding_is_there_once_and_the_machine_is_not_named(exported: Path) -> None:
    for name in (CACHED, PLAIN, QUANTIZED):
        model = onnx.load(exported / name)
        large = [list(tensor.dims) for tensor in model.graph.initializer if 512 in tensor.dims]
        assert large == [[512, 64]]
        data = (exported / name).read_bytes()
        assert str(Path(torch.__file__).parents[2]).encode() not in data
        assert str(Path(onnx_graph.__file__).parents[2]).encode() not in data


def test_eight_bits_are_in_the_matrices_and_nowhere_else(exported: Path) -> None:
    model = onnx.load(exported / QUANTIZED)
    kinds = Counter(node.op_type for node in model.graph.node)
    layers = 2
    assert kinds["MatMulInteger"] == 7 * layers + 1  # q, k, v, out, w1, w2, w3 and the head
    assert kinds["MatMul"] == 2 * layers  # attention
    tables = [t for t in model.graph.initializer if t.dims == [96, 16] and t.data_type == onnx.TensorProto.FLOAT]
    assert len(tables) == 2  # cos and sin


@pytest.mark.deep
@pytest.mark.parametrize(("kind", "unused_rows"), [("sentencepiece", 0), ("char", 0), ("BPE", 16)])
def test_other_vocabularies(kind: str, unused_rows: int, trained_run: TrainedRun, tmp_path: Path) -> None:
    source = load_source(trained_run("gpt2", kind, unused_rows).folder)
    assert all(check.passed for file in export_onnx(source, tmp_path / "out") for check in file.checks)


def test_rows_may_be_padded_in_between(exported: Path, trained_run: TrainedRun) -> None:
    source = load_source(trained_run().folder)
    model = OnnxModel(exported)
    ids = np.array([source.validation.ids[:9]])
    mask = np.ones((1, 12), np.int64)
    mask[0, [0, 4, 5]] = 0
    padded = np.zeros((1, 12), np.int64)
    padded[mask == 1] = ids[0]
    logits, past = model.forward(padded[:, :7], mask[:, :7], model.empty_past())
    rest, _ = model.forward(padded[:, 7:], mask, past)
    found = np.concatenate((logits, rest), axis=1)[mask == 1]
    with torch.no_grad():
        np.testing.assert_allclose(found, source.model(torch.tensor(ids))[0].numpy(), rtol=0, atol=1e-4)


# --- the program beside it -------------------------------------------------------------------------------------------


def run_program(folder: Path, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, str(folder / PROGRAM), *words], capture_output=True, encoding="utf-8", check=True
    )
    return done.stdout


@pytest.mark.parametrize("file", [CACHED, QUANTIZED])
def test_the_program_tells_what_we_tell_beyond_the_context(file: str, exported: Path, trained_run: TrainedRun) -> None:
    generator = TextGenerator.from_run(trained_run().folder)
    options = ["--prompt", "Once upon", "--max-new-tokens", "200", "--temperature", "0", "--file", file]
    told = run_program(exported, *options)
    if file == CACHED:
        assert told == generator.generate("Once upon", 200, temperature=0) + "\n"
    assert told.startswith("Once upon")


def test_the_program_imports_no_torch(exported: Path) -> None:
    code = (
        "import runpy, sys; sys.argv = ['generate.py', '--max-new-tokens', '3']\n"
        f"runpy.run_path({str(exported / PROGRAM)!r}, run_name='__main__')\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.splitlines()[-1].split())
    assert {"onnxruntime", "numpy", "tokenizers"} <= loaded
    assert not {"torch", "transformers", "onnx", "tiny_lm"} & loaded


def test_the_program_draws_by_seed_and_refuses_nonsense(exported: Path) -> None:
    first, again, other = (run_program(exported, "--seed", seed) for seed in ("1", "1", "2"))
    assert first == again != other
    done = subprocess.run([sys.executable, str(exported / PROGRAM), "--top-p", "0"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "--top-p above 0" in done.stderr


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    logits = np.array([-np.inf, 2.0, 0.0, 1.0, -1.0])
    random = np.random.default_rng(0)

    def shares(**options: float) -> list[float]:
        arguments = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, **options}
        counts = Counter(draw(logits, random=random, **arguments) for _ in range(4000))
        return [counts[token] / 4000 for token in range(5)]

    weights = np.exp(logits)
    np.testing.assert_allclose(shares(), weights / weights.sum(), atol=0.03)
    np.testing.assert_allclose(shares(temperature=0.5), weights**2 / (weights**2).sum(), atol=0.03)
    two = weights[1] + weights[3]
    np.testing.assert_allclose(shares(top_k=2), [0, weights[1] / two, 0, weights[3] / two, 0], atol=0.03)
    np.testing.assert_allclose(shares(top_p=0.7), [0, weights[1] / two, 0, weights[3] / two, 0], atol=0.03)
    assert shares(temperature=0) == [0, 1, 0, 0, 0]


# --- the command, and what is refused --------------------------------------------------------------------------------


def test_the_command_shows_tables_and_refuses_what_is_there(
    trained_run: TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ("export", "onnx", trained_run("gpt2").folder, "--output-dir", out)
    assert run_main(monkeypatch, *command) == 0
    captured = capsys.readouterr()
    assert captured.err.count("in ONNX Runtime") == 3
    assert "FAILED" not in captured.err
    assert [line.split("  ")[0] for line in captured.out.splitlines()] == [
        str(out / name) for name in (CACHED, PLAIN, QUANTIZED, "verification.json")
    ]
    assert captured.out.count(", opset 20\n") == 3
    assert run_main(monkeypatch, *command) == 2
    assert "holds files already" in capsys.readouterr().err
    (out / "config.json").unlink()
    assert run_main(monkeypatch, *command, "--force") == 0
    assert names(out) == FILES


@pytest.mark.deep
def test_wrong_positions_are_noticed_and_nothing_stays(
    trained_run: TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = onnx_graph._PassedCache.prepare

    def without_mask(self: onnx_graph._PassedCache, batch_size: int, count: int) -> object:
        mask = self.attention_mask
        self.attention_mask = torch.ones_like(mask)
        positions, seen = right(self, batch_size, count)
        self.attention_mask = mask
        return positions, seen

    monkeypatch.setattr(onnx_graph._PassedCache, "prepare", without_mask)
    with pytest.raises(UserError, match=r"does not match the trained model \(a batch of 3 texts padded on the left"):
        export_onnx(load_source(trained_run().folder), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.deep
def test_other_weights_in_the_small_file_are_noticed(
    trained_run: TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = load_source(trained_run().folder)
    other = build_model(source.config).eval()  # untrained
    monkeypatch.setattr(
        onnx_export, "quantize_graph", lambda base, target: write_graph(other, source.config, target, cached=True)
    )
    with pytest.raises(UserError, match=r"model_quantized.onnx: does not match the trained model \(perplexity"):
        export_onnx(source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("library", ["onnx", "onnxscript", "onnxruntime", "tokenizers"])
def test_without_a_library_the_extra_is_named(
    library: str, trained_run: TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError, match=rf"needs {library}, .*pip install 'tiny-lm\[onnx\]'"):
        export_onnx(load_source(trained_run().folder), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_model_too_large_for_one_file(
    trained_run: TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_export, "_MAX_FILE_SIZE", 1000)
    with pytest.raises(UserError, match="an ONNX file can have at most"):
        export_onnx(load_source(trained_run().folder), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_context_of_one_token(trained_run: TrainedRun, tmp_path: Path) -> None:
    source = load_source(trained_run().folder)
    short = dataclasses.replace(source, config=dataclasses.replace(source.config, context_length=1))
    with pytest.raises(UserError, match="context_length 1 cannot have dynamic lengths"):
        export_onnx(short, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk(trained_run: TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=1000))
    with pytest.raises(UserError, match="but the disk has only 0 MB free"):
        export_onnx(load_source(trained_run().folder), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
