"""The README.md of an export: what the model is, how it was trained, and how to use it."""

import json
from datetime import timedelta
from typing import Any

from tiny_lm import __version__
from tiny_lm.export.source import Source
from tiny_lm.model import num_parameters
from tiny_lm.model.huggingface import ARCHITECTURES

_FAMILIES = {"gpt2": "GPT-2", "llama3": "Llama 3", "smalllm": "SmallLM (Starcoder2)", "qwen3": "Qwen3"}


_TRANSFORMERS = """```python
from transformers import pipeline

generate = pipeline("text-generation", model="path/of/this/folder")
print(generate("Once upon a time", max_new_tokens=200)[0]["generated_text"])
```"""


def model_card(source: Source, *, library: str = "transformers", use: str = _TRANSFORMERS) -> str:
    """Return the model card in Markdown, with the front matter that the Hub reads.

    Args:
        source: what was exported.
        library: that loads the folder, as the Hub names it.
        use: how, in Markdown.
    """
    tags = ["tiny-lm", "text-generation", source.config.architecture]
    front = {"library_name": library, "pipeline_tag": "text-generation", "tags": tags}
    metadata = "\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items())
    rows = "\n".join(f"| {name} | {value} |" for name, value in figures(source).items())
    return f"""---
{metadata}
---

# {source.name}

A small language model, trained from scratch with tiny-lm {__version__}.

| | |
|---|---|
{rows}

## Use

{use}

Every text begins with the token `{_bos(source)}`, as in training: the tokenizer adds it. The model sees at most
{source.config.context_length:,} tokens. It knows what its training text taught it and nothing else: it is no assistant
and no source of facts.

`verification.json` holds the comparison of these files with the model that was trained.
"""


def _bos(source: Source) -> str:
    return next(token.text for token in source.tokenizer.specials if token.role == "bos")


def figures(source: Source) -> dict[str, str]:
    """Return what is known of the model and its run, by name; what is not known is left out."""
    config, record = source.config, source.record
    metrics: dict[str, Any] = record.get("metrics", {})
    heads = f"{config.n_heads} heads" + ("" if config.kv_heads == config.n_heads else f" ({config.kv_heads} for k, v)")
    shape = f"{config.n_layers} layers, width {config.d_model}, {heads}, feed-forward {config.ffn_size}"
    tokenizer = source.tokenizer
    rows: dict[str, Any] = {
        "family": f"{_FAMILIES[config.architecture]}, `{ARCHITECTURES[config.architecture]}`",
        "parameters": f"{num_parameters(config):,}",
        "shape": shape,
        "context": f"{config.context_length:,} tokens",
        "tokenizer": f"{tokenizer.kind}, {tokenizer.vocab_size:,} tokens",
        "step of the weights": f"{source.step:,}",
        "tokens seen in training": f"{record['tokens']:,}" if "tokens" in record else None,
        "training time": str(timedelta(seconds=round(record["seconds"]))) if "seconds" in record else None,
        "device": f"{record['device']}, {record['precision']}" if "device" in record else None,
        "best validation loss": _number(metrics, "best_val_loss"),
        "last validation loss": _number(metrics, "val_loss"),
        "last validation perplexity": _number(metrics, "val_ppl"),
        "last bits per byte": _number(metrics, "val_bpb"),
    }
    return {name: str(value) for name, value in rows.items() if value is not None}


def _number(metrics: dict[str, Any], key: str) -> str | None:
    return f"{metrics[key]:.4f}" if key in metrics else None
