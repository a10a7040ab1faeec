"""What may be wrong with a run, a place or a machine: each export and `push` says it in one line and writes nothing."""

import dataclasses
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tiny_exports import TrainedRun

from tiny_lm.cli import main
from tiny_lm.export.huggingface import write_huggingface
from tiny_lm.export.source import load_source
from tiny_lm.model import load_model_config
from tiny_lm.model.checkpoint import CHECKPOINT_KEY
from tiny_lm.runs import Run

HUGGINGFACE, GGUF, OLLAMA, ONNX = (
    f"export {form} RUN --output-dir out" for form in ("huggingface", "gguf", "ollama", "onnx")
)
PUSH = "push RUN --repo-id me/tiny --dry-run"
EXPORTS = [HUGGINGFACE, GGUF, OLLAMA, ONNX]
COMMANDS = [*EXPORTS, PUSH]

Refused = Callable[..., str]


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Run a command that is refused, in a folder of its own, and return its one line."""
    workplace = tmp_path / "workplace"
    workplace.mkdir()
    monkeypatch.chdir(workplace)

    def run(command: str, run: str | Path = "run") -> str:
        capsys.readouterr()  # what a run told while it was trained
        before = sorted(workplace.rglob("*"))
        monkeypatch.setattr(sys, "argv", ["tiny-lm", *command.replace("RUN", str(run)).split()])
        with pytest.raises(SystemExit) as exit_:
            main()
        captured = capsys.readouterr()
        assert exit_.value.code == 2, captured.err
        assert captured.out == ""
        assert sorted(workplace.rglob("*")) == before
        (line,) = captured.err.splitlines()
        return line

    return run


@pytest.fixture
def copied(refused: Refused, trained_run: TrainedRun) -> Run:
    """A copy of a run in the folder where the commands are run."""
    shutil.copytree(trained_run().folder, "run")
    return Run(Path("run"))


def change_checkpoint(run: Run, change: Callable[[dict[str, object]], None]) -> None:
    for path in run.checkpoints.glob("*.ckpt"):
        checkpoint = torch.load(path, weights_only=True)
        change(checkpoint)
        path.unlink()
        torch.save(checkpoint, path)


# --- the run ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_no_run(command: str, refused: Refused, trained_run: TrainedRun) -> None:
    Path("text.yaml").write_text("a: 1\n")
    Path("empty").mkdir()
    Path("exported").mkdir()
    write_huggingface(load_source(trained_run().folder), Path("exported"))
    assert "runs/none: no such run folder" in refused(command, "runs/none")
    assert "none.ckpt: no such checkpoint" in refused(command, "none.ckpt")
    assert "text.yaml: is neither a run folder nor a .ckpt file" in refused(command, "text.yaml")
    assert "empty: is not a run folder (it has no run.json)" in refused(command, "empty")
    assert "import it as a run first: tiny-lm import exported" in refused(command, "exported")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_run_that_is_being_trained_or_has_not_begun(command: str, refused: Refused, copied: Run) -> None:
    code = "from tiny_lm.runs import Run; from pathlib import Path\nwith Run(Path('run')).claim():\n"
    code += "    print('ready', flush=True); input()"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdin is not None and child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    assert "run: another process is training this run; wait until it has finished" in refused(command)
    child.communicate("\n")
    shutil.rmtree(copied.checkpoints)
    assert "run: has no checkpoint yet" in refused(command)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_checkpoint_of_another_family_than_its_config(command: str, refused: Refused, copied: Run) -> None:
    config = load_model_config(copied.configs / "model.yaml")
    load_model_config("turbo-qwen").save(copied.configs / "model.yaml")
    line = refused(command)
    assert "best.ckpt: was trained with another model config: architecture is llama3, not qwen3" in line
    dataclasses.replace(config, n_layers=3).save(copied.configs / "model.yaml")
    assert "was trained with another model config: n_layers is 2, not 3" in refused(command, copied.best_checkpoint)
    (copied.configs / "model.yaml").unlink()
    change_checkpoint(copied, lambda checkpoint: checkpoint[CHECKPOINT_KEY]["model"].update(architecture="qwen3"))
    assert "best.ckpt: its weights do not match its config" in refused(command)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_vocabulary_that_does_not_match(command: str, refused: Refused, copied: Run, trained_run: TrainedRun) -> None:
    shutil.rmtree(copied.tokenizer)
    assert "run/tokenizer: no such tokenizer folder" in refused(command)
    shutil.copytree(trained_run("llama3", "char").tokenizer, copied.tokenizer)
    assert "run/tokenizer: tokenizer does not match run/checkpoints/best.ckpt" in refused(command)
    shutil.rmtree(copied.tokenizer)
    shutil.copytree(trained_run().tokenizer, copied.tokenizer)
    size = load_source("run").config.vocab_size

    def shrink(checkpoint: dict[str, dict[str, object]]) -> None:
        checkpoint[CHECKPOINT_KEY]["model"]["vocab_size"] = size - 8
        for name in ("model.token_emb.weight", "model.lm_head.weight"):
            checkpoint["state_dict"][name] = checkpoint["state_dict"][name][:-8].clone()

    (copied.configs / "model.yaml").unlink()
    change_checkpoint(copied, shrink)
    assert f"has {size} tokens, but the model of run/checkpoints/best.ckpt only {size - 8}" in refused(command)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_weight_that_is_no_number_and_a_damaged_file(command: str, refused: Refused, copied: Run) -> None:
    def spoil(checkpoint: dict[str, dict[str, torch.Tensor]]) -> None:
        checkpoint["state_dict"]["model.blocks.0.ffn.w1.weight"][3, 3] = float("nan")

    change_checkpoint(copied, spoil)
    assert "best.ckpt: blocks.0.ffn.w1.weight contains NaN or infinity" in refused(command)
    copied.best_checkpoint.write_bytes(copied.best_checkpoint.read_bytes()[:5000])
    assert "best.ckpt: is damaged" in refused(command)


# --- the place -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", EXPORTS)
def test_an_output_folder_that_cannot_be_written(
    command: str, refused: Refused, copied: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("out").mkdir()
    Path("out/mine.txt").write_text("x")
    assert "out: holds files already; choose another folder, or replace it with --force" in refused(command)
    assert "out: holds files that no export wrote" in refused(command + " --force")
    shutil.rmtree("out")
    Path("out").write_text("x")
    assert "out: is a file, not a folder" in refused(command)
    assert ".: is the working directory" in refused(command.replace(" out", " ."))
    assert "..: contains the working directory" in refused(command.replace(" out", " .."))


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=1000))
    yield


@pytest.mark.usefixtures("full_disk")
@pytest.mark.parametrize("command", [HUGGINGFACE, ONNX, PUSH])
def test_a_full_disk(command: str, refused: Refused, copied: Run) -> None:
    assert "but the disk has only 0 MB free" in refused(command)


@pytest.mark.llamacpp
@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_for_gguf(refused: Refused, copied: Run) -> None:
    assert "but the disk has only 0 MB free" in refused(GGUF)


FILL = """
import resource, signal, sys
from pathlib import Path
from tiny_lm.errors import UserError
from tiny_lm.export.gguf_file import write_gguf
from tiny_lm.export.gguf_vocabulary import to_gguf_vocabulary
from tiny_lm.export.huggingface import export_huggingface
from tiny_lm.export.source import load_source
from tiny_lm.files import atomic_folder
source = load_source("run")
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # a write beyond it fails as on a full disk
def gguf():
    with atomic_folder(Path("out")) as folder:
        write_gguf(source, to_gguf_vocabulary(source.tokenizer, source.config.vocab_size), folder / "x.gguf", "F32")
for write in (lambda: export_huggingface(source, Path("out")), gguf):
    try:
        write()
    except UserError as error:
        print(error)
"""


def test_a_disk_that_fills_while_it_is_written(refused: Refused, copied: Run) -> None:
    done = subprocess.run([sys.executable, "-c", FILL], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    huggingface, gguf = done.stdout.splitlines()
    assert "model.safetensors: could not be written (" in huggingface
    assert "x.gguf: could not be written; is the disk full? (" in gguf
    assert sorted(path.name for path in Path().iterdir()) == ["run"]


# --- the machine -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "library", "extra"),
    [
        (HUGGINGFACE, "transformers", "export"),
        (GGUF, "gguf", "export"),
        (GGUF, "llama_cpp", "llamacpp"),
        (ONNX, "onnxruntime", "onnx"),
        (PUSH, "transformers", "export"),
    ],
)
def test_a_missing_extra_is_named(
    command: str, library: str, extra: str, refused: Refused, copied: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    assert f"pip install 'tiny-lm[{extra}]'" in refused(command)
