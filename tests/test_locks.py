"""Locks on folders, by real processes, and outputs in unusual places."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tiny_lm.errors import UserError
from tiny_lm.files import atomic_folder, atomic_path, open_output, remove_leftovers, write_text
from tiny_lm.locks import lock_file, lock_folder
from tiny_lm.runs import Run, create_run

_CODE = """
import os, sys
from contextlib import ExitStack
from pathlib import Path
from tiny_lm.files import atomic_folder, atomic_path, open_output
from tiny_lm.locks import lock_folder
with {held}:
    if not {fork} or os.fork() == 0:
        print("held", flush=True)
    sys.stdin.read()
    os._exit(0)
"""


@contextmanager
def held(expression: str, *, fork: bool = False) -> Iterator["subprocess.Popen[str]"]:
    """Run a process that holds what an expression opens, until the end of the block."""
    code = _CODE.format(held=expression, fork=fork)
    with subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_readers_share_a_folder_and_a_writer_excludes_all(tmp_path: Path) -> None:
    shared = f"lock_folder(Path({str(tmp_path)!r}), 'in use', shared=True)"
    with held(shared), held(shared), lock_folder(tmp_path, "in use", shared=True):
        pass
    with held(shared), pytest.raises(UserError, match=r"in use( \(process \d+: .*)?$"), lock_folder(tmp_path, "in use"):
        pass
    with held(shared.replace("shared=True", "")):
        for is_shared in (True, False):
            with pytest.raises(UserError, match="in use"), lock_folder(tmp_path, "in use", shared=is_shared):
                pass
    with lock_folder(tmp_path, "in use"), lock_folder(tmp_path, "in use"):  # one process, which need not fear itself
        pass


def test_a_killed_process_holds_nothing_though_its_child_lives(tmp_path: Path) -> None:
    with held(f"lock_folder(Path({str(tmp_path)!r}), 'in use')", fork=True) as process:
        process.kill()
        process.wait()
        with lock_folder(tmp_path, "in use"):
            pass


def test_a_run_that_is_read_only_is_read_without_a_lock_file(run: Run) -> None:
    run.folder.mkdir(parents=True)
    with run.claim_to_read(), run.claim_to_read():
        assert list(run.folder.iterdir()) == []
    run.folder.chmod(0o555)
    with run.claim_to_read():
        pass


def test_a_lock_file_that_is_a_link_is_not_followed(run: Run, tmp_path: Path) -> None:
    run.folder.mkdir(parents=True)
    (tmp_path / "precious").write_text("kept")
    (run.folder / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match="is a link, which is not followed"), run.claim():
        pass
    with run.claim_to_read():
        pass
    assert (tmp_path / "precious").read_text() == "kept"


_TAKE = "from pathlib import Path; from tiny_lm.locks import lock_file; lock_file(Path({!r}), 'in use').__enter__()"


def _may_take(path: Path) -> bool:
    result = subprocess.run([sys.executable, "-c", _TAKE.format(str(path))], capture_output=True, text=True)
    assert result.returncode == 0 or "in use" in result.stderr
    return result.returncode == 0


@pytest.mark.parametrize("inner_is_shared", [True, False])
def test_a_lock_between_machines_outlives_one_inside_it(inner_is_shared: bool, tmp_path: Path) -> None:
    """The system releases such a lock when its process closes any descriptor of the file."""
    path = tmp_path / "lock"
    with lock_file(path, "in use"):
        with lock_file(path, "in use", shared=inner_is_shared):
            assert not _may_take(path)
        assert not _may_take(path)
    assert _may_take(path)


def test_new_runs_of_one_name_get_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert [create_run("r").name for _ in range(3)] == ["r", "r-2", "r-3"]


def test_leftovers_of_killed_writers_are_removed_and_files_in_use_are_not(tmp_path: Path) -> None:
    target, other = tmp_path / "x.txt", tmp_path / "y.txt"
    with held(f"atomic_path(Path({str(target)!r}))"):
        write_text(other, "whole")
        assert len(list(tmp_path.glob(".x.txt.*.tmp"))) == 1
        write_text(target, "of another")  # leaves the temporary file of a living process alone
        remove_leftovers(tmp_path)
        assert len(list(tmp_path.glob(".x.txt.*.tmp"))) == 1
    assert len(list(tmp_path.glob(".x.txt.*.tmp"))) == 1  # it was killed
    write_text(target, "again")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.txt", "y.txt"]


def test_two_processes_do_not_write_one_output_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused = pytest.raises(UserError, match="another process is writing there")
    with held(f"atomic_folder(Path({str(out)!r}))"), refused, atomic_folder(out):
        pass
    with atomic_folder(out) as folder:  # the other one was killed
        (folder / "new").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_processes_do_not_write_one_output_file(tmp_path: Path) -> None:
    out = tmp_path / "out.txt"
    refused = pytest.raises(UserError, match=r"out\.txt: another process is writing there")
    with held(f"open_output(Path({str(out)!r}))"):
        with refused, open_output(out):
            pass
        (tmp_path / "link").symlink_to(out)
        with (
            pytest.raises(UserError, match=r"out\.txt: another process is writing there"),
            open_output(tmp_path / "link"),
        ):
            pass
        with open_output(tmp_path / "out.tx") as file:  # another file
            file.write(b"other")
        write_text(out, "a file of ours, which is written at once")
    with open_output(out) as file:  # the other one was killed
        file.write(b"new")
        file.flush()
        with pytest.raises(UserError, match="another process is writing there"), open_output(out):
            pass
    assert out.read_bytes() == b"new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "out.tx", "out.txt"]


def test_the_temporary_file_of_an_output_is_not_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("kept")
    temporary = tmp_path / ".out.txt.0.tmp"
    temporary.symlink_to("precious")
    with pytest.raises(UserError, match=r"out\.txt: could not be written"), open_output(tmp_path / "out.txt"):
        pass
    temporary.unlink()
    temporary.hardlink_to(tmp_path / "precious")
    with open_output(tmp_path / "out.txt") as file:
        file.write(b"new")
    assert (tmp_path / "precious").read_text() == "kept"


@pytest.mark.parametrize("force", [False, True])
def test_what_appears_while_a_folder_is_written_is_not_replaced(tmp_path: Path, force: bool) -> None:
    out = tmp_path / "out"
    with (
        pytest.raises(UserError, match="holds files"),
        atomic_folder(out, replaceable="mark" if force else None) as new,
    ):
        (new / "mark").touch()
        out.mkdir()
        (out / "mine").write_text("precious")
    assert (out / "mine").read_text() == "precious"
    assert list(tmp_path.iterdir()) == [out]


def test_a_folder_that_was_about_to_be_replaced_comes_back(tmp_path: Path) -> None:
    """Its process was killed between two renames."""
    (tmp_path / ".out.123.old").mkdir()
    (tmp_path / ".out.123.old" / "mine").touch()
    with pytest.raises(UserError, match="holds files already"), atomic_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "out" / "mine").exists()


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with atomic_folder(tmp_path / "link") as folder:
        (folder / "new").touch()
    assert (tmp_path / "link").is_symlink()
    assert [path.name for path in (tmp_path / "real").iterdir()] == ["new"]


needs_mounts = pytest.mark.skipif(
    os.name == "nt" or subprocess.run(["sh", "-c", "unshare -m true 2>/dev/null"]).returncode != 0,
    reason="mounts need root",
)

_MOUNTS = {
    "tmpfs": "mount -t tmpfs none out",
    "bind": "mount --bind source out",
}


@needs_mounts
@pytest.mark.parametrize("place", ["tmpfs", "bind"])
def test_a_mount_point_is_written_into_and_replaced_with_force(tmp_path: Path, place: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "source").mkdir()
    code = """
