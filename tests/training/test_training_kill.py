"""A run that is killed, at any moment, and gone on with is the run that was never killed."""

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import model, training

from tiny_lm.data import BinDataConfig
from tiny_lm.model.checkpoint import read_checkpoint
from tiny_lm.runs import Run, read_metrics

pytestmark = pytest.mark.deep

STEPS, ACCUMULATION = 12, 2
VARIANTS: dict[str, dict[str, Any]] = {
    "muon": {"optimizer": "muon", "ema_decay": 0.9, "scheduler": "wsd"},
    "adamw": {"optimizer": "adamw", "weight_decay_schedule": "linear"},
}
# Where the random points lie: how many of them, and what is about to happen there.
PLACES: list[tuple[int, Callable[[str], bool]]] = [
    (3, lambda what: what == "optimizer step"),
    (1, lambda what: what == "micro-batch 1"),
    (2, lambda what: what == "micro-batch 2"),  # the first one's gradients are lost
    (2, lambda what: what.startswith("validation ") and what != "validation 1"),  # in the middle of it
    (1, lambda what: what == "open .step-#.ckpt.#.tmp"),
    (2, lambda what: what in ("rename to step-#.ckpt", "rename to best.ckpt")),  # torn: two thirds of the file
    (1, lambda what: what in ("link .last.ckpt.#.tmp", "link .best.ckpt.#.tmp")),
    (2, lambda what: what == "rename to last.ckpt"),
    (1, lambda what: what == "remove step-#.ckpt"),
    (2, lambda what: what == "open metrics.jsonl"),  # torn: half a line
    (1, lambda what: what == "story" or what.endswith("samples.md")),
    (2, lambda what: what.endswith(("run.json", "model.yaml", "loss.png"))),
]
VOLATILE = {"timestamp", "tokens_per_sec", "mfu", "val_seconds"}


class Workplace:
    """A folder in which runs are killed, and the runs that were not."""

    def __init__(self, folder: Path, data: BinDataConfig) -> None:
        self._folder = folder
        for variant, values in VARIANTS.items():
            place = folder / variant
            place.mkdir()
            model("qwen3").save(place / "model.yaml")
            data.save(place / "data.yaml")
            config = training(
                max_steps=STEPS,
                accumulate_grad_batches=ACCUMULATION,
                run_name="r",
                log_every_n_steps=2,
                val_every_n_steps=3,
                val_max_tokens=256,
                save_every_n_steps=4,
                keep_checkpoints=2,
                sample_tokens=3,
                spike_threshold=50.0,
                **values,
            )
            config.save(place / "training.yaml")

    def run(self, jobs: Sequence[tuple[str, list[int | float | None]]]) -> list["Job"]:
        """Run jobs, each a variant and where its processes are killed, in folders of their own."""
        made = []
        for variant, kills in jobs:
            folder = self._folder / f"job-{len(list(self._folder.glob('job-*.json')))}-{len(made)}"
            shutil.copytree(self._folder / variant, folder)
            made.append(Job(variant, kills, folder))
        listing = self._folder / f"job-{len(list(self._folder.glob('job-*.json')))}.json"
        listing.write_text(json.dumps([{"folder": str(job.folder), "kills": job.kills} for job in made]))
        script = Path(__file__).with_name("killing.py")
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, str(script), str(listing)], capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, done.stderr
        return made


class Job:
    """What became of one run and its processes."""

    def __init__(self, variant: str, kills: list[int | float | None], folder: Path) -> None:
        self.variant = variant
        self.kills = kills
        self.folder = folder
        self.run = Run(folder / "runs" / "r")

    def _lines(self, kind: str) -> list[list[str]]:
        files = [self.folder.with_name(f"{self.folder.name}-{kind}-{n}.txt") for n in range(len(self.codes))]
        return [file.read_text().splitlines() for file in files]

    @property
    def codes(self) -> list[int]:
        """How each process ended."""
        codes: list[int] = json.loads(self.folder.with_name(f"{self.folder.name}-codes.json").read_text())
        return codes

    @property
    def points(self) -> list[list[str]]:
        """What happened in each process."""
        return self._lines("points")

    @property
    def batches(self) -> list[list[str]]:
        """Check sums of the micro-batches that each process trained on."""
        return self._lines("batches")

    @property
    def told(self) -> str:
        """What the processes said."""
        return "\n".join(line for lines in self._lines("log") for line in lines)

    def curve(self) -> list[dict[str, Any]]:
        """The events of ``metrics.jsonl``, without what no two runs have in common: times, and the machine's load."""
        return [
            {
                key: value
                for key, value in event.items()
                if key not in VOLATILE and not key.startswith(("process_", "gpu_"))
            }
            for event in read_metrics(self.run.metrics)
        ]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, stream_folder: Path) -> Workplace:
    data = BinDataConfig(
        train_path=str(stream_folder / "train.bin"),
        val_path=str(stream_folder / "val.bin"),
        block_size=32,
        batch_size=4,
    )
    return Workplace(tmp_path_factory.mktemp("kill"), data)


