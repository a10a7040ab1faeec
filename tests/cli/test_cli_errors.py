"""What a user may type wrong: each ends in one line on standard error and exit code 2."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tiny_lm.dataset.filters import in_validation
from tiny_lm.dataset.stories import generate_stories


@pytest.fixture
def files(workplace: Path) -> Path:
    """Config files of which each test spoils one."""
    (workplace / "text.txt").write_text("\n<|endoftext|>\n".join(generate_stories(60)))
    (workplace / "text.yaml").write_text("name: text.txt\nsource: local\n")
    (workplace / "bpe.yaml").write_text("name: bpe\nvocab_size: 400\ndataset_config: text.yaml\nval_split: 0.2\n")
    (workplace / "model.yaml").write_text(
        "vocab_size: 400\ncontext_length: 64\nd_model: 32\nn_layers: 1\nn_heads: 2\nd_ff: 64\n"
    )
    (workplace / "training.yaml").write_text("max_steps: 2\nlearning_rate: 0.001\nprecision: 32-true\nrun_name: r\n")
    (workplace / "data.yaml").write_text(
        "train_path: data/bpe-tokenized/train.bin\nval_path: data/bpe-tokenized/val.bin\n"
        "block_size: 32\nbatch_size: 2\n"
    )
    return workplace


TRAIN = ["train", "--model-config", "model.yaml", "--training-config", "training.yaml", "--data-config", "data.yaml"]
TOKENIZER = ["tokenizer", "train", "--config", "bpe.yaml"]


@pytest.mark.parametrize(
    ("file", "line", "command", "message"),
    [
        ("model.yaml", "d_modle: 32", TRAIN, r"model.yaml: unknown key 'd_modle'; did you mean 'd_model'\?"),
        ("model.yaml", "dropout: much", TRAIN, r"model.yaml: dropout: input should be a valid number \(it is 'much'\)"),
        ("model.yaml", "d_model: 33", TRAIN, r"model.yaml: .*d_model.*33.*n_heads"),
        ("model.yaml", "architecture: gpt5", TRAIN, r"model.yaml: .*gpt5"),
        ("model.yaml", "context_length: 16", TRAIN, r"block_size 32 .* above context_length 16"),
        ("model.yaml", "vocab_size: 300", TRAIN, r"vocab_size 300 of the model config is below the 400 tokens"),
        ("training.yaml", "max_steps: 1.5", TRAIN, r"training.yaml: max_steps: input should be a valid integer"),
        ("training.yaml", "precision: fp8", TRAIN, r"training.yaml: precision: input should be '32-true'"),
        ("training.yaml", "run_name: ../x", TRAIN, r"training.yaml: run_name: "),
        ("training.yaml", "resume_from_checkpoint: nowhere.ckpt", TRAIN, r"nowhere.ckpt: no such checkpoint"),
        ("data.yaml", "eos_token_id: 2", TRAIN, r"eos_token_id: is 2 in the data config but 397 in the metadata.json"),
        ("data.yaml", "block_size: 100000", TRAIN, r"too few for one sequence of block_size 100000"),
        ("data.yaml", "train_path: other.bin", TRAIN, r"other.bin: no such token stream"),
        ("bpe.yaml", "vocab_size: 259", TOKENIZER, r"a BPE tokenizer with 4 special tokens needs at least 260"),
        ("bpe.yaml", "dataset_config: nothing", TOKENIZER, r"nothing: no such datasets config"),
        ("text.yaml", "name: absent.txt", TOKENIZER, r"absent.txt"),
        ("text.yaml", "name: empty.txt", TOKENIZER, r"empty.txt|no document|empty"),
        ("text.yaml", "name: broken.txt", TOKENIZER, r"broken.txt: .*byte 11.*--errors replace"),
    ],
)  # fmt: skip
def test_a_spoilt_file(
    file: str, line: str, command: list[str], message: str, files: Path, cli: Callable[..., object]
) -> None:
    (files / "empty.txt").write_text("")
    (files / "broken.txt").write_bytes(b"Once upon a\xff time")
    if command is TRAIN:
        assert cli(*TOKENIZER).code == 0
        assert cli("tokenize", "--config", "bpe.yaml").code == 0
    key = line.split(":")[0]
    kept = [old for old in (files / file).read_text().splitlines() if not old.startswith(key + ":")]
    (files / file).write_text("\n".join([*kept, line]) + "\n")
    before = sorted(path for path in files.rglob("*"))
    result = cli(*command)
    assert result.code == 2
    assert result.stdout == ""
    assert re.search(f"^error: .*{message}", result.stderr.splitlines()[-1]), result.stderr
    assert sorted(path for path in files.rglob("*")) == before  # nothing half-written


def test_invalid_utf8_can_be_read_on_request(files: Path, cli: Callable[..., object]) -> None:
    with (files / "text.txt").open("ab") as file:
        file.write(b"\n<|endoftext|>\nOnce upon a\xff time\n")
    assert cli(*TOKENIZER).code == 2
    assert cli(*TOKENIZER, "--errors", "replace").code == 0
    assert cli("tokenize", "--config", "bpe.yaml", "--errors", "replace").code == 0


def test_a_tokenizer_does_not_see_what_the_stream_holds_out(files: Path, cli: Callable[..., object]) -> None:
    """Where both commands get the same seed: each document has a character of its own."""
    texts = [chr(0x4E00 + number) * 3 for number in range(40)]
    (files / "text.txt").write_text("\n<|endoftext|>\n".join(texts))
    (files / "char.yaml").write_text("name: char\ntype: char\ndataset_config: text.yaml\nval_split: 0.5\n")
    assert cli("tokenizer", "train", "--config", "char.yaml", "--seed", "3").code == 0
    vocabulary = json.loads((files / "tokenizers/char/tokenizer.json").read_text())["model"]["vocab"]
    assert {token for token in vocabulary if token >= "一"} == {
        text[0] for text in texts if not in_validation(text, 0.5, 3)
    }


def test_a_tokenizer_that_is_yet_to_be_trained(files: Path, cli: Callable[..., object]) -> None:
    result = cli("tokenize", "--config", "bpe.yaml", "--set", "tokenizer.output_dir=my tokenizer")
    assert result.code == 2
    command = "tiny-lm tokenizer train --config bpe.yaml --set 'tokenizer.output_dir=my tokenizer'"
    assert f"my tokenizer: no tokenizer yet; train it first with `{command}`" in result.stderr


def test_a_tokenizer_config_that_was_changed_after_the_training(files: Path, cli: Callable[..., object]) -> None:
    cli(*TOKENIZER)
    with (files / "bpe.yaml").open("a") as file:
        file.write("special_tokens: {eos: <end>, bos: <begin>}\n")
    result = cli("tokenize", "--config", "bpe.yaml")
    assert result.code == 2
    assert "train it again with `tiny-lm tokenizer train --config bpe.yaml`" in result.stderr


@pytest.mark.parametrize("command", ["eval", "report", "export huggingface --output-dir out"])
def test_commands_for_runs_name_import_for_a_hugging_face_folder(
    command: str, files: Path, cli: Callable[..., object]
) -> None:
    (files / "their model").mkdir()
    (files / "their model" / "config.json").write_text("{}")
    result = cli(*command.split(), "their model")
    assert (result.code, result.stderr.count("\n")) == (2, 1), result.stderr
    assert result.stderr.endswith("import it as a run first: tiny-lm import 'their model'\n"), result.stderr


def test_a_checkpoint_outside_a_run_is_not_gone_on_from(files: Path, cli: Callable[..., object]) -> None:
    cli(*TOKENIZER)
    cli("tokenize", "--config", "bpe.yaml")
    cli(*TRAIN)
    (files / "deep").mkdir()
    (files / "runs" / "r" / "checkpoints" / "last.ckpt").rename(files / "deep" / "copy.ckpt")
    result = cli(*TRAIN, "--resume", "deep/copy.ckpt", "--set", "training.max_steps=9")
    assert result.code == 2
    assert "is not a run folder" in result.stderr
    result = cli(*TRAIN)
    assert "runs/r: already exists" in result.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fly"], r"No such command 'fly'"),
        (["train"], r"name a profile .* --model-config and --training-config and --data-config"),
        (["train", "sped"], r"sped: no such profiles config; did you mean 'speed'\?"),
        (["train", "speed", "--set", "model.d_modle=1"], r"unknown key 'd_modle'; did you mean 'd_model'\?"),
        (["train", "speed", "--set", "modle.d_model=1"], r"unknown section 'modle'; did you mean 'model'\?"),
        (["train", "speed", "--fast"], r"No such option: --fast"),
        (["train", "speed"], r"train.bin: no such token stream; write it with: tiny-lm tokenizer train --config"),
        (["train", "--resume", "runs/none"], r"runs/none: no such run folder"),
        (["tokenize", "--config", "tinystories-8k"], r"tokenizers/tinystories-8k"),
        (["tokenize"], r"Missing option '--config'"),
        (["tokenizer", "inspect", "nowhere"], r"nowhere"),
        (["generate", "runs/none"], r"runs/none: no such run folder"),
        (["generate", "none.ckpt"], r"none.ckpt: no such checkpoint"),
        (["generate", "runs/none", "--temperature", "hot"], r"Invalid value for '--temperature'"),
        (["estimate", "speed", "--set", "data.block_size=999"], r"block_size 999 .* above context_length 256"),
        (["find-batch-size", "speed", "--set", "data.block_size=999"], r"block_size 999 .* above context_length 256"),
        (["params", "--model-config", "gpt2-8k-3l"], r"gpt2-8k-3l: no such models config; did you mean 'gpt2-8k-2l'\?"),
        (["quickstart", "--text", "absent.txt"], r"--text absent.txt: no such file or folder"),
        (["quickstart", "--minutes", "-1"], r"Invalid value for '--minutes'"),
        (["data", "stories", "--split", "test"], r"--split test: unknown; there are: train, validation"),
    ],
)  # fmt: skip
def test_a_wrong_command(words: list[str], message: str, workplace: Path, cli: Callable[..., object]) -> None:
    result = cli(*words)
    assert result.code == 2
    assert result.stdout == ""
    assert re.search(f"error: .*{message}", result.stderr), result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert list(workplace.iterdir()) == []


def test_without_a_network_the_hub_names_the_other_sources(workplace: Path) -> None:
    code = "from tiny_lm.cli import main; main('data', 'download')"
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(workplace / "cache")}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert "source: local" in line
    assert "source: stories" in line


def test_help_is_quick_and_names_every_command(workplace: Path, cli: Callable[..., object]) -> None:
    result = cli()
    assert result.code == 0
    for command in ("quickstart", "data", "tokenizer", "tokenize", "train", "params", "generate"):
        assert f"  {command} " in result.stdout
    assert re.fullmatch(r"tiny-lm \d+\.\d+\.\d+\n", cli("--version").stdout)


def test_a_group_without_a_command_shows_its_help(workplace: Path, cli: Callable[..., object]) -> None:
    result = cli("data")
    assert result.code == 2
    assert re.search(r"^  download ", result.stderr, flags=re.MULTILINE)


def test_a_reader_that_has_had_enough_is_no_error(workplace: Path) -> None:
    code = "from tiny_lm.cli import main; main('train', 'speed', '--dry-run')"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout is not None and child.stderr is not None
    child.stdout.close()  # as `| head -0` does
    assert child.stderr.read() == b""
    child.stderr.close()
    assert child.wait(timeout=60) == 141  # as a shell says of a program that SIGPIPE ended
