"""A run's figures beside what was to be expected: its profile's word, other compressors, published results."""

import bz2
import zlib
from dataclasses import dataclass
from typing import Any

from tiny_lm.config import find_config, read_yaml, shipped_configs
from tiny_lm.errors import UserError
from tiny_lm.evaluation.report.material import SECTIONS, Material
from tiny_lm.pages.text import number
from tiny_lm.profile import Profile

_FREE = {"run_name", "resume_from_checkpoint", "train_path", "val_path"}
"""Keys that do not change what is learned."""

_SHORTEST_TEXT = 10_000  # bytes: a compressor has to get to know a text, too

_PUBLISHED = {
    "roneneldan/TinyStories": [
        ("nanochat's recipe after 5 minutes on an RTX 3080", 0.4233, "on a cleaned version of the same stories"),
    ]
}
"""Bits per byte that were published for a data set, by its name on the Hub."""


@dataclass(frozen=True)
class Bar:
    """One line of a comparison in bits per byte."""

    name: str
    value: float
    note: str = ""
    is_ours: bool = False


@dataclass(frozen=True)
class ProfileView:
    """The profile of a run, and where the run departed from it."""

    name: str
    description: str
    expect: str
    departures: list[tuple[str, str, str]]
    """Key, value of the profile, value of the run."""


def find_profile(material: Material) -> ProfileView | None:
    """Return the shipped profile of the configs that the run was made of, if there is one."""
    names = material.record.get("configs")
    for file in sorted((shipped_configs() / "profiles").glob("*.yaml")):
        profile = Profile.from_yaml(file)
        if [profile.model, profile.training, profile.data] == names:
            return ProfileView(file.stem, profile.description, profile.expect or "", _departures(profile, material))
    return None


def _departures(profile: Profile, material: Material) -> list[tuple[str, str, str]]:
    """Return the keys that the profile's configs set and the run has otherwise."""
    found = []
    for section, folder in zip(SECTIONS, ("models", "training", "data"), strict=True):
        try:
            shipped = read_yaml(find_config(folder, getattr(profile, section)))
        except UserError:
            continue
        ours = material.configs[section]
        for key in sorted(shipped.keys() & ours.keys() - _FREE):
            if shipped[key] != ours[key]:
                found.append((f"{section}.{key}", _value(shipped[key]), _value(ours[key])))
    return found


def _value(value: Any) -> str:
    return number(value, 4) if type(value) in (int, float) else str(value)


def compare_bits(material: Material) -> list[Bar]:
    """Return bits per byte of the model, of compressors on the same text, and of published models of the same data set.

    The best is last. A compressor starts from nothing and so knows less than a trained model; it is what a text of
    this length yields to without any learning beforehand.
    """
    ours = material.number("metrics", "val_bpb")
    if ours is None or material.streams is None:
        return []
    bars = [Bar("This model", ours, "on the whole validation stream", is_ours=True)]
    text = material.streams.text.encode()
    if len(text) >= _SHORTEST_TEXT:
        note = f"on the first {len(text):,} bytes of it"
        packed = {"gzip": zlib.compress(text, 9), "bzip2": bz2.compress(text, 9)}
        bars += [Bar(name, 8 * len(data) / len(text), note) for name, data in packed.items()]
        bars.append(Bar("The bare text", 8.0, "a byte as it is stored"))
    published = _PUBLISHED.get(material.streams.validation.metadata.source.removeprefix("huggingface:"), [])
    bars += [Bar(name, value, note) for name, value, note in published]
    return sorted(bars, key=lambda bar: -bar.value)
