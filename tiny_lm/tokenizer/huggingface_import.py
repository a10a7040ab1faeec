"""A byte-level BPE tokenizer out of the ``tokenizer.json`` of a model that others made."""

import re
from pathlib import Path
from typing import Any

from tiny_lm.config import shorten
from tiny_lm.errors import UserError
from tiny_lm.files import read_json
from tiny_lm.tokenizer.base import Tokenizer, vocabulary
from tiny_lm.tokenizer.bpe import GPT2_PATTERN, BPETokenizer, byte_level, from_byte_level
from tiny_lm.tokenizer.chat_template import read_chat_template
from tiny_lm.tokenizer.config import GPT2_SPECIALS, STANDARD_SPECIALS
from tiny_lm.tokenizer.gpt2 import GPT2Tokenizer
from tiny_lm.tokenizer.load import load_tokenizer


def load_huggingface_tokenizer(folder: Path) -> Tokenizer:
    """Load the tokenizer of a Hugging Face folder: of any kind where we exported it, else byte-level BPE.

    Args:
        folder: holds ``tokenizer.json`` and ``tokenizer_config.json``.

    Raises:
        UserError: there is none, or it would not yield the same ids in tiny-lm.
    """
    if (folder / "metadata.json").is_file():
        return load_tokenizer(folder)
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise UserError(f"{folder}: holds no tokenizer.json; save the tokenizer again with a recent transformers")
    content = read_json(file)
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict) or model.get("type") != "BPE" or model.get("byte_fallback"):
        raise UserError(f"{file}: is no byte-level BPE, the one kind that is imported from others")
    if content.get("normalizer"):
        raise UserError(f"{file}: normalizes text before it is split, which no tokenizer of tiny-lm does")
    pattern = _pattern(content.get("pre_tokenizer"), file)
    added = _added(content, file)
    tokens = [token for token in vocabulary(model, str(file)) if token not in added]
    if sorted(added.values()) != list(range(len(tokens), len(tokens) + len(added))):
        raise UserError(f"{file}: its special tokens do not follow the others, as they do in tiny-lm")
    try:
        base = [from_byte_level(token) for token in tokens]
    except KeyError as error:
        raise UserError(f"{file}: is no byte-level BPE (a token has the character {error})") from None
    specials = _roles(folder, sorted(added, key=lambda text: added[text]))
    is_gpt2 = pattern == GPT2_PATTERN and {role: specials.get(role) for role in GPT2_SPECIALS} == GPT2_SPECIALS
    tokenizer = GPT2Tokenizer(base, specials) if is_gpt2 else BPETokenizer(base, specials, pattern=pattern)
    ours = [(byte_level(left), byte_level(right)) for left, right in tokenizer.merges]
    theirs = [tuple(pair.split(" ", 1) if isinstance(pair, str) else pair) for pair in model.get("merges", [])]
    if ours != theirs:
        raise UserError(f"{file}: its merges are not in the order of its tokens, so tiny-lm would yield other ids")
    tokenizer.chat_template = read_chat_template(folder)
    return tokenizer


def _pattern(pre_tokenizer: Any, file: Path) -> str:
    """Return the regular expression that splits text."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer]) if isinstance(pre_tokenizer, dict) else []
    match steps:
        case [{"type": "ByteLevel", "add_prefix_space": False, **rest}] if rest.get("use_regex", True):
            return GPT2_PATTERN
        case [
            {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated"},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ] if pattern in BPETokenizer.patterns:
            return pattern
    raise UserError(f"{file}: splits text in a way that tiny-lm does not ({shorten(pre_tokenizer)})")


def _added(content: dict[str, Any], file: Path) -> dict[str, int]:
    added = content.get("added_tokens", [])
    if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
        raise UserError(f"{file}: its added_tokens are no list of tokens")
    return {str(token.get("content")): int(token.get("id", -1)) for token in added}


def _roles(folder: Path, texts: list[str]) -> dict[str, str]:
    """Give each special token a role: those of ``tokenizer_config.json``, else one made of its text."""
    file = folder / "tokenizer_config.json"
    config = read_json(file) if file.is_file() else {}
    roles: dict[str, str] = {}
    for role in STANDARD_SPECIALS:
        token = config.get(f"{role}_token") if isinstance(config, dict) else None
        text = token.get("content") if isinstance(token, dict) else token
        if text in texts and not (role in ("pad", "unk") and text in roles.values()):
            roles[role] = str(text)
    if "eos" not in roles:
        raise UserError(f"{file}: names no eos_token among the added tokens")
    roles.setdefault("bos", roles["eos"])
    for text in texts:
        if text not in roles.values():
            word = re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")
            roles[f"token_{word}"[:64] if f"token_{word}"[:64] not in roles else f"token_{len(roles)}"] = text
    # Ids follow the order of the roles, so the order of the file decides.
    return dict(sorted(roles.items(), key=lambda item: texts.index(item[1])))
