"""The four model families."""

import torch

from tiny_lm.model.architectures.gpt2 import GPT2, GPT2Block
from tiny_lm.model.architectures.llama3 import Llama3, Llama3Block
from tiny_lm.model.architectures.qwen3 import Qwen3
from tiny_lm.model.architectures.smalllm import SmallLM
from tiny_lm.model.config import GPT2Config, Llama3Config, ModelConfig, Qwen3Config, SmallLMConfig
from tiny_lm.model.transformer import Transformer

__all__ = ["GPT2", "GPT2Block", "Llama3", "Llama3Block", "Qwen3", "SmallLM", "build_model"]


def build_model(config: ModelConfig, *, device: torch.device | str | None = None) -> Transformer:
    """Build the model of a config, with random initial weights.

    Args:
        config: the config of any family.
        device: device of its parameters; ``"meta"`` gives shapes without memory. None: torch's default device.
    """
    with torch.device(device or torch.get_default_device()):
        match config:
            case GPT2Config():
                return GPT2(config)
            case Llama3Config():
                return Llama3(config)
            case SmallLMConfig():
                return SmallLM(config)
            case Qwen3Config():
                return Qwen3(config)
