"""What commands leave behind when signals end them, what they do beside each other, and where they may write."""

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

import pytest
from forked_commands import Commands, forked_commands
from story_runs import train_story_run

CONFIGS = {
    "text.yaml": "name: text.txt\nsource: local\n",
    "bpe.yaml": "name: bpe\nvocab_size: 400\ndataset_config: text.yaml\nval_split: 0.2\n",
    "model.yaml": "vocab_size: 512\ncontext_length: 32\nd_model: 32\nn_layers: 1\nn_heads: 2\nd_ff: 64\n",
    "training.yaml": "max_steps: 2\nlearning_rate: 0.001\nprecision: 32-true\nsample_tokens: 0\ncompile: false\n",
}


@pytest.fixture(scope="module")
def commands() -> Iterator[Commands]:
    with forked_commands() as started:
        yield started


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, stream_folder: Path) -> Path:
    return train_story_run(tmp_path_factory.mktemp("trained") / "fox", stream_folder, steps=2)


@pytest.fixture
def folder(tmp_path: Path, trained: Path, stories: list[str], stream_folder: Path) -> Path:
    """A working directory with a run, a corpus and configs, that any user may reach."""
    shutil.copytree(trained, tmp_path / "runs" / "fox")
    (tmp_path / "text.txt").write_text("\n<|endoftext|>\n".join(stories[:60]))
    data = f"train_path: {stream_folder}/train.bin\nval_path: {stream_folder}/val.bin\nblock_size: 32\nbatch_size: 4\n"
    for name, text in {**CONFIGS, "data.yaml": data}.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if re.fullmatch(r"\..+\.\d+\.(tmp|old)", path.name)]


EXPORTS = {
    "huggingface": ["export", "huggingface", "runs/fox", "--output-dir", "out"],
    "gguf": ["export", "gguf", "runs/fox", "--output-dir", "out"],
    "ollama": ["export", "ollama", "runs/fox", "--output-dir", "out"],
    "onnx": ["export", "onnx", "runs/fox", "--output-dir", "out"],
    "torchserve": ["export", "torchserve", "runs/fox", "--output-dir", "out"],
}
TRAIN = ["train", *(f"--{section}-config={section}.yaml" for section in ("model", "training", "data"))]
EVAL = ["eval", "runs/fox", "--samples", "1", "--max-new-tokens", "2"]
WRITING = {
    **EXPORTS,
    "push": ["push", "runs/fox", "--repo-id", "a/b", "--dry-run"],
    "tokenizer train": ["tokenizer", "train", "--config", "bpe.yaml"],
    "tokenize": ["tokenize", "--config", "bpe.yaml", "--tokenizer", "runs/fox/tokenizer"],
    "eval": EVAL,
    "report": ["report", "runs/fox"],
}


@pytest.mark.parametrize(
    ("name", "number"),
    [
        pytest.param(name, number, marks=[pytest.mark.llamacpp] if name in ("gguf", "ollama") else [])
        for name, number in zip(WRITING, cycle([signal.SIGTERM, signal.SIGHUP]), strict=False)
    ],
)
def test_what_a_killed_command_leaves_is_removed_by_the_next(
    name: str, number: signal.Signals, folder: Path, commands: Commands
) -> None:
    """The next one is ended, too, by a signal that lets it remove what is its own."""
    options = {"folder": folder, "temporary": str(folder)}
    [ended] = commands.run(WRITING[name], signal="SIGKILL", **options)
    assert ended.code == -signal.SIGKILL, ended
    assert leftovers(folder)
    [ended] = commands.run(WRITING[name], signal=number.name, **options)
    assert ended.error == f"ended by {number.name}", ended
    assert ended.code == 128 + number
    assert leftovers(folder) == []
    assert not (folder / "out").exists()


def test_three_exports_and_an_evaluation_of_one_run_at_once(folder: Path, commands: Commands) -> None:
    exports = [[*EXPORTS["huggingface"][:-1], f"out-{number}"] for number in range(3)]
    for ended in commands.run(*exports, EVAL, folder=folder):
        assert ended.code == 0, ended
    assert all((folder / f"out-{number}" / "verification.json").is_file() for number in range(3))


