"""Every package that `pip install tiny-lm` brings may be used beside MIT-licensed code."""

import re
from importlib.metadata import Distribution, PackageNotFoundError, distribution

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ALLOWED = {
    "0BSD", "Apache-2.0", "Apache-2.0 WITH LLVM-exception", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0",
    "CNRI-Python", "HPND",
    "ISC",
    "LicenseRef-BSD", "MIT", "MIT-0", "MIT-CMU", "MPL-2.0", "PSF-2.0", "Python-2.0", "Unlicense", "Zlib",
}  # fmt: skip

WORDS = {
    "Apache Software License": "Apache-2.0", "Apache 2.0": "Apache-2.0", "Apache License 2.0": "Apache-2.0",
    "Apache License, Version 2.0": "Apache-2.0", "Apache": "Apache-2.0", "BSD License": "LicenseRef-BSD",
    "BSD": "LicenseRef-BSD", "3-Clause BSD License": "BSD-3-Clause", "MIT License": "MIT", "ISC License (ISCL)": "ISC",
    "Apache 2.0 License": "Apache-2.0", "BSD-3": "BSD-3-Clause", "PSF": "PSF-2.0",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0", "Python Software Foundation License": "PSF-2.0",
    "The Unlicense (Unlicense)": "Unlicense", "Historical Permission Notice and Disclaimer (HPND)": "HPND",
}  # fmt: skip
"""What packages write that name no expression of SPDX."""

NAMED = {"tiktoken": "MIT"}
"""Licences of packages whose metadata hold the whole text of the licence instead of its name, read by hand."""

GPU_LIBRARIES = re.compile(r"(?:nvidia|cuda)-.+|triton")
"""Come with torch's builds for NVIDIA's GPUs under NVIDIA's own terms; the build for processors is without them."""


def _runtime_packages(name: str, extras: frozenset[str] = frozenset()) -> dict[str, Distribution]:
    found: dict[str, Distribution] = {}
    waiting = [(name, extras)]
    seen = set()
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in seen or GPU_LIBRARIES.fullmatch(name):
            continue
        seen.add((name, extras))
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:
            continue  # not for this platform, or an extra that is not installed
        for text in found[name].requires or []:
            requirement = Requirement(text)
            chosen = extras or {""}
            if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in chosen):
                waiting.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    return found


def license_of(package: Distribution) -> str:
    """Return the licence expression of a package, as its metadata state it in one of three ways."""
    metadata = package.metadata
    name = canonicalize_name(metadata["Name"])
    classifiers = [
        value.rpartition(" :: ")[2] for value in metadata.get_all("Classifier", []) if value.startswith("License ::")
    ]
    stated = metadata.get("License-Expression") or NAMED.get(name) or " AND ".join(
        dict.fromkeys(WORDS.get(value, value) for value in classifiers if value != "OSI Approved")
    )  # fmt: skip
    text = stated or " ".join((metadata.get("License") or "").split())
    return WORDS.get(text, text)


def is_allowed(expression: str) -> bool:
    """Return whether an expression of SPDX, without brackets inside brackets, can be met by allowed licences alone."""
    flat = re.sub(
        r"\(([^()]*)\)", lambda group: group[1].split(" OR ")[0] if is_allowed(group[1]) else "no", expression
    )
    return any(all(part.strip() in ALLOWED for part in choice.split(" AND ")) for choice in flat.split(" OR "))


def test_all_that_tiny_lm_needs_may_be_used() -> None:
    packages = _runtime_packages("tiny-lm")
    assert {"torch", "numpy", "pyyaml", "sympy", "datasets"} <= packages.keys()
    refused = {name: license_of(package) for name, package in packages.items() if not is_allowed(license_of(package))}
    assert not refused


@pytest.mark.parametrize(
    "expression", ["GPL-3.0-only", "MIT AND AGPL-3.0-only", "", "LicenseRef-Proprietary", "MIT AND"]
)
def test_other_licenses_are_refused(expression: str) -> None:
    assert not is_allowed(expression)


@pytest.mark.parametrize("expression", ["MIT", "Apache-2.0 OR GPL-3.0-only", "MPL-2.0 AND MIT", "(MIT OR X) AND ISC"])
def test_licenses_that_are_allowed(expression: str) -> None:
    assert is_allowed(expression)
