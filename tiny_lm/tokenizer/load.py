"""Load any kind of tokenizer from its folder."""

from pathlib import Path
from typing import Any

from tiny_lm.config import nearest, shorten
from tiny_lm.errors import UserError
from tiny_lm.reading import read_json
from tiny_lm.tokenizer.base import FORMAT, Tokenizer
from tiny_lm.tokenizer.bpe import BPETokenizer
from tiny_lm.tokenizer.char import CharTokenizer
from tiny_lm.tokenizer.chat_template import read_chat_template
from tiny_lm.tokenizer.gpt2 import GPT2Tokenizer
from tiny_lm.tokenizer.sentencepiece import SentencePieceTokenizer

KINDS: dict[str, type[Tokenizer]] = {
    kind.kind: kind for kind in (BPETokenizer, SentencePieceTokenizer, CharTokenizer, GPT2Tokenizer)
}


def load_tokenizer(path: Path | str) -> Tokenizer:
    """Load a tokenizer from the folder that ``save`` wrote.

    Args:
        path: the folder, or any file in it; ``tokenizer.pkl`` need not exist, its folder is what counts.

    Raises:
        UserError: the tokenizer is missing, or its files are damaged or do not belong together.
    """
    folder = Path(path)
    if folder.is_file() or (not folder.is_dir() and (folder.parent / "metadata.json").is_file()):
        folder = folder.parent
    file = folder / "metadata.json"
    if not file.is_file():
        hint = ""
        if any(folder.glob("*.pkl")):
            hint = "; it holds a pickled one: `tiny-lm tokenizer import` turns that into a folder without pickles"
        elif (folder / "tokenizer.json").is_file():
            hint = (
                "; its tokenizer.json was saved by another program: `tiny-lm import` makes a run of a model's folder "
                "with config.json and model.safetensors, and the tokenizer is in the run's folder tokenizer/"
            )
        elif not folder.exists():
            raise UserError(f"{folder}: no such tokenizer folder; `tiny-lm tokenizer train` writes one")
        raise UserError(f"{folder}: has no tokenizer (metadata.json is missing){hint}")
    metadata = read_json(file)
    if not isinstance(metadata, dict) or "kind" not in metadata:
        raise UserError(f"{file}: does not describe a tokenizer")
    if metadata.get("format") != FORMAT:
        raise UserError(f"{file}: has format {shorten(metadata.get('format'))}, but this version reads {FORMAT}")
    kind = KINDS.get(metadata["kind"]) if isinstance(metadata["kind"], str) else None
    if kind is None:
        raise UserError(f"{file}: unknown kind {shorten(metadata['kind'])}{nearest(str(metadata['kind']), KINDS)}")
    try:
        tokenizer = kind.from_folder(folder, _special_texts(metadata))
    except UserError as error:
        raise UserError(str(error) if str(error).startswith(str(folder)) else f"{folder}: {error}") from None
    _check(tokenizer, metadata, folder)
    training = metadata.get("training")
    tokenizer.training = training if isinstance(training, dict) else {}
    tokenizer.chat_template = read_chat_template(folder)
    return tokenizer


def _special_texts(metadata: dict[str, Any]) -> dict[str, str]:
    specials = metadata.get("special_tokens")
    if not isinstance(specials, dict):
        raise UserError("metadata.json has no special_tokens")
    texts: dict[str, str] = {}
    for role, token in specials.items():
        text = token.get("text") if isinstance(token, dict) else None
        if not isinstance(text, str):
            raise UserError(f"metadata.json gives no text for the special token {role!r}")
        texts[role] = text
    return texts


def _check(tokenizer: Tokenizer, metadata: dict[str, Any], folder: Path) -> None:
    """Raise UserError unless the files of a folder belong together."""
    content = read_json(folder / "tokenizer.json")
    if not isinstance(content, dict) or content.get("added_tokens") != tokenizer.added_tokens():
        raise UserError(f"{folder / 'tokenizer.json'}: its added_tokens are not those of metadata.json")
    if metadata.get("hash") != tokenizer.hash:
        raise UserError(
            f"{folder}: the files were changed, or come from two tokenizers (the hash is {tokenizer.hash[:12]}, "
            f"metadata.json says {shorten(metadata.get('hash'))}); train or import the tokenizer again"
        )
