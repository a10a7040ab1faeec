"""Whether torch.compile works on this machine."""

import importlib.util
import os
import shutil

import torch
from torch import Tensor


def missing_compiler(device: str) -> str | None:
    """Return what torch.compile is missing on a device, if anything; torch reports it only at the first call."""
    if device == "cuda" and importlib.util.find_spec("triton") is None:
        return "torch.compile needs Triton, which is not installed"
    if device == "cpu" and not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++")):
        return "torch.compile needs a C++ compiler (g++ or clang++), which is not on the PATH"
    try:
        torch.compile(_probe, dynamic=False)(torch.ones(8, device=device))
    except Exception as error:  # whatever is wrong, eager mode works
        return f"torch.compile does not work here ({' '.join(str(error).split())[:200]})"
    return None


def _probe(x: Tensor) -> Tensor:
    return x.exp() + 1
