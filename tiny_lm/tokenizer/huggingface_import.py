"""Import a byte-level BPE tokenizer from another model's ``tokenizer.json``."""

import re
from pathlib import Path
from typing import Any

from tiny_lm.config import shorten
from tiny_lm.errors import UserError
from tiny_lm.reading import read_json
from tiny_lm.tokenizer.base import Tokenizer, vocabulary
from tiny_lm.tokenizer.bpe import (
    GPT2_PATTERN,
    SMOLLM_PATTERN,
    SPLIT_PATTERNS,
    BPETokenizer,
    byte_level,
    from_byte_level,
)
from tiny_lm.tokenizer.chat_template import read_chat_template
from tiny_lm.tokenizer.config import GPT2_SPECIALS, STANDARD_SPECIALS
from tiny_lm.tokenizer.gpt2 import GPT2Tokenizer
from tiny_lm.tokenizer.load import load_tokenizer


def load_huggingface_tokenizer(folder: Path) -> Tokenizer:
    """Load the tokenizer of a Hugging Face folder: of any kind if we exported it, else byte-level BPE.

    Args:
        folder: has ``tokenizer.json`` and ``tokenizer_config.json``.

    Raises:
        UserError: it is missing, or would not yield the same ids in tiny-lm.
    """
    if (folder / "metadata.json").is_file():
        return load_tokenizer(folder)
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise UserError(f"{folder}: has no tokenizer.json; save the tokenizer with a recent transformers")
    content = read_json(file)
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict) or model.get("type") != "BPE" or model.get("byte_fallback"):
        raise UserError(f"{file}: not a byte-level BPE, the only kind that can be imported")
    if content.get("normalizer"):
        raise UserError(f"{file}: normalizes text, which tiny-lm does not support")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise UserError(f"{file}: sets {key} ({shorten(model[key])}), which tiny-lm does not support")
    pattern = _pattern(content.get("pre_tokenizer"), file)
    added = _added(content, file)
    tokens = [token for token in vocabulary(model, str(file)) if token not in added]
    if sorted(added.values()) != list(range(len(tokens), len(tokens) + len(added))):
        raise UserError(f"{file}: its special tokens must follow the other tokens")
    try:
        base = [from_byte_level(token) for token in tokens]
    except KeyError as error:
        raise UserError(f"{file}: not a byte-level BPE (a token has the character {error})") from None
    specials = _roles(folder, content, sorted(added, key=lambda text: added[text]))
    try:
        tokenizer = _build(base, specials, pattern)
        ours = [(byte_level(left), byte_level(right)) for left, right in tokenizer.merges]
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    if ours != _merges(model, file):
        raise UserError(f"{file}: its merges are not in the order of its tokens, so tiny-lm would yield other ids")
    tokenizer.chat_template = read_chat_template(folder)
    return tokenizer


def _build(base: list[bytes], specials: dict[str, str], pattern: str) -> BPETokenizer:
    is_gpt2 = pattern == GPT2_PATTERN and {role: specials.get(role) for role in GPT2_SPECIALS} == GPT2_SPECIALS
    return GPT2Tokenizer(base, specials) if is_gpt2 else BPETokenizer(base, specials, pattern=pattern)


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
        case [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, **rest},
        ] if rest.get("use_regex", True):
            return SMOLLM_PATTERN
    raise UserError(
        f"{file}: unsupported split ({shorten(pre_tokenizer)}); supported are those of {', '.join(SPLIT_PATTERNS)}"
    )


def _adds(content: dict[str, Any], token: str | None) -> bool:
    """Return whether a ``tokenizer.json`` prepends ``token`` to texts by itself."""
    processor = content.get("post_processor")
    steps = processor.get("processors", [processor]) if isinstance(processor, dict) else []
    for step in steps if isinstance(steps, list) else []:
        match step:
            case {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": first}}, *_]} if first == token:
                return True
    return False


def _added(content: dict[str, Any], file: Path) -> dict[str, int]:
    added = content.get("added_tokens", [])
    result: dict[str, int] = {}
    for token in added if isinstance(added, list) else [None]:
        match token:
            case {"content": str(text), "id": int(token_id)} if text not in result:
                result[text] = token_id
            case _:
                raise UserError(f"{file}: its added_tokens are not a list of different tokens ({shorten(token)})")
    return result


def _merges(model: dict[str, Any], file: Path) -> list[tuple[str, str]]:
    merges = model.get("merges", [])
    result = []
    for pair in merges if isinstance(merges, list) else [merges]:
        match pair.split(" ", 1) if isinstance(pair, str) else pair:
            case [str(left), str(right)]:
                result.append((left, right))
            case _:
                raise UserError(f"{file}: its merges are not a list of pairs of tokens ({shorten(pair)})")
    return result


def _roles(folder: Path, content: dict[str, Any], texts: list[str]) -> dict[str, str]:
    """Assign roles to the special tokens: those of ``tokenizer_config.json``, else one derived from the text.

    Documents begin with bos, so that role requires a token that the tokenizer adds by itself or that also ends
    documents, as in GPT-2. Without one, documents begin with nothing.
    """
    file = folder / "tokenizer_config.json"
    config = read_json(file) if file.is_file() else {}
    config = config if isinstance(config, dict) else {}
    roles: dict[str, str] = {}
    for role in STANDARD_SPECIALS:
        token = config.get(f"{role}_token")
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str) and text in texts:
            roles[role] = text
    if "eos" not in roles:
        raise UserError(f"{file}: names no eos_token among the added tokens")
    bos = roles.get("bos")
    if bos not in (None, roles["eos"]) and not (config.get("add_bos_token") is True or _adds(content, bos)):
        del roles["bos"]
    for text in texts:
        if text not in roles.values():
            word = re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")
            roles[f"token_{word}"[:64] if f"token_{word}"[:64] not in roles else f"token_{len(roles)}"] = text
    # Ids follow the order of the roles, so the order of the file decides.
    return dict(sorted(roles.items(), key=lambda item: texts.index(item[1])))
