"""Initial weights from another run or a Hugging Face folder (``init_from``)."""

from pathlib import Path
from typing import Any

from tiny_lm.errors import UserError
from tiny_lm.model import ModelConfig, Transformer
from tiny_lm.model.checkpoint import load_checkpoint_model
from tiny_lm.model.huggingface_folder import load_huggingface_model
from tiny_lm.runs import Run, is_checkpoint, is_huggingface_folder, open_run, run_folder_of
from tiny_lm.tokenizer import Tokenizer, check_same_tokenizer
from tiny_lm.tokenizer.chat_template import read_chat_template
from tiny_lm.tokenizer.huggingface_import import load_huggingface_tokenizer

_PARTS = ("architecture", "vocab_size", "d_model", "n_layers", "n_heads", "kv_heads", "head_size", "ffn_size")
_DETAILS = ("tie_word_embeddings", "qkv_bias", "ffn_bias", "rope_theta", "norm_eps")


def load_initial_weights(path: Path, model: Transformer, tokenizer: Tokenizer) -> dict[str, Any]:
    """Load the weights of another model into the model to be trained.

    Args:
        path: a run folder (its best checkpoint), a ``.ckpt`` file, or a Hugging Face folder.
        model: receives the weights.
        tokenizer: of the token streams; receives the chat template unless it has one.

    Returns:
        the entry for ``run.json``: ``path``, and the ``step`` of a checkpoint.

    Raises:
        UserError: it does not exist or is damaged, or model or tokenizer do not match.
    """
    origin: dict[str, Any] = {"path": str(path)}
    if is_huggingface_folder(path):
        found, _ = load_huggingface_model(path)
        theirs = load_huggingface_tokenizer(path)
        tokenizer_hash, template = theirs.hash, theirs.chat_template
    else:
        run = Run(run_folder_of(path)) if is_checkpoint(path) else _open(path)
        loaded = load_checkpoint_model(path if is_checkpoint(path) else run.model_checkpoint())
        found, tokenizer_hash = loaded.model, loaded.tokenizer_hash
        template = read_chat_template(run.tokenizer)
        origin["step"] = loaded.step
    _check_model(path, found.config, model.config)
    check_same_tokenizer(
        tokenizer_hash,
        tokenizer.hash,
        f"init_from {path}",
        "the token streams",
        "encode the text with its own: tiny-lm tokenize --tokenizer",
    )
    model.load_state_dict(found.state_dict())
    if tokenizer.chat_template is None:
        tokenizer.chat_template = template
    return origin


def _open(path: Path) -> Run:
    if not path.exists():
        raise UserError(f"init_from {path}: no such run folder, checkpoint or Hugging Face folder")
    if path.is_dir() and not Run(path).metadata_file.is_file():
        raise UserError(f"init_from {path}: is neither a run folder nor a model in Hugging Face's layout")
    return open_run(path)


def _check_model(path: Path, found: ModelConfig, config: ModelConfig) -> None:
    """Check that both models compute the same function; dropout and the context length of RoPE may differ."""
    learned = ("context_length",) if config.position == "learned" else ()
    for name in (*_PARTS, *learned, *_DETAILS):
        theirs, ours = getattr(found, name), getattr(config, name)
        if theirs != ours:
            raise UserError(f"init_from {path}: has {name} {theirs}, but the model config has {ours}; they must match")
