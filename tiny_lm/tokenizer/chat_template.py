"""The chat template that lies beside a tokenizer, in Jinja, where Hugging Face's folders keep it."""

from pathlib import Path

from tiny_lm.reading import read_json, read_text

FILE = "chat_template.jinja"
_MOST_BYTES = 2**20


def read_chat_template(folder: Path) -> str | None:
    """Return the template of a tokenizer's folder, or None where there is none.

    Raises:
        UserError: the file is damaged, or larger than 1 MiB.
    """
    file = folder / FILE
    if file.is_file():
        return read_text(file, limit=_MOST_BYTES)
    config = folder / "tokenizer_config.json"
    content = read_json(config) if config.is_file() else None
    text = content.get("chat_template") if isinstance(content, dict) else None
    return text if isinstance(text, str) else None
