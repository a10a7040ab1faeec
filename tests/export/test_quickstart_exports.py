"""One real `tiny-lm quickstart`, every export of it, and the program each is for: `make test-quickstart-exports`.

The small runs of the other tests are trained for a moment, and their logits are small. The quickstart's model is the
first one that users export, trained to the end and sharp.
"""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from modelfile_grammar import parameters, read_modelfile

from tiny_lm.export.ollama import completion_loss, garbled_from
from tiny_lm.export.onnx import CACHED, PROGRAM, QUANTIZED
from tiny_lm.export.source import ExportSource, load_source
from tiny_lm.export.torchserve import load_handler

pytestmark = pytest.mark.quickstart_exports

RUN = Path("runs") / "quickstart"
PROMPT = "Once upon a time"
MAX_NEW_TOKENS = 100


def run_command(workplace: Path, *command: str | Path) -> str:
    """Run a command in ``workplace`` as a user's shell does; return its standard output."""
    # The other tests give each child process one thread. Users do not, and float32 sums depend on the threads.
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    completed = subprocess.run(
        list(map(str, command)), cwd=workplace, env=environment, capture_output=True, encoding="utf-8", check=False
    )
    assert completed.returncode == 0, f"{command}: {completed.stdout[-2000:]}\n{completed.stderr[-4000:]}"
    return completed.stdout


def tiny_lm() -> str:
    """Return the path of the `tiny-lm` that is installed beside this Python."""
    program = shutil.which("tiny-lm", path=str(Path(sys.executable).parent))
    assert program is not None, "tiny-lm is not installed beside this Python: pip install --editable ."
    return program


def export(workplace: Path, kind: str, *options: str) -> Path:
    """Export the run with the command, which must have verified it; return the folder."""
    folder = workplace / "exports" / kind
    run_command(workplace, tiny_lm(), "export", kind, RUN, "--output-dir", folder, *options)
    assert json.loads((folder / "verification.json").read_text())["passed"] is True
    return folder


def assert_plausible(source: ExportSource, text: str) -> None:
    """Check that our model finds a continuation of the prompt likely: quantized weights need not give the same text."""
    assert text.startswith(PROMPT)
    assert len(text) > len(PROMPT) + 100
    assert completion_loss(source, PROMPT, text.removeprefix(PROMPT)) < garbled_from(source)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory after `tiny-lm quickstart` with its default settings: three minutes of training."""
    folder = tmp_path_factory.mktemp("quickstart")
    run_command(folder, tiny_lm(), "quickstart")
    return folder


@pytest.fixture(scope="module")
def greedy_text(workplace: Path) -> str:
    """The prompt and what `tiny-lm generate` makes of it."""
    options = ["--prompt", PROMPT, "--max-new-tokens", str(MAX_NEW_TOKENS), "--temperature", "0"]
    text = run_command(workplace, tiny_lm(), "generate", RUN, *options).removesuffix("\n")
    assert text.startswith(PROMPT)
    assert len(text) > len(PROMPT) + 100
    return text


@pytest.fixture(scope="module")
def source(workplace: Path) -> ExportSource:
    return load_source(str(workplace / RUN))


@pytest.fixture(scope="module")
def gguf_folder(workplace: Path) -> Path:
    return export(workplace, "gguf", "--outtype", "f32", "--quantize", "F16,Q8_0,Q4_K_M")


def test_transformers_generates_the_quickstarts_text(workplace: Path, greedy_text: str) -> None:
    import torch
    import transformers

    folder = export(workplace, "huggingface")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.float32
    inputs = tokenizer(PROMPT, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == greedy_text


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_K_M"])
def test_llama_cpp_generates_the_quickstarts_text(
    kind: str, gguf_folder: Path, source: ExportSource, greedy_text: str
) -> None:
    import llama_cpp

    model = llama_cpp.Llama(
        str(gguf_folder / f"quickstart-{kind}.gguf"),
        n_ctx=source.config.context_length,
        type_k=llama_cpp.GGML_TYPE_F32,  # keys and values are halved to float16 by default
        type_v=llama_cpp.GGML_TYPE_F32,
        verbose=False,
    )
    made = model.create_completion(PROMPT, max_tokens=MAX_NEW_TOKENS, temperature=0, echo=True)
    model.close()
    if kind == "F32":
        assert made["choices"][0]["text"] == greedy_text
    else:
        assert_plausible(source, made["choices"][0]["text"])


def test_llama_cpp_runs_the_quickstarts_modelfile(workplace: Path, source: ExportSource) -> None:
    """Ollama itself is not installed here: llama.cpp, which it is built on, takes the Modelfile's parameters."""
    import llama_cpp

    folder = export(workplace, "ollama")
    commands = read_modelfile((folder / "Modelfile").read_text())
    assert dict(commands)["template"] == "{{ .Prompt }}"
    options = parameters(commands)
    num_ctx, num_predict = options.pop("num_ctx"), options.pop("num_predict")
    model = llama_cpp.Llama(str(folder / dict(commands)["from"]), n_ctx=num_ctx, verbose=False)
    made = model.create_completion(PROMPT, max_tokens=num_predict, min_p=0, seed=1, echo=True, **options)
    model.close()
    assert_plausible(source, made["choices"][0]["text"])


def test_onnx_program_generates_the_quickstarts_text(workplace: Path, source: ExportSource, greedy_text: str) -> None:
    folder = export(workplace, "onnx")
    options = ["--prompt", PROMPT, "--max-new-tokens", str(MAX_NEW_TOKENS), "--temperature", "0", "--file"]
    texts = {
        file: run_command(workplace, sys.executable, folder / PROGRAM, *options, file).removesuffix("\n")
        for file in (CACHED, QUANTIZED)
    }
    assert texts[CACHED] == greedy_text
    assert_plausible(source, texts[QUANTIZED])


def test_torchserve_handler_generates_the_quickstarts_text(workplace: Path, greedy_text: str) -> None:
    folder = export(workplace, "torchserve")
    unpacked = workplace / "unpacked"
    with zipfile.ZipFile(folder / "quickstart.mar") as archive:
        archive.extractall(unpacked)
    request = {"prompt": PROMPT, "temperature": 0, "max_new_tokens": MAX_NEW_TOKENS}
    (answer,) = load_handler(unpacked).handle([{"body": request}], None)
    assert answer["text"] == greedy_text
