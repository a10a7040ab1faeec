"""The commands that help to choose: profiles, params, estimate, find-batch-size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def tiny_lm(*words: str, code: int = 0) -> str:
    command = [sys.executable, "-c", "from tiny_lm.cli import main; main()", *words]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "100"})
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


@pytest.mark.deep
def test_profiles_without_and_with_a_measurement() -> None:
    plain = json.loads(tiny_lm("profiles", "--no-time", "--json"))
    names = {row["name"] for row in plain}
    assert {"speed", "enhanced", "baseline", "quality", "turbo", "turbo-llama", "turbo-qwen"} <= names
    speed = next(row for row in plain if row["name"] == "speed")
    assert (speed["parameters"], speed["tokens"], speed["seconds"]) == (6_791_424, 16_384_000, None)
    table = tiny_lm("profiles")
    assert all(name in table for name in names)
    assert table.count("about ") >= len(names)


def test_estimate_adds_up_and_says_what_would_help() -> None:
    table = tiny_lm("estimate", "speed")
    assert "optimizer" in table
    assert "at the peak" in table
    assert "--set training.gradient_checkpointing=true" in table
    assert "name a profile" in tiny_lm("estimate", code=2)


@pytest.mark.deep
def test_find_batch_size_keeps_the_step_and_tells_a_size_that_does_not_fit() -> None:
    small = ["--model-config", "quickstart", "--set", "model.n_layers=1", "--set", "data.block_size=64"]
    step = ["--set", "data.batch_size=6"]
    told = tiny_lm("find-batch-size", *small, *step, "--seconds", "8")
    assert "6 sequences in a step, as before" in told
    documented = subprocess.run(
        [sys.executable, ROOT / "scripts" / "training" / "find_batch_size.py", *small, "--max", "2"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert "use: --set data.batch_size=" in documented.stdout, documented.stderr
    assert "does not fit into 0.1 GB" in tiny_lm("find-batch-size", "baseline", "--memory", "0.1", code=2)
    assert "name a profile" in tiny_lm("find-batch-size", code=2)
