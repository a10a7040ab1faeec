"""Ollama's Modelfile: how to run a GGUF file, in Ollama's grammar.

A command is a word and a value. The value is the rest of the line, or is in triple quotes and may then have many
lines. There are no escapes: what the grammar would read differently is refused.
"""

from tiny_lm.errors import UserError
from tiny_lm.export.source import ExportSource

PARAMETERS: dict[str, float] = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "repeat_penalty": 1.1}
"""Sampling parameters."""

TEMPLATE = "{{ .Prompt }}"
"""The bare prompt, for a model without a chat template; with one, no TEMPLATE is set and Ollama uses the GGUF's.

Ollama prepends the beginning-of-story token, as the GGUF file says, and in a chat the earlier turns, which the model
then continues. Without TEMPLATE, versions of Ollama differ, down to inserting ChatML's markers, which a story model
has never seen. The template has no system message, so SYSTEM is not set.
"""


NO_LICENSE = "No license has been chosen for this model."


def modelfile(source: ExportSource, gguf_name: str, *, license_text: str = NO_LICENSE) -> str:
    """Return the Modelfile of a story model.

    Args:
        source: what was exported.
        gguf_name: name of the GGUF file in the same folder.
        license_text: of the model; ``ollama show --license`` shows it.

    Raises:
        UserError: a value cannot be written in the grammar.
    """
    context = source.config.context_length
    # `num_predict` stops a model that never ends a story; Ollama's default is ten contexts.
    numbers = {**PARAMETERS, "num_ctx": context, "num_predict": context}
    lines = [
        f"# {source.name}, step {source.step}: written by tiny-lm; verification.json says how it was checked.",
        f"FROM {quote(f'./{gguf_name}')}",
        *([f"TEMPLATE {quote(TEMPLATE)}"] if source.chat_template is None else []),
        *(f"PARAMETER {name} {value}" for name, value in numbers.items()),
        *(f"PARAMETER stop {quote(text)}" for text in stop_strings(source)),
        f"LICENSE {quote(_printable(license_text))}",
    ]
    return "\n".join(lines) + "\n"


def stop_strings(source: ExportSource) -> list[str]:
    """Return the stop strings: the texts of the tokens around a story."""
    ends = {source.tokenizer.bos_id, source.tokenizer.eos_id}
    # A token of several roles is listed once.
    return list(dict.fromkeys(token.text for token in source.tokenizer.specials if token.id in ends))


def quote(value: str) -> str:
    """Quote a value: bare if it is a single line, else in triple quotes.

    Raises:
        UserError: it contains triple quotes, or characters that Ollama drops.
    """
    if '"""' in value or value != _printable(value):
        raise UserError(f'a Modelfile cannot contain {value[:60]!r}: it has """ or characters that are not printed')
    bare = value != "" and value == value.strip() and "\n" not in value and not value.startswith('"')
    return value if bare else f'"""{value}"""'


def _printable(text: str) -> str:
    """Remove what Ollama drops from a value: all unprintable characters but line breaks and tabs."""
    return "".join(character for character in text if character.isprintable() or character in "\n\t")
