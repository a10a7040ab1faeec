"""The environment of a run, for ``run.json``: command, versions, processor and git state."""

import os
import platform
import subprocess
import sys
from contextlib import suppress
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any


def environment() -> dict[str, Any]:
    """Return what results depend on besides configs and data: command, machine, versions and git state."""
    packages = ["tiny-lm", "torch", "pytorch-lightning", "numpy", "tiktoken", "rustbpe", "sentencepiece"]
    return {
        "command": sys.argv,
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "platform": platform.platform(),
        "processor": processor(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
        "git": _git_state(),
    }


def processor() -> str:
    """Return name and cores of the processor; on Linux also family and model, since clouds name several alike."""
    name = platform.processor() or platform.machine()
    with suppress(OSError):  # not Linux
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0].splitlines()
        facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        if "model name" in facts:
            kind = (("family", "cpu family"), ("model", "model"))
            name = ", ".join([facts["model name"], *(f"{label} {facts[key]}" for label, key in kind if key in facts)])
    return f"{name}, {os.cpu_count()} cores"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_state() -> dict[str, Any] | None:
    """Return commit and number of changed files of the checkout that the package runs from; None if installed."""
    here = Path(__file__).parent
    try:
        if Path(_git("rev-parse", "--show-toplevel", cwd=here)) != here.parent.resolve():
            return None  # installed inside another project
        commit = _git("rev-parse", "HEAD", cwd=here)
        changed = _git("status", "--porcelain", "--untracked-files=no", cwd=here)
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "changed_files": len(changed.splitlines())}


def _git(*arguments: str, cwd: Path) -> str:
    result = subprocess.run(["git", *arguments], cwd=cwd, capture_output=True, text=True, timeout=10, check=True)
    return result.stdout.strip()
