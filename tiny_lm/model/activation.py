"""Activation functions."""

from torch import nn


class GELU(nn.GELU):
    """GELU in its tanh form, as GPT-2 has it (Hendrycks and Gimpel 2016, arXiv:1606.08415)."""

    def __init__(self) -> None:
        super().__init__(approximate="tanh")
