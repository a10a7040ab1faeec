"""Write the pinned requirements, each with its hashes: `make lock`.

One resolution for every platform and Python 3.10 and newer is divided by who needs a package, so that what `make`
installs for one purpose is one file: `requirements.lock` is for `tiny-lm` itself, `requirements/dev.lock` for tests,
and so on. torch has a file of its own, since it comes as several builds; its libraries for NVIDIA's GPUs are installed
only where its build asks for them.
"""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent
PARTS = {
    "requirements.lock": [],
    "requirements/build.lock": ["--group", "build"],
    "requirements/dev.lock": ["--group", "dev"],
    "requirements/docs.lock": ["--group", "docs"],
    "requirements/browser.lock": ["--group", "browser"],
    "requirements/llamacpp.lock": ["--extra", "llamacpp"],
    "requirements/llama-server.lock": ["--group", "llama-server"],
    "requirements/torchserve.lock": ["--group", "torchserve"],
}
TRANSFORMERS_4 = ["transformers==4.57.6", "tokenizers==0.22.2", "huggingface-hub==0.36.0"]
"""What `make test-transformers4` lays over the environment, in requirements/transformers4.lock."""

TORCH = "requirements/torch.lock"
CUDA = "requirements/cuda.lock"
CUDA_PACKAGES = re.compile(r"(?:nvidia|cuda)-[\w-]+|triton")

TORCH_CPU_HASHES = {"6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b"}
"""Builds for processors only, which the package index lacks: 2.13.0+cpu for CPython 3.11 on x86-64 Linux."""


def resolve(
    options: list[str], *, source: str = "pyproject.toml", constraint: Path | None = None, hashes: bool = False
) -> dict[str, str]:
    """Return the pins of a resolution by the name of their package: one text for all pins of one package."""
    words = ["uv", "pip", "compile", source, "--quiet", "--universal", "--python-version", "3.10", *options]
    words += ["--no-header", "--no-annotate", "--no-emit-index-url", "--no-emit-find-links", "--color", "never"]
    words += ["--generate-hashes"] if hashes else []
    words += ["--constraint", str(constraint)] if constraint else []
    text = subprocess.run(words, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    pins: dict[str, str] = {}
    for pin in re.split(r"\n(?=\S)", text.strip()):
        name = pin.partition("==")[0]
        pins[name] = pins.get(name, "") + pin + "\n"
    return pins


def main() -> None:
    """Resolve all parts together, then write each package into the first part that needs it."""
    pins = resolve([option for options in PARTS.values() for option in options], hashes=True)
    everything = ROOT / "requirements" / "all.txt"
    everything.write_text("".join(pins.values()), encoding="utf-8")
    written = {"torch", "pip", *filter(CUDA_PACKAGES.fullmatch, pins)}
    for file, options in PARTS.items():
        names = sorted(resolve(options, constraint=everything).keys() - written)
        written |= set(names)
        (ROOT / file).write_text("".join(pins[name] for name in names), encoding="utf-8")
    everything.write_text("\n".join(TRANSFORMERS_4), encoding="utf-8")
    overlay = resolve(["--no-deps"], source=str(everything), hashes=True)
    (ROOT / "requirements" / "transformers4.lock").write_text("".join(overlay.values()), encoding="utf-8")
    everything.unlink()
    torch = pins["torch"].rstrip("\n") + "".join(f" \\\n    --hash=sha256:{digest}" for digest in TORCH_CPU_HASHES)
    (ROOT / TORCH).write_text(torch + "\n", encoding="utf-8")
    (ROOT / CUDA).write_text("".join(pins[name] for name in filter(CUDA_PACKAGES.fullmatch, pins)), encoding="utf-8")


if __name__ == "__main__":
    main()
