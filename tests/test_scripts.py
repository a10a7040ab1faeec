"""Each documented script, run as documented, on tiny data; and the wheel, run from an empty folder."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tiny_lm.dataset.stories import generate_stories

ROOT = Path(__file__).parent.parent


def run(*words: str | Path, cwd: Path, **environment: str) -> str:
    result = subprocess.run(
        [str(word) for word in words], cwd=cwd, capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def script(name: str, *words: str, cwd: Path) -> str:
    return run(sys.executable, ROOT / "scripts" / name, *words, cwd=cwd)


def test_the_documented_scripts_go_from_text_to_a_story(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n<|endoftext|>\n".join(generate_stories(80)))
    (tmp_path / "dataset.yaml").write_text("name: text.txt\nsource: local\n")
    (tmp_path / "mine.yaml").write_text("name: mine\nvocab_size: 400\ndataset_config: dataset.yaml\nval_split: 0.2\n")
    (tmp_path / "model.yaml").write_text(
        "vocab_size: 400\ncontext_length: 64\nd_model: 32\nn_layers: 1\nn_heads: 2\nd_ff: 64\n"
    )
    (tmp_path / "training.yaml").write_text(
        "max_steps: 3\nlearning_rate: 0.001\nprecision: bf16-mixed\nrun_name: R\nval_every_n_steps: 2\n"
    )
    (tmp_path / "data.yaml").write_text(
        "train_path: data/mine-tokenized/train.bin\nval_path: data/mine-tokenized/val.bin\n"
        "block_size: 64\nstride: 64\ndtype: uint16\neos_token_id: 397\nbatch_size: 2\nnum_workers: 4\n"
    )
    assert "80 documents" in script("data/download_data.py", "--config", "dataset.yaml", cwd=tmp_path)
    script("data/train_tokenizer.py", "--config", "mine.yaml", cwd=tmp_path)
    assert (tmp_path / "tokenizers" / "mine" / "tokenizer.json").is_file()
    script("data/tokenize_data.py", "--config", "mine.yaml", "--seed", "3", cwd=tmp_path)
    assert sorted(p.name for p in (tmp_path / "data" / "mine-tokenized").iterdir()) == [
        "metadata.json",
        "tokenizer",
        "train.bin",
        "val.bin",
    ]
    assert "23,360" in script("training/count_model_params.py", "--model-config", "model.yaml", cwd=tmp_path)
    script(
        "training/train_gpt2.py", "--model-config", "model.yaml", "--training-config", "training.yaml",
        "--data-config", "data.yaml", cwd=tmp_path,
    )  # fmt: skip
    common = ["--checkpoint", "runs/R/checkpoints/last.ckpt", "--model-config", "model.yaml", "--prompt", "One day"]
    sampling = ["--temperature", "0.8", "--top-p", "0.9", "--top-k", "40", "--add-bos", "--seed", "5"]
    told = {
        script("inference/generate_from_ckpt.py", *common, *tokenizer, *length, *sampling, cwd=tmp_path)
        for tokenizer, length in [
            (["--tokenizer", "tokenizers/mine/tokenizer.pkl"], ["--max-new-tokens", "20"]),  # as the guides print it
            (["--tokenizer-dir", "tokenizers/mine", "--tokenizer-config", "mine.yaml"], ["--max-tokens", "20"]),
        ]
    }
    assert len(told) == 1
    assert told.pop().startswith("One day")


def test_the_default_training_is_the_baseline(tmp_path: Path) -> None:
    shown = run("bash", ROOT / "run_training.sh", "--dry-run", cwd=tmp_path, PYTHON=sys.executable)
    assert "max_steps: 1962" in shown
    assert "d_model: 768" in shown


def test_the_default_training_names_the_commands_that_it_needs_first(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    shutil.copy(ROOT / "run_training.sh", tmp_path)
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(["bash", tmp_path / "run_training.sh"], capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert done.stderr == (
        "error: data/tinystories-8k-tokenized/train.bin: no such token stream; write it with: tiny-lm tokenizer train "
        "--config tinystories-8k && tiny-lm tokenize --config tinystories-8k\n"
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", folder, cwd=ROOT)
    (built,) = folder.glob("tiny_lm-*.whl")
    return built


def test_the_wheel_carries_configs_and_stories_and_works_in_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    shipped = sorted(path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*.yaml"))
    assert [path for path in shipped if not (site / "tiny_lm" / path).is_file()] == []
    code = "import tiny_lm; print(tiny_lm.__file__); from tiny_lm.cli import main; main()"
    shown = run(
        sys.executable, "-c", code, "params", "--model-config", "gpt2-8k-2l-speed", cwd=empty, PYTHONPATH=str(site)
    )
    assert shown.startswith(str(site))
    assert "6,791,424" in shown
    run(sys.executable, "-c", code, "data", "stories", "--count", "3", cwd=empty, PYTHONPATH=str(site))
    assert (empty / "stories.txt").read_text().count("<|endoftext|>") == 3
