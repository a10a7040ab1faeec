"""A run's metrics compared with what its profile promises, other compressors, and published results."""

import bz2
import zlib
from dataclasses import dataclass
from typing import Any

from tiny_lm.config import find_config, read_yaml, shipped_configs
from tiny_lm.errors import UserError
from tiny_lm.evaluation.report.artifacts import SECTIONS, RunArtifacts
from tiny_lm.pages.text import number
from tiny_lm.profile import Profile

_IGNORED_KEYS = {"run_name", "resume_from_checkpoint", "train_path", "val_path"}
"""Keys that do not affect the result."""

_MIN_TEXT = 10_000  # bytes; below this, compressor ratios are meaningless

_PUBLISHED = {
    "roneneldan/TinyStories": [
        ("nanochat's recipe after 5 minutes on an RTX 3080", 0.4233, "on a cleaned version of the same stories"),
    ]
}
"""Published bits per byte by the data set's name on the Hub."""


@dataclass(frozen=True)
class Bar:
    """One bar of the comparison in bits per byte."""

    name: str
    value: float
    note: str = ""
    is_ours: bool = False


@dataclass(frozen=True)
class ProfileView:
    """A run's profile, and how the run differs from it."""

    name: str
    description: str
    expect: str
    overrides: list[tuple[str, str, str]]
    """Key, value in the profile, value in the run."""


def find_profile(artifacts: RunArtifacts) -> ProfileView | None:
    """Return the shipped profile with the configs of the run, if there is one."""
    names = artifacts.record.get("configs")
    for file in sorted((shipped_configs() / "profiles").glob("*.yaml")):
        profile = Profile.from_yaml(file)
        if [profile.model, profile.training, profile.data] == names:
            return ProfileView(file.stem, profile.description, profile.expect or "", _overrides(profile, artifacts))
    return None


def _overrides(profile: Profile, artifacts: RunArtifacts) -> list[tuple[str, str, str]]:
    """Return the keys whose values differ between the profile's configs and the run."""
    found = []
    for section, folder in zip(SECTIONS, ("models", "training", "data"), strict=True):
        try:
            shipped = read_yaml(find_config(folder, getattr(profile, section)))
        except UserError:
            continue
        ours = artifacts.configs[section]
        for key in sorted(shipped.keys() & ours.keys() - _IGNORED_KEYS):
            if shipped[key] != ours[key]:
                found.append((f"{section}.{key}", _value(shipped[key]), _value(ours[key])))
    return found


def _value(value: Any) -> str:
    return number(value, 4) if type(value) in (int, float) else str(value)


def compare_bits(artifacts: RunArtifacts) -> list[Bar]:
    """Return bits per byte of the model, of compressors on the same text, and of published models, the best last.

    Compressors start without any training, so they are a baseline, not rivals.
    """
    ours = artifacts.number("metrics", "val_bpb")
    if ours is None or artifacts.streams is None:
        return []
    bars = [Bar("This model", ours, "on the whole validation stream", is_ours=True)]
    text = artifacts.streams.text.encode()
    if len(text) >= _MIN_TEXT:
        note = f"on the first {len(text):,} bytes of it"
        packed = {"gzip": zlib.compress(text, 9), "bzip2": bz2.compress(text, 9)}
        bars += [Bar(name, 8 * len(data) / len(text), note) for name, data in packed.items()]
        bars.append(Bar("Uncompressed", 8.0))
    published = _PUBLISHED.get(artifacts.streams.validation.metadata.source.removeprefix("huggingface:"), [])
    bars += [Bar(name, value, note) for name, value, note in published]
    return sorted(bars, key=lambda bar: -bar.value)
