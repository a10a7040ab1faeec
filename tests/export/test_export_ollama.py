"""The folder for Ollama: the Modelfile as Ollama's grammar reads it, and the commands, with a stand-in for Ollama."""

import dataclasses
import json
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from modelfile_grammar import GrammarError, parameters, read_modelfile
from tiny_exports import FAMILIES, TrainedRun, run_main

from tiny_lm.errors import UserError
from tiny_lm.export import ollama
from tiny_lm.export.gguf_file import write_gguf
from tiny_lm.export.gguf_vocabulary import to_gguf_vocabulary
from tiny_lm.export.modelfile import modelfile, quote
from tiny_lm.export.ollama import OllamaModel, create_model, ollama_name, read_license
from tiny_lm.export.source import ExportSource, load_source
from tiny_lm.inference import TextGenerator


@pytest.fixture
def source(trained_run: TrainedRun) -> ExportSource:
    return load_source(trained_run().folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_modelfile_says_what_the_model_is(family: str, trained_run: TrainedRun) -> None:
    source = load_source(trained_run(family).folder)
    license_text = 'MIT License\n\nPermission is "hereby" granted,\t free of charge.\n  - and so on'
    commands = read_modelfile(modelfile(source, "a b-F16.gguf", license_text=license_text))
    assert dict(commands)["from"] == "./a b-F16.gguf"
    assert dict(commands)["template"] == "{{ .Prompt }}"
    assert dict(commands)["license"] == license_text
    assert "system" not in dict(commands)  # the template has no place for it
    assert parameters(commands) == {
        "temperature": 0.8,
        "top_k": 40,
        "top_p": 0.95,
        "repeat_penalty": 1.1,
        "num_ctx": source.config.context_length,
        "num_predict": source.config.context_length,
        "stop": ["<eos>", "<bos>"],
    }


@given(st.text(st.characters(codec="utf-8") | st.sampled_from("\"\n\t '#{}\\"), max_size=60))
def test_every_value_is_read_back_or_refused(value: str) -> None:
    try:
        written = quote(value)
    except UserError:
        assert '"""' in value or not all(c.isprintable() or c in "\n\t" for c in value)
        return
    text = f"FROM ./x.gguf\nSYSTEM {written}\nPARAMETER stop {written}\n# the end\nPARAMETER top_k 3\n"
    assert read_modelfile(text) == [("from", "./x.gguf"), ("system", value), ("stop", value), ("top_k", "3")]


@pytest.mark.parametrize(
    "text",
    ["TEMPLATE x\n", "FROM\n", "FROM ./x\nFORM y\n", 'FROM ./x\nSYSTEM "open\n', "FROM ./x\nPARAMETER top-k 3\n"],
)
def test_the_reader_of_the_tests_is_as_strict_as_ollama(text: str) -> None:
    with pytest.raises(GrammarError):
        read_modelfile(text)


def test_gpt2s_one_special_token_is_one_stop_string(source: ExportSource) -> None:
    eos = next(token for token in source.tokenizer.specials if token.role == "eos")

    class OneSpecial:
        specials = (eos,)
        bos_id = eos_id = eos.id
        chat_template = None

    one = dataclasses.replace(source, tokenizer=OneSpecial())
    assert parameters(read_modelfile(modelfile(one, "x.gguf")))["stop"] == ["<eos>"]


def test_names_and_licenses(tmp_path: Path) -> None:
    assert ollama_name("My Story Model (2)") == "my-story-model-2"
    assert ollama_name("...") == "tiny-lm"
    assert len(ollama_name("x" * 200)) == 80
    with pytest.raises(UserError, match="--name a b: "):
        ollama.check_name("a b")
    file = tmp_path / "LICENSE.txt"
    file.write_text("All of it.\f\nMine.\n")
    assert read_license("MIT") == "MIT"
    assert read_license(str(file)) == "All of it.\f\nMine."
    with pytest.raises(UserError, match="no such file"):
        read_license(str(tmp_path / "gone.txt"))


# --- the real Ollama cannot be had where these tests run, so a program of the same name stands in for it -------------

STAND_IN = """#!/bin/sh
# Checks what is asked of it as Ollama does, notes it down, and answers what it was made to answer.
echo "$@" >> "{folder}/calls"
case "$1" in
create) test "$3" = -f && test -f "$4" && cd "$(dirname "$4")" && test -f "$(sed -n 's/^FROM //p' "$4")" ;;
run) test -z "$(cat)" && cat "{folder}/answer" ;;
*) echo "Error: unknown command" >&2; exit 1 ;;
esac
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "stand-in"
    folder.mkdir()
    program = folder / "ollama"
    program.write_text(STAND_IN.format(folder=folder))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder


@pytest.fixture
def model(source: ExportSource, tmp_path: Path) -> OllamaModel:
    """A folder as the export writes it, but not checked in llama.cpp."""
    folder = tmp_path / "out folder"
    folder.mkdir()
    write_gguf(source, to_gguf_vocabulary(source.tokenizer, source.config.vocab_size), folder / "x.gguf", "F16")
    (folder / "Modelfile").write_text(modelfile(source, "x.gguf"))
    return OllamaModel("tiny", folder / "Modelfile")


def test_create_makes_the_model_and_checks_a_story(source: ExportSource, model: OllamaModel, stand_in: Path) -> None:
    begin = "Once upon a time"
    generator = TextGenerator(source.model, source.tokenizer)
    told = generator.generate(begin, 60, temperature=0.8, top_k=40, seed=1).removeprefix(begin)
    (stand_in / "answer").write_text(told + "\n\n")
    assert create_model(source, model) == told.rstrip()
    calls = (stand_in / "calls").read_text().splitlines()
    assert calls == [f"create tiny -f {model.modelfile}", "run tiny Once upon a time"]


@pytest.mark.parametrize("answer", ["\n", "zq#9 @@xK ]]7 vW~ qqz 0=% JJx"])
def test_an_answer_that_is_not_the_models_is_noticed(
    answer: str, source: ExportSource, model: OllamaModel, stand_in: Path
) -> None:
    (stand_in / "answer").write_text(answer)
    with pytest.raises(UserError, match="ollama run tiny: the answer is not from this model"):
        create_model(source, model)


def test_what_ollama_complains_of_is_told(source: ExportSource, model: OllamaModel, stand_in: Path) -> None:
    model.modelfile.with_name("x.gguf").unlink()
    with pytest.raises(UserError, match=r"ollama create tiny: exit code 1"):
        create_model(source, model)
    (stand_in / "ollama").write_text("#!/bin/sh\necho busy >&2\necho 'Error: could not connect' >&2\nexit 1\n")
    with pytest.raises(UserError, match=r"^ollama create tiny: Error: could not connect$"):
        create_model(source, model)


# --- the command -----------------------------------------------------------------------------------------------------


def test_without_ollama_there_is_one_clear_line(
    trained_run: TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert (
        run_main(monkeypatch, "export", "ollama", trained_run().folder, "--output-dir", tmp_path / "out", "--create")
        == 2
    )
    error = capsys.readouterr().err
    assert error.startswith("error: --create needs Ollama, but `ollama` is not on the PATH")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.llamacpp
def test_the_command_writes_a_modelfile_for_each_type(
    trained_run: TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = [trained_run().folder, "--output-dir", out, "--outtype", "q8_0", "--quantize", "Q4_K_M"]
    assert run_main(monkeypatch, "export", "ollama", *words, "--name", "bear", "--license", "MIT") == 0
    captured = capsys.readouterr()
    assert [line for line in captured.err.splitlines() if line.startswith("next: ")] == [
        f"next: ollama create bear -f {out}/Modelfile",
        "next: ollama run bear 'Once upon a time'",
        f"next: ollama create bear:q4_k_m -f {out}/Modelfile.Q4_K_M",
        "next: ollama run bear:q4_k_m 'Once upon a time'",
    ]
    for name, kind in (("Modelfile", "Q8_0"), ("Modelfile.Q4_K_M", "Q4_K_M")):
        commands = dict(read_modelfile((out / name).read_text()))
        assert commands["from"] == f"./llama3-BPE-{kind}.gguf"
        assert (out / commands["from"]).is_file()
        assert commands["license"] == "MIT"
    assert len(list(out.iterdir())) == 5
    assert json.loads((out / "verification.json").read_text())["format"] == "ollama"


@pytest.mark.llamacpp
def test_the_command_makes_the_model_in_ollama(
    trained_run: TrainedRun,
    stand_in: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (stand_in / "answer").write_text(", there was a little girl named Lily. She was happy.\n")
    assert (
        run_main(monkeypatch, "export", "ollama", trained_run().folder, "--output-dir", tmp_path / "out", "--create")
        == 0
    )
    captured = capsys.readouterr()
    assert "llama3-bpe in Ollama: Once upon a time, there was a little girl" in captured.out
    assert "next: " not in captured.err
