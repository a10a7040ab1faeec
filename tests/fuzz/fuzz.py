"""Read mutants of small real files with every reader: `make fuzz`.

    python tests/fuzz/fuzz.py --mutants 500                              # each reader, as CI does
    python tests/fuzz/fuzz.py --reader run-json --first 812 --mutants 1  # one mutant again

A reader may return a value or raise UserError. Anything else is a finding: another exception, a process that dies, a
mutant that takes too long, or memory that grows by over 1 GiB. Findings stand on standard output, and their
mutants under build/fuzz. Each reader runs in a process of its own, which is started again behind one that ended it.
"""

import argparse
import contextlib
import io
import json
import math
import os
import random
import resource
import runpy
import selectors
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mutations import mutate
from readers import Reader, files_of, replaced

ROOT = Path(__file__).parent.parent.parent
READERS_FILE = Path(__file__).parent / "readers.py"
GROWTH = 2**30
SEED = 17
START_SECONDS = 120


def load_readers(file: Path) -> dict[str, Reader]:
    """Return the readers of a Python file: readers.py, or what a test plants."""
    readers: dict[str, Reader] = runpy.run_path(str(file))["READERS"]
    return readers


# --- the process that reads ------------------------------------------------------------------------------------------


def make_mutant(reader: Reader, name: str, number: int, files: list[Path]) -> tuple[Path, bytes]:
    """Return the file that mutant ``number`` replaces, and its content."""
    rng = random.Random(f"{SEED} {name} {number}")
    file = rng.choice(files)
    kind = reader.kind
    return file, mutate(
        file.read_bytes(), rng, kind if kind != "json" or file.suffix in (".json", ".jsonl") else "binary"
    )


def work(reader: Reader, name: str, numbers: range, folder: Path) -> None:
    """Read mutants; write a line of JSON to standard output for the start of each and for each finding."""
    from tiny_lm.errors import UserError

    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

    def say(**values: Any) -> None:
        answers.write(json.dumps(values) + "\n")

    os.chdir(folder)
    files = files_of(reader, folder)
    read = reader.open(folder)
    for file in files[:: max(1, len(files) // 5)]:
        read(
            file
        )  # whole files are read without a complaint, and what is loaded once is loaded before memory is counted
    _limit_growth()
    for number in numbers:
        say(number=number)
        file, data = make_mutant(reader, name, number, files)
        with replaced(file, data):
            problem = None
            try:
                with contextlib.redirect_stderr(io.StringIO()):
                    read(file)
            except UserError as error:
                if "\n" in str(error).strip():
                    problem = f"an error of several lines: {str(error)[:200]!r}"
            except MemoryError:
                problem = "MemoryError: more than 1 GiB more"
            except Exception:
                problem = traceback.format_exc(limit=-4)
        if problem is not None:
            say(number=number, file=str(file.relative_to(folder)), problem=problem)
    say(done=True)


def _limit_growth() -> None:
    """Limit the address space to what is in use now and 1 GiB."""
    if Path("/proc/self/statm").exists():
        in_use = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (in_use + GROWTH, in_use + GROWTH))


# --- the process that watches ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Watch:
    """Where readers and seeds are, and where findings go."""

    readers: Path
    seeds: Path
    found: Path


def watch(name: str, numbers: range, places: Watch) -> list[str]:
    """Read the mutants ``numbers`` with one reader; return what was found, one text for each."""
    reader = load_readers(places.readers)[name]
    numbers = numbers[: math.ceil(len(numbers) * reader.share)]
    found: list[str] = []
    start, began = numbers.start, time.monotonic()
    while start < numbers.stop:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "seeds"
            shutil.copytree(places.seeds, folder)
            last = _watch_process(reader, name, range(start, numbers.stop), folder, places, found)
        start = numbers.stop if last is None else last + 1
    print(f"{name}: {len(numbers)} mutants, {len(found)} findings, {time.monotonic() - began:.0f} s", flush=True)
    return found


def _watch_process(
    reader: Reader, name: str, numbers: range, folder: Path, places: Watch, found: list[str]
) -> int | None:
    """Start one process and collect its findings; return the mutant that ended it, or None when all were read."""
    words = [sys.executable, __file__, "--work", str(folder), "--readers", str(places.readers), "--reader", name]
    words += ["--first", str(numbers.start), "--mutants", str(len(numbers))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(words, stdout=subprocess.PIPE, stderr=errors, env=environment) as process,
        selectors.DefaultSelector() as selector,
    ):
        assert process.stdout
        os.set_blocking(process.stdout.fileno(), False)
        selector.register(process.stdout, selectors.EVENT_READ)
        current, rest = numbers.start - 1, b""
        while True:
            if not selector.select(START_SECONDS if current < numbers.start else reader.seconds):
                process.kill()
                ending = f"no end within {reader.seconds:.0f} s"
                break
            data = process.stdout.read()
            if not data:
                status = process.wait()
                errors.seek(0)
                ending = f"the process ended with {status}: {errors.read()[-600:].decode('utf-8', 'replace')}"
                break
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                answer = json.loads(line)
                if answer.get("done"):
                    return None
                current = answer["number"]
                if "problem" in answer:
                    found.append(_keep(reader, name, current, places, answer["problem"]))
    if current < numbers.start:
        found.append(f"{name}: did not start or read the whole files: {ending}")
        return numbers.stop
    found.append(_keep(reader, name, current, places, ending))
    return current


def _keep(reader: Reader, name: str, number: int, places: Watch, problem: str) -> str:
    """Write a mutant and what is wrong with it where findings go; return the text about it."""
    with contextlib.suppress(OSError):
        file, data = make_mutant(reader, name, number, files_of(reader, places.seeds))
        folder = places.found / name / str(number)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / file.name).write_bytes(data)
        (folder / "problem.txt").write_text(problem, encoding="utf-8")
        return f"{name} {number} ({file.relative_to(places.seeds)}): {problem}"
    return f"{name} {number}: {problem}"


def main() -> int:
    """Fuzz the readers that the command line names, two at a time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reader", action="append", help="only this one; several times: these")
    parser.add_argument("--first", type=int, default=0, help="number of the first mutant")
    parser.add_argument("--mutants", type=int, default=10_000, help="mutants of each reader")
    parser.add_argument("--seeds", type=Path, help="keep the seeds in this folder, or take them from it")
    parser.add_argument("--readers", type=Path, default=READERS_FILE, help="Python file that has READERS")
    parser.add_argument("--found", type=Path, default=ROOT / "build" / "fuzz", help="folder for findings")
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1), help="readers at a time")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    numbers = range(options.first, options.first + options.mutants)
    readers = load_readers(options.readers)
    if options.work:
        [name] = options.reader
        work(readers[name], name, numbers, options.work)
        return 0
    shutil.rmtree(options.found, ignore_errors=True)
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(options.jobs) as pool:
        seeds = options.seeds or Path(scratch) / "seeds"
        if not seeds.is_dir():
            from seeds import write_seeds

            seeds.mkdir(parents=True)
            write_seeds(seeds)
        places = Watch(options.readers, seeds, options.found)
        names = sorted(options.reader or readers, key=lambda name: -readers[name].seconds)  # the slow ones first
        found = [text for texts in pool.map(lambda name: watch(name, numbers, places), names) for text in texts]
    for text in found:
        print("-" * 100, text, sep="\n")
    print(f"{len(found)} findings" + (f"; their mutants are under {options.found}" if found else ""))
    return 1 if found else 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
