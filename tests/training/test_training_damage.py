"""Run folders with damaged, unreadable and foreign files in them."""

import io
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.console import Console
from tiny_runs import model, training

from tiny_lm.config import parse_yaml
from tiny_lm.data import BinDataConfig
from tiny_lm.errors import UserError
from tiny_lm.evaluation.plots import plot_run
from tiny_lm.model.checkpoint import read_checkpoint
from tiny_lm.runs import Run, mean_over_time, number_in, read_metrics
from tiny_lm.training.fit import train
from tiny_lm.training.resume import find_checkpoint


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, stream_folder: Path) -> Run:
    """A run with checkpoints of steps 4 and 8."""
    paths = {f"{split}_path": str(stream_folder / f"{split}.bin") for split in ("train", "val")}
    run = Run(tmp_path_factory.mktemp("damage") / "r")
    train(model(), training(max_steps=8), BinDataConfig(**paths, block_size=32, batch_size=4), run)
    return run


@pytest.fixture
def copy(whole: Run, tmp_path: Path) -> Run:
    """A copy of it to be damaged; its files have one name each."""
    shutil.copytree(whole.folder, tmp_path / "r")
    return Run(tmp_path / "r")


def find(run: Run) -> tuple[Path | None, str]:
    output = io.StringIO()
    return find_checkpoint(run, Console(file=output, width=2000, soft_wrap=True)), output.getvalue()


def replace_with_folder(path: Path, run: Run) -> None:
    path.mkdir()
    (path / "note.txt").write_text("mine")


def replace_with_dangling_link(path: Path, run: Run) -> None:
    path.symlink_to("gone.ckpt")


def replace_with_pipe(path: Path, run: Run) -> None:
    os.mkfifo(path)


def replace_with_another_model(path: Path, run: Run) -> None:
    source = run.folder.parent / "other"
    config = BinDataConfig.from_yaml(run.configs / "data.yaml")
    train(model("llama3"), training(max_steps=9), config, Run(source))
    shutil.copyfile(Run(source).last_checkpoint, path)


@pytest.mark.parametrize(
    ("replace", "message"),
    [
        (replace_with_folder, "last.ckpt: is a folder"),
        (replace_with_dangling_link, "last.ckpt: is a link to a missing file"),
        (replace_with_pipe, "last.ckpt: is not a file"),
        (replace_with_another_model, "last.ckpt: holds another model than"),
    ],
)
def test_what_is_no_checkpoint_of_the_run_falls_back_and_resumes(
    replace: Callable[[Path, Run], None], message: str, copy: Run
) -> None:
    copy.last_checkpoint.unlink()
    replace(copy.last_checkpoint, copy)
    found, said = find(copy)
    assert found == copy.step_checkpoint(8)
    assert message in said
    assert f"resuming from {found} of step 8" in said
    config = BinDataConfig.from_yaml(copy.configs / "data.yaml")
    assert train(model(), training(max_steps=10), config, copy, resume_from=found).steps == 10
    assert read_checkpoint(copy.last_checkpoint)["global_step"] == 10
    if replace is replace_with_folder:
        assert (copy.checkpoints / "last.ckpt.folder-1" / "note.txt").read_text() == "mine"


def test_any_byte_changed_in_the_pickle_is_damage_that_falls_back(copy: Run) -> None:
    content = copy.step_checkpoint(8).read_bytes()
    start, rng = content.index(b"data.pkl") + 64, random.Random(7)
    for _ in range(40):
        spoilt = bytearray(content)
        spoilt[start + rng.randrange(2000)] ^= 1 << rng.randrange(8)
        copy.step_checkpoint(8).write_bytes(spoilt)
        with pytest.raises(UserError, match="is damaged"):
            read_checkpoint(copy.step_checkpoint(8), mmap=False)


AS_NOBODY = """
import os, sys
from pathlib import Path
import torch, tiny_lm.training.resume, tiny_lm.evaluation.report.artifacts as artifacts
from rich.console import Console
from tiny_lm.errors import UserError
from tiny_lm.runs import Run, read_metrics
if os.getuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
run = Run(Path(sys.argv[1]))
for read in (run.read_metadata, lambda: read_metrics(run.metrics), lambda: tiny_lm.training.resume.read_checkpoint(
        run.last_checkpoint), lambda: tiny_lm.training.resume.find_checkpoint(run, Console(quiet=True))):
    try:
        read()
    except UserError as error:
        print(error)
"""


