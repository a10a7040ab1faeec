"""What a benchmark ran on, for the first line that it prints."""

import time

import torch

from tiny_lm.environment import processor


def machine() -> str:
    """Return GPU or processor, version of torch, and day."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
    return f"{device}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"
