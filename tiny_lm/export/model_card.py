"""The README.md of an export: what the model is, how it was trained, and how to use it."""

import json
from datetime import timedelta
from typing import Any

from tiny_lm import __version__
from tiny_lm.export.source import ExportSource
from tiny_lm.model import num_parameters
from tiny_lm.model.huggingface import ARCHITECTURES
from tiny_lm.runs import number_in

CARD_FILE = "README.md"

_FAMILIES = {"gpt2": "GPT-2", "llama3": "Llama 3", "smalllm": "SmallLM (Starcoder2)", "qwen3": "Qwen3"}

_SCORES = {
    "val_loss": "validation loss",
    "val_ppl": "validation perplexity",
    "val_bpb": "validation bits per byte",
}


_TRANSFORMERS = """```python
from transformers import pipeline

generate = pipeline("text-generation", model="path/of/this/folder")
print(generate("Once upon a time", max_new_tokens=200)[0]["generated_text"])
```"""


def model_card(
    source: ExportSource,
    *,
    library: str = "transformers",
    use: str = _TRANSFORMERS,
    location: str = "path/of/this/folder",
    license_name: str | None = None,
) -> str:
    """Return the model card in Markdown, with the front matter that the Hub reads.

    Args:
        source: what is exported.
        library: the library that loads the folder, as the Hub names it.
        use: usage in Markdown.
        location: replaces ``path/of/this/folder`` in ``use``.
        license_name: license identifier of the weights, as the Hub uses it.
    """
    front = {
        "library_name": library,
        "pipeline_tag": "text-generation",
        "tags": ["tiny-lm", "text-generation", source.config.architecture],
        "license": license_name,
        "model-index": _model_index(source),
    }
    metadata = "\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items() if value)
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

{use.replace("path/of/this/folder", location)}

{_beginning(source)} The context length is
{source.config.context_length:,} tokens. The model knows only what its training text taught it: it is not an assistant
and not a source of facts.

`verification.json` has the comparison of these files with the trained model.
"""


def _beginning(source: ExportSource) -> str:
    bos = next((token.text for token in source.tokenizer.specials if token.role == "bos"), None)
    if bos is None:
        return "Texts begin without a special token, as in training."
    return f"Every text begins with the token `{bos}`, as in training: the tokenizer adds it."


def figures(source: ExportSource) -> dict[str, str]:
    """Return the known facts about the model and its run, by name; unknown ones are omitted."""
    config, record = source.config, source.record
    heads = f"{config.n_heads} heads" + ("" if config.kv_heads == config.n_heads else f" ({config.kv_heads} for k, v)")
    shape = f"{config.n_layers} layers, width {config.d_model}, {heads}, feed-forward {config.ffn_size}"
    tokenizer = source.tokenizer
    tokens, seconds = number_in(record, "tokens"), number_in(record, "seconds")
    device, precision = record.get("device"), record.get("precision")
    rows: dict[str, Any] = {
        "family": f"{_FAMILIES[config.architecture]}, `{ARCHITECTURES[config.architecture]}`",
        "parameters": f"{num_parameters(config):,}",
        "shape": shape,
        "context": f"{config.context_length:,} tokens",
        "tokenizer": f"{tokenizer.kind}, {tokenizer.vocab_size:,} tokens",
        "step of the weights": f"{source.step:,}",
        "tokens seen in training": None if tokens is None else f"{tokens:,.0f}",
        "training time": str(timedelta(seconds=round(seconds))) if seconds is not None and 0 <= seconds < 1e9 else None,
        "device": f"{device}, {precision}" if isinstance(device, str) and isinstance(precision, str) else None,
        **{name: f"{source.scores[key]:.4f}" for key, name in _SCORES.items() if key in source.scores},
    }
    return {name: str(value) for name, value in rows.items() if value is not None}


def _model_index(source: ExportSource) -> list[dict[str, Any]]:
    """Return the scores in the Hub's ``model-index`` form; empty without scores."""
    metrics = [
        {"type": name.rpartition("validation ")[2], "name": name, "value": source.scores[key]}
        for key, name in _SCORES.items()
        if key in source.scores
    ]
    text = {"type": "text", "name": "validation split of the run"}
    result = {"task": {"type": "text-generation"}, "dataset": text, "metrics": metrics}
    return [{"name": source.name, "results": [result]}] if metrics else []