@pytest.fixture
def reachable(whole: Run) -> Iterator[Run]:
    """A copy that other users can reach: pytest keeps its own folders to the user who runs it."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Run(Path(shutil.copytree(whole.folder, Path(folder) / "r")))


COMMAND_AS_NOBODY = """
import os, sys
import torch, transformers, tiny_lm.export.huggingface, tiny_lm.inference, tiny_lm.training.fit
from tiny_lm.cli import generate, main, train
if os.getuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
main(*sys.argv[1:])
"""


@pytest.mark.parametrize("words", [("generate",), ("train", "--resume"), ("export", "huggingface")])
def test_a_folder_without_permission_is_one_line(words: tuple[str, ...], reachable: Run, tmp_path: Path) -> None:
    reachable.checkpoints.chmod(0)
    extra = ["--output-dir", str(tmp_path / "out")] if words[0] == "export" else []
    done = subprocess.run(
        [sys.executable, "-c", COMMAND_AS_NOBODY, *words, str(reachable.folder), *extra],
        capture_output=True,
        text=True,
        timeout=120,
    )
    reachable.checkpoints.chmod(0o755)
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode == 2, done
    assert done.stderr.splitlines()[-1].startswith("error: "), done


def test_files_without_permission_are_said_to_be_unreadable(reachable: Run) -> None:
    for path in (reachable.metadata_file, reachable.metrics, *reachable.checkpoints.iterdir()):
        path.chmod(0)
    done = subprocess.run(
        [sys.executable, "-c", AS_NOBODY, str(reachable.folder)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 4, done
    assert all("could not be read (Permission denied)" in line for line in lines), lines


EVENTS = [
    '{"step": 1, "train_loss": 2.5, "tokens": 10, "tokens_per_sec": 5.0, "mfu": 0.1}',
    '{"step": 2, "train_loss": NaN, "tokens": "ten", "tokens_per_sec": [5.0]}',
    '{"step": 3, "train_loss": 1' + "0" * 400 + ', "val_loss": 1e400}',
    '{"step": 4, "train_loss": 1' + "0" * 5000 + "}",
    '{"step": true, "train_loss": 1.0}',
    '{"step": -1, "train_loss": 1.0}',
    '{"step": 1e3, "train_loss": 1.0}',
    '{"step": 1' + "0" * 30 + "}",
    '{"step": 5, "train_loss": {"a": [1]}, "val_loss": false, "tokens_per_sec": 0}',
    "[" * 100_000,
    "null",
    '{"step": 6, "train_loss"',
    '{"step": 7, "train_loss": 1.5, "tokens": 20, "tokens_per_sec": 5.0, "mfu": null}',
]


def test_foreign_metrics_leave_what_is_a_number(copy: Run) -> None:
    copy.metrics.write_bytes("\n".join(EVENTS).encode() + b"\n\xff\xfe\x00\n")
    events = read_metrics(copy.metrics)
    assert [event["step"] for event in events] == [1, 2, 3, 4, 5, 7]
    assert [event.get("train_loss") for event in events] == [2.5, None, None, None, None, 1.5]
    assert mean_over_time(events, "tokens_per_sec") == 5.0
    assert len(plot_run(copy, events)) == 2


@pytest.mark.parametrize("text", ["[]", "{", "\x00", "[" * 100_000, '{"steps": 1' + "0" * 5000])
def test_a_record_that_is_none_is_one_line(text: str, copy: Run) -> None:
    copy.metadata_file.write_text(text)
    with pytest.raises(UserError, match=r"run\.json: "):
        copy.read_metadata()


def test_numbers_of_a_record_are_finite_or_missing(copy: Run) -> None:
    copy.metadata_file.write_text(
        '{"seconds": 1' + "0" * 400 + ', "steps": "8", "metrics": {"val_loss": Infinity, "a": 2}}'
    )
    record = copy.read_metadata()
    assert number_in(record, "seconds") is None
    assert number_in(record, "steps") is None
    assert number_in(record, "metrics", "val_loss") is None
    assert number_in(record, "metrics", "a") == 2.0


@pytest.mark.parametrize("text", ["a: !!int ''", "a: !!bool x", "a: !!timestamp x", "a: !!binary 5", "a: 2020-13-45"])
def test_yaml_tags_on_what_they_do_not_fit_are_one_line(text: str) -> None:
    with pytest.raises(UserError, match=r"^source:"):
        parse_yaml(text, source="source")