from pathlib import Path
from tiny_lm.files import atomic_folder
out = Path("out")
for name in ("first", "second"):
    with atomic_folder(out, replaceable="mark" if name == "second" else None) as folder:
        (folder / "mark").touch()
        (folder / name).touch()
print(*sorted(path.name for path in out.iterdir()))
"""
    command = f'{_MOUNTS[place]} && exec "$0" -c "$1"'
    result = subprocess.run(
        ["unshare", "-m", "sh", "-c", command, sys.executable, code], capture_output=True, text=True, cwd=tmp_path
    )
    assert result.stdout == "mark second\n", result.stderr


@needs_mounts
@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_read_only_disk_is_one_line(tmp_path: Path, what: str) -> None:
    code = f"""
from pathlib import Path
from tiny_lm.errors import UserError
from tiny_lm.files import atomic_folder, atomic_path
try:
    with atomic_{"path" if what == "file" else "folder"}(Path("out/x")):
        pass
except UserError as error:
    print(error)
"""
    (tmp_path / "out").mkdir()
    command = 'mount -t tmpfs -o ro none out && exec "$0" -c "$1"'
    result = subprocess.run(
        ["unshare", "-m", "sh", "-c", command, sys.executable, code], capture_output=True, text=True, cwd=tmp_path
    )
    assert result.stdout == "out/x: could not be written (Read-only file system)\n", result.stderr


def test_a_pipe_is_written_and_stays_a_pipe(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with subprocess.Popen(["cat", str(pipe)], stdout=-1) as reader:
        with open_output(pipe) as file:
            file.write(b"through")
        assert reader.communicate()[0] == b"through"
    assert pipe.is_fifo()


def test_a_linked_file_stays_a_link_where_the_user_named_it(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("real")
    with open_output(tmp_path / "link") as file:
        file.write(b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"
    write_text(tmp_path / "link", "own")  # a name of ours: what it points to is not ours to change
    assert (tmp_path / "real").read_bytes() == b"new"


@pytest.mark.parametrize("output", ["-", "/dev/stdout"])
def test_stories_go_to_standard_output(output: str) -> None:
    words = ["data", "stories"]
    result = subprocess.run(
        [sys.executable, "-c", "from tiny_lm.cli import main; main()", *words, "--count", "2", "-o", output],
        capture_output=True,
        text=True,
    )
    assert result.stdout.count("<|endoftext|>") == 2, result.stderr
    assert f"{output}: 2 stories" in result.stderr


def test_a_name_of_the_longest_length_is_written(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 255)
    with atomic_path(path) as temporary:
        temporary.write_text("x")
    assert path.read_text() == "x"


def test_a_second_quickstart_in_one_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tiny_lm.cli.quickstart import quickstart

    monkeypatch.chdir(tmp_path)
    first = f"lock_folder(Path({str(tmp_path / 'tokenizers' / 'quickstart')!r}), 'in use', create=True)"
    with held(first), pytest.raises(UserError, match="another process is using this folder"):
        quickstart(None, 1.0, "strict", 0)
    assert [path.name for path in tmp_path.rglob("*")] == ["tokenizers", "quickstart"]


def test_metrics_are_not_appended_through_a_link(tmp_path: Path) -> None:
    from tiny_lm.tracking.jsonl_logger import JsonlLogger

    (tmp_path / "precious").write_text("kept")
    (tmp_path / "metrics.jsonl").symlink_to("precious")
    with pytest.raises(UserError, match=r"metrics.jsonl: could not be written"):
        JsonlLogger(tmp_path / "metrics.jsonl").log_metrics({"loss": 1.0}, 1)
    assert (tmp_path / "precious").read_text() == "kept"