@pytest.fixture(scope="module")
def unbroken(workplace: Workplace) -> dict[str, Job]:
    """A run of each variant that was not killed."""
    jobs = workplace.run([(variant, [None]) for variant in VARIANTS])
    assert [job.codes for job in jobs] == [[0], [0]], [job.told for job in jobs]
    return {job.variant: job for job in jobs}


def assert_equal(one: Any, other: Any, where: str) -> None:
    """Compare nested values bit for bit."""
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_equal(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for number, pair in enumerate(zip(one, other, strict=True)):
            assert_equal(*pair, f"{where}.{number}")
    else:
        assert one == other, where


def state(path: Path) -> dict[str, Any]:
    """All that a checkpoint holds, but for the clock."""
    checkpoint = read_checkpoint(path, whole=True)
    monitor = checkpoint["callbacks"]["TokensMonitor"]
    del monitor["seconds"], checkpoint["callbacks"]["Validation"]["latest"]["val_seconds"]
    for key in VOLATILE & monitor["latest"].keys():
        del monitor["latest"][key]
    return checkpoint


def check(job: Job, whole: Job) -> None:
    """Compare a run that was killed with one that was not."""
    note = f"{job.variant} {job.kills} in {job.folder}\n{job.told}"
    assert job.codes[-1] == 0, note
    assert job.curve() == whole.curve(), note
    names = [sorted(path.name for path in each.run.checkpoints.iterdir()) for each in (job, whole)]
    assert names[0] == names[1], note
    for name in names[0]:
        assert_equal(state(job.run.checkpoints / name), state(whole.run.checkpoints / name), f"{name} of {note}")
    assert job.run.samples.read_text() == whole.run.samples.read_text(), note
    assert job.run.read_metadata()["status"] == "finished", note
    assert (job.run.plots / "loss.png").is_file(), note
    assert list(job.run.folder.rglob(".*.tmp")) == [], note
    # Each process trained on the batches that were to come, from the beginning of a step on.
    (order,), begun = whole.batches, 0
    for batches in filter(None, job.batches):
        first = order.index(batches[0])
        assert first % ACCUMULATION == 0, note
        assert first <= begun, note
        assert batches == order[first : first + len(batches)], note
        begun = first + len(batches)
    assert begun == len(order) == STEPS * ACCUMULATION, note


def test_a_run_without_a_kill_passes_through_all_the_places(unbroken: dict[str, Job]) -> None:
    """Else the points below would not lie where they should."""
    for job in unbroken.values():
        (points,) = job.points
        for _, lies_there in PLACES:
            assert [what for what in points if lies_there(what)], sorted(set(points))
        assert len(set(unbroken["muon"].batches[0])) == STEPS * ACCUMULATION


def test_twenty_random_points(workplace: Workplace, unbroken: dict[str, Job]) -> None:
    """Killed there, and gone on with; every third one is killed once more, wherever it is then."""
    rng = random.Random(20)
    places = [lies_there for count, lies_there in PLACES for _ in range(count)]
    assert len(places) == 20
    jobs = []
    for number, lies_there in enumerate(places):
        variant = list(VARIANTS)[number % 2]
        (points,) = unbroken[variant].points
        point = rng.choice([place for place, what in enumerate(points) if lies_there(what)])
        again = [rng.randrange(len(points) // 2)] if number % 3 == 0 else []
        jobs.append((variant, [point, *again, None]))
    kinds = set()
    for job in workplace.run(jobs):
        check(job, unbroken[job.variant])
        assert job.codes[0] == -9
        kinds.add(job.points[0][-1])
        assert "warning" not in job.told
    assert len(kinds) >= 10


def test_killed_from_outside_at_random_times(workplace: Workplace, unbroken: dict[str, Job]) -> None:
    """Three times in a row, wherever it happens to be; short enough to fall mostly into the run."""
    rng = random.Random(4)
    kills = [[rng.uniform(0.05, 0.8) for _ in range(3)] for _ in range(4)]
    for job in workplace.run([(list(VARIANTS)[n % 2], [*times, None]) for n, times in enumerate(kills)]):
        check(job, unbroken[job.variant])