def test_four_trainings_that_begin_in_one_second_have_a_run_each(folder: Path, commands: Commands) -> None:
    for ended in commands.run(*[TRAIN] * 4, folder=folder, signal="SIGTERM"):
        assert ended.code == 143, ended  # as they write their first file
    assert len(list(folder.glob("runs/model-data-*/configs"))) == 4


def test_two_trainings_of_one_run_name_do_not_share_a_run(folder: Path, commands: Commands) -> None:
    first, second = sorted(
        commands.run(*[[*TRAIN, "--set", "training.run_name=r"]] * 2, folder=folder), key=lambda ended: ended.code
    )
    assert (first.code, second.code) == (0, 2), (first, second)
    assert re.match(r"error: runs/r: (another process|already exists)", second.error)
    steps = [json.loads(line)["step"] for line in (folder / "runs" / "r" / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))


# --- where commands may write ----------------------------------------------------------------------------------------


needs_root = pytest.mark.skipif(
    os.name == "nt" or subprocess.run(["sh", "-c", "unshare -m true 2>/dev/null"]).returncode != 0,
    reason="other users and mounts need root",
)
OUTPUTS = {
    **{name: WRITING[name] for name in ("huggingface", "tokenizer train", "tokenize", "eval", "report")},
    "data stories": ["data", "stories", "--count", "3", "--output", "x.txt"],
    "import": ["import", "model"],
    "train": TRAIN,
    "train --resume": ["train", "--resume", "runs/fox", "--set", "training.max_steps=3"],
}
"""Commands that write into the working directory; those of the other exports write as the first one does."""


def test_outputs_that_are_inputs_are_refused(folder: Path, commands: Commands) -> None:
    """And tokenizer and stream below their corpus are not read as text the next time."""
    (folder / "corpus").mkdir()
    (folder / "text.txt").rename(folder / "corpus" / "text.txt")
    (folder / "text.yaml").write_text("name: corpus\nsource: local\n")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    train, tokenize = ["tokenizer", "train", "--config", "bpe.yaml"], ["tokenize", "--config", "bpe.yaml"]
    for words, message in {
        (*train, "--set", "tokenizer.output_dir=corpus"): "output_dir corpus is the folder of the corpus",
        (*tokenize, "--set", "tokenizer.tokenized_output_dir=corpus/."): "is the folder of the corpus",
        (*EXPORTS["huggingface"][:-1], "runs/fox", "--force"): "runs/fox: holds files that no export wrote",
        (*EXPORTS["huggingface"][:-1], "runs/fox/tokenizer", "--force"): "holds files that no export wrote",
        (*EXPORTS["gguf"][:-1], "runs", "--force"): "runs: holds files that no export wrote",
        ("import", "runs/fox", "--output-dir", "runs/fox"): "runs/fox: ",
    }.items():
        [ended] = commands.run(list(words), folder=folder)
        assert (ended.code, ended.error.startswith("error: ")) == (2, True), ended
        assert message in ended.error
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    below = ["--set", "tokenizer.output_dir=corpus/bpe", "--set", "tokenizer.tokenized_output_dir=corpus/stream"]
    for words in ([*train, *below], [*tokenize, *below], [*train, *below]):
        [ended] = commands.run(words, folder=folder)
        assert ended.code == 0, ended
        assert "60 documents, 1 file" in ended.stderr


@needs_root
@pytest.mark.parametrize("how", ["foreign owner", "read-only disk"])
def test_where_nothing_may_be_written_commands_end_in_one_line(how: str, folder: Path, commands: Commands) -> None:
    """And what only reads works: the run belongs to somebody else."""
    assert commands.run(["export", "huggingface", "runs/fox", "--output-dir", "model"], folder=folder)[0].code == 0
    if how == "foreign owner":
        for path in (folder, *folder.rglob("*")):
            os.chown(path, 65534, 65534)
    options = {"read_all_write_own": True} if how == "foreign owner" else {"read_only": str(folder)}
    before = sorted(folder.rglob("*"))
    [generated] = commands.run(["generate", "runs/fox", "--max-new-tokens", "2"], folder=folder, **options)
    assert generated.code == 0, generated
    wrong = {}
    for name, words in OUTPUTS.items():
        [ended] = commands.run(words, folder=folder, **options)
        if ended.code != 2 or not re.match("error: .*(Permission denied|Read-only file system)", ended.error):
            wrong[name] = ended
    assert not wrong, wrong
    assert sorted(folder.rglob("*")) == before
