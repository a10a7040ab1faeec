"""The Jinja chat template in a tokenizer's folder, as Hugging Face stores it."""

from pathlib import Path

from tiny_lm.reading import read_json, read_text

FILE = "chat_template.jinja"
_MAX_BYTES = 2**20


def read_chat_template(folder: Path) -> str | None:
    """Return the template of a tokenizer's folder, or None.

    Raises:
        UserError: the file is damaged, or larger than 1 MiB.
    """
    file = folder / FILE
    if file.is_file():
        return read_text(file, limit=_MAX_BYTES)
    config = folder / "tokenizer_config.json"
    content = read_json(config) if config.is_file() else None
    text = content.get("chat_template") if isinstance(content, dict) else None
    return text if isinstance(text, str) else None
