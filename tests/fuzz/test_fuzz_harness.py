import subprocess
import sys
from pathlib import Path

import pytest
from planted import WHOLE

HERE = Path(__file__).parent

FOUND = {
    "crash": "KeyError: 'planted'",
    "death": "the process ended with 7",
    "hang": "no end within 2 s",
    "growth": "MemoryError: more than 1 GiB more",
    "lines": "an error of several lines: 'one\\ntwo'",
}


def fuzz(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Read two mutants of a small file with planted readers."""
    seeds = folder / "seeds"
    seeds.mkdir(exist_ok=True)
    (seeds / "a.txt").write_text(WHOLE, encoding="utf-8")
    places = ["--readers", str(HERE / "planted.py"), "--seeds", str(seeds), "--found", str(folder / "found")]
    command = [sys.executable, str(HERE / "fuzz.py"), *places, "--mutants", "2", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.skipif(sys.platform != "linux", reason="the limit on memory reads /proc")
def test_planted_faults_are_found(tmp_path: Path) -> None:
    result = fuzz(tmp_path)
    assert result.returncode == 1, result.stderr
    assert "10 findings" in result.stdout
    assert "sound: 2 mutants, 0 findings" in result.stdout
    for reader, problem in FOUND.items():
        for number in ("0", "1"):
            place = tmp_path / "found" / reader / number
            assert problem in (place / "problem.txt").read_text(encoding="utf-8")
            assert (place / "a.txt").read_bytes() != WHOLE.encode()  # the mutant is kept
    assert not (tmp_path / "found" / "sound").exists()
    assert (tmp_path / "seeds" / "a.txt").read_text(encoding="utf-8") == WHOLE


def test_a_sound_reader_passes_and_a_mutant_is_the_same_each_time(tmp_path: Path) -> None:
    assert fuzz(tmp_path, "--reader", "sound").returncode == 0
    mutants = []
    for _ in range(2):
        assert fuzz(tmp_path, "--reader", "lines", "--first", "5").returncode == 1
        mutants.append((tmp_path / "found" / "lines" / "6" / "a.txt").read_bytes())
    assert mutants[0] == mutants[1]
