"""Models of transformers that stand beside ours, and weights that matter."""

import torch

from tiny_lm.model import ModelConfig
from tiny_lm.model.huggingface import to_huggingface_config


def reference_model(config: ModelConfig) -> torch.nn.Module:
    """Build the model of transformers that stands for ``config``, in evaluation mode, with its own random weights."""
    import transformers as hf

    content = to_huggingface_config(config, bos_id=None, eos_id=None, pad_id=None)
    kind = getattr(hf, content["architectures"][0])
    return kind(kind.config_class.from_dict(content)).eval()


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Give every parameter a value that matters: norms around 1, everything else well away from 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            centre = 1.0 if parameter.dim() == 1 and bool((parameter == 1).all()) else 0.0
            parameter.normal_(centre, 0.2, generator=generator)
