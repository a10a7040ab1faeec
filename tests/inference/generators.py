"""Generators of every family with random weights, small enough for a moment, and of strong opinions."""

from typing import Any

import torch

from tiny_lm.inference import GenerationConfig, SamplingParams, TextGenerator
from tiny_lm.model import build_model, model_config_from_dict
from tiny_lm.tokenizer import Tokenizer

FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_heads": 2, "d_ff": 64},
    "smalllm": {"n_heads": 2, "d_ff": 64},
    "llama3": {"n_heads": 4, "n_kv_heads": 2},
    "qwen3": {"n_heads": 4, "n_kv_heads": 2},
}
GREEDY = SamplingParams(temperature=0)


def make(tokenizer: Tokenizer, family: str = "gpt2", **values: Any) -> TextGenerator:
    size = {"vocab_size": tokenizer.vocab_size, "context_length": 64, "d_model": 32, "n_layers": 2}
    config = model_config_from_dict({"architecture": family, **size, **FAMILIES[family], **values}, source="test")
    torch.manual_seed(0)
    model = build_model(config)
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            parameter.data *= 5  # a fresh model repeats one token; this one has opinions
    return TextGenerator(model, tokenizer)


def suppressed_tokens(generator: TextGenerator) -> torch.Tensor:
    """The mask of tokens that are no text, eos among them."""
    return generator._suppress_mask.clone()


def generated_ids(generator: TextGenerator, prompt: str, count: int) -> list[int]:
    """The ids of the prompt and of ``count`` tokens after it, the likeliest ones but for eos."""
    [generated] = generator.generate_batch(
        [prompt], GenerationConfig(max_new_tokens=count, min_new_tokens=count, temperature=0)
    )
    return generator.tokenizer.encode(prompt, bos=True) + generated.ids
