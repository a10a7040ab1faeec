"""The commands that serve a run with other programs: what they say, what they refuse, and what TGI reads."""

import dataclasses
import itertools
import json
import shlex
import sys
from pathlib import Path

import pytest
from tiny_exports import TrainedRun

from tiny_lm.cli import main
from tiny_lm.errors import UserError
from tiny_lm.export.huggingface import export_huggingface, write_huggingface
from tiny_lm.export.serve_config import ServeOptions, serve_commands
from tiny_lm.export.source import ExportSource, load_source
from tiny_lm.export.torchserve import serve_words
from tiny_lm.model import build_model


def print_commands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object
) -> tuple[int, list[str], str]:
    monkeypatch.setattr(sys, "argv", ["tiny-lm", "serve-config", *map(str, words)])
    with pytest.raises(SystemExit) as exit_:
        main()
    captured = capsys.readouterr()
    return int(exit_.value.code or 0), captured.out.splitlines(), captured.err


def with_heads(source: ExportSource, **shape: int) -> ExportSource:
    """The same source with a new model of another shape."""
    config = dataclasses.replace(source.config, **shape)
    return dataclasses.replace(source, config=config, model=build_model(config).eval())


def test_vllm(
    trained_run: TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained_run("gpt2")
    monkeypatch.chdir(tmp_path)
    code, lines, _ = print_commands(monkeypatch, capsys, "vllm", run.folder, "--port", 9999, "--device", "cpu")
    assert code == 0
    export, serve = map(shlex.split, lines)
    assert export == ["tiny-lm", "export", "huggingface", str(run.folder), "--output-dir", f"exports/{run.name}"]
    assert "VLLM_CPU_KVCACHE_SPACE=1" in serve
    assert "HF_HUB_OFFLINE=1" in serve
    options = dict(itertools.pairwise(serve))
    assert options["--model"] == f"exports/{run.name}"
    assert options["--max-model-len"] == "96"
    assert (options["--dtype"], options["--host"], options["--port"]) == ("float32", "127.0.0.1", "9999")
    # what is exported already is not exported again, unless it is another run's
    export_huggingface(load_source(run.folder), tmp_path / "exports" / run.name)
    _, lines, told = print_commands(monkeypatch, capsys, "vllm", run.folder)
    assert len(lines) == 1
    assert "is this checkpoint's export" in told
    other = trained_run("smalllm")
    _, lines, _ = print_commands(monkeypatch, capsys, "vllm", other.folder, "--export-dir", f"exports/{run.name}")
    assert len(lines) == 2


def test_vllm_on_a_gpu_computes_in_half_precision(trained_run: TrainedRun) -> None:
    source = load_source(trained_run("qwen3").folder)
    (command,) = serve_commands("vllm", source, "runs/x", ServeOptions(gpu=True)).commands
    assert command[command.index("--dtype") + 1] == "bfloat16"
    assert "--enforce-eager" not in command
    (command,) = serve_commands("vllm", source, "runs/x", ServeOptions(gpu=True, dtype="float16")).commands
    assert command[command.index("--dtype") + 1] == "float16"


def test_llamacpp_and_ollama(
    trained_run: TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained_run()
    monkeypatch.chdir(tmp_path)
    _, lines, _ = print_commands(monkeypatch, capsys, "llamacpp", run.folder, "--outtype", "Q4_K_M")
    folder = f"exports/{run.name}-gguf"
    assert lines == [
        f"tiny-lm export gguf {run.folder} --output-dir {folder} --quantize Q4_K_M",
        f"llama-server -m {folder}/{run.name}-Q4_K_M.gguf -np 8 -c 768 --host 127.0.0.1 --port 8080",
    ]
    _, lines, _ = print_commands(monkeypatch, capsys, "ollama", run.folder, "--port", 9998)
    name, folder = run.name.lower(), f"exports/{run.name}-ollama"
    assert lines == [
        f"tiny-lm export ollama {run.folder} --output-dir {folder} --name {name} --outtype f16",
        f"OLLAMA_HOST=127.0.0.1:9998 ollama create {name} -f {folder}/Modelfile",
        f"OLLAMA_HOST=127.0.0.1:9998 ollama run {name}",
    ]


def test_what_an_engine_cannot_run_is_refused_with_the_nearest_way(trained_run: TrainedRun) -> None:
    source = load_source(trained_run("llama3").folder)
    assert source.config.head_size == 16
    for engine, nearest in (("vllm", "head size of 32"), ("tgi", "head size of 32")):
        with pytest.raises(UserError, match=rf"head size 16 .*train with a {nearest} .*serve-config llamacpp"):
            serve_commands(engine, source, "runs/x", ServeOptions())
    assert serve_commands("llamacpp", source, "runs/x", ServeOptions()).commands  # which has them
    with pytest.raises(UserError, match=r"does not support Qwen3; serve this run with vLLM"):
        serve_commands("tgi", load_source(trained_run("qwen3").folder), "runs/x", ServeOptions())
    with pytest.raises(UserError, match="float16 and bfloat16 only"):
        serve_commands("tgi", load_source(trained_run("gpt2").folder), "runs/x", ServeOptions(dtype="float32"))
    characters = load_source(trained_run("gpt2", "char").folder)
    for engine in ("llamacpp", "ollama"):
        with pytest.raises(UserError, match="char"):
            serve_commands(engine, characters, "runs/x", ServeOptions())
    assert serve_commands("vllm", characters, "runs/x", ServeOptions()).commands  # which reads tokenizer.json


def test_wrong_words(
    trained_run: TrainedRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = trained_run().folder
    for words, told in (
        (("sglang", folder), "choose from: vllm, tgi, llamacpp, ollama"),
        (("vllm", folder, "--dtype", "int8"), "--dtype int8: unknown"),
        (("vllm", folder, "--device", "tpu"), "--device tpu: unknown"),
        (("llamacpp", folder, "--outtype", "Q9"), "unknown GGUF type"),
        (("vllm", folder, "--port", "70000"), "Invalid value for '--port'"),
    ):
        code, lines, error = print_commands(monkeypatch, capsys, *words)
        assert (code, lines) == (2, [])
        assert told in error


def test_names_that_a_shell_would_split(trained_run: TrainedRun, tmp_path: Path) -> None:
    source = dataclasses.replace(load_source(trained_run("gpt2").folder), name="my run; rm -rf ~")
    options = ServeOptions(folder=tmp_path / "a folder")
    export, serve = serve_commands("vllm", source, "runs/my run; rm -rf ~", options).lines()
    assert shlex.split(export)[3:] == ["runs/my run; rm -rf ~", "--output-dir", str(tmp_path / "a folder")]
    assert shlex.split(serve)[shlex.split(serve).index("--served-model-name") + 1] == "my-run-rm--rf"


def test_the_document_shows_what_is_printed(
    trained_run: TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = with_heads(load_source(trained_run("gpt2").folder), n_heads=2, context_length=256)
    source = dataclasses.replace(source, name="turbo")
    lines = [
        *serve_commands("vllm", source, "runs/turbo", ServeOptions()).lines(),
        *serve_commands("tgi", source, "runs/turbo", ServeOptions()).lines(),
        shlex.join(serve_words(Path("exports/turbo-torchserve"), source)),
    ]
    document = (Path(__file__).parents[2] / "docs" / "deployment.md").read_text(encoding="utf-8")
    for line in lines:
        shown = line.replace(f"{Path.cwd()}/exports/turbo:", '"$PWD/exports/turbo":')
        assert f"\n    {shown}\n" in document


# --- text-generation-inference, which comes in a container only: what it reads of our folder -------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama3", "smalllm"])
def test_tgi_finds_what_it_reads(family: str, trained_run: TrainedRun, tmp_path: Path) -> None:
    shape = {"n_heads": 2, "n_kv_heads": 2} if family == "llama3" else {"n_heads": 2}
    source = with_heads(load_source(trained_run(family).folder), **shape)
    (command,) = serve_commands("tgi", source, "runs/x", ServeOptions()).commands
    assert command[command.index("-p") + 1] == "127.0.0.1:8080:80"
    assert command[command.index("--max-total-tokens") + 1] == "96"
    write_huggingface(source, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    # its own classes, chosen by model_type; transformers 4 beside them knows rope_theta and torch_dtype only
    assert config["model_type"] in ("gpt2", "llama", "starcoder2")
    assert config["torch_dtype"] == "float32"
    if family != "gpt2":
        assert config["rope_theta"] == source.config.rope_theta
    # `gelu_new` would be computed as the exact GELU there
    activation = config["activation_function"] if family == "gpt2" else config["hidden_act"]
    assert activation == ("silu" if family == "llama3" else "gelu_pytorch_tanh")
    tokenizer = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"  # transformers 5's own name is unknown to it
    assert json.loads((tmp_path / "tokenizer.json").read_text())["post_processor"]["type"] == "TemplateProcessing"
