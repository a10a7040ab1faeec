"""Export to Hugging Face layout, for transformers, vLLM and text-generation-inference."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tiny_lm.errors import UserError
from tiny_lm.export.agreement import Reference, check_settings
from tiny_lm.export.model_card import CARD_FILE, model_card
from tiny_lm.export.source import ExportSource
from tiny_lm.export.verify import (
    REPORT_FILE,
    Check,
    OwnEngine,
    check_greedy,
    check_perplexity,
    check_tokens,
    perplexity,
    raise_on_failure,
    suppressed_tokens,
    write_report,
)
from tiny_lm.files import atomic_folder, check_free, write_json, write_text
from tiny_lm.model import ModelConfig, num_parameters
from tiny_lm.model.huggingface import Dtype, from_huggingface_config, to_huggingface_config
from tiny_lm.model.huggingface_folder import WEIGHTS_FILE
from tiny_lm.model.huggingface_weights import to_huggingface_state
from tiny_lm.reading import read_json
from tiny_lm.tokenizer import Tokenizer
from tiny_lm.tokenizer.sentencepiece import SentencePieceTokenizer

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def export_huggingface(
    source: ExportSource, folder: Path, *, dtype: Dtype = "float32", force: bool = False
) -> list[Check]:
    """Write the model and its tokenizer, load them with transformers, and compare.

    The folder appears only once every check has passed.

    Args:
        source: what to export.
        folder: output folder.
        dtype: dtype of the weights; they are compared with ours rounded alike.
        force: replace an earlier export.

    Returns:
        the checks, all passed.

    Raises:
        UserError: the folder is not empty, the disk is full, transformers is not installed, or a check failed.
    """
    from tiny_lm.export.transformers_engine import TransformersEngine, import_transformers

    check_free(folder, replaceable=REPORT_FILE if force else None)
    import_transformers()
    check_space(folder, num_parameters(source.config) * DTYPES[dtype].itemsize)
    rounded = source.with_weights_as(DTYPES[dtype])
    check_finite(rounded, dtype)
    with atomic_folder(folder, replaceable=REPORT_FILE if force else None) as temporary:
        write_huggingface(source, temporary, dtype=dtype)
        own, engine, reference = OwnEngine(rounded), TransformersEngine(temporary), Reference(rounded)
        checks = [_check_config(source.config, temporary / "config.json")]
        checks += check_tokens(rounded, own, engine)
        checks += reference.check(engine)
        checks.append(check_greedy(rounded, own, engine, reference.difference_limit))
        if dtype != "float32":
            checks.append(check_perplexity(source, perplexity(source, OwnEngine(source)), engine, limit=None))
        write_report(temporary, source, "huggingface", {WEIGHTS_FILE: {"engine": engine.name, "checks": checks}})
        raise_on_failure(str(folder), checks)
    return checks


def _check_config(config: ModelConfig, file: Path) -> Check:
    """Read ``config.json`` back as an import does, and compare all settings that matter."""
    found = from_huggingface_config(read_json(file), source=str(file))
    return check_settings(_settings(config), _settings(found))


def _settings(config: ModelConfig) -> dict[str, Any]:
    names = ["architecture", "vocab_size", "context_length", "d_model", "n_layers", "n_heads", "kv_heads", "head_size"]
    names += ["ffn_size", "norm", "norm_eps", "position", "tie_word_embeddings"]
    names += ["rope_theta"] if config.position == "rope" else []
    return {name: getattr(config, name) for name in names}


def check_dtype(name: str) -> Dtype:
    """Return ``name`` as a dtype; raise UserError if it is not supported."""
    if name not in DTYPES:
        raise UserError(f"--dtype {name}: unknown; choose from: {', '.join(DTYPES)}")
    chosen: Dtype = name  # type: ignore[assignment]  # just checked
    return chosen


def check_space(folder: Path, size: int) -> None:
    """Raise UserError unless the disk has space for ``size`` bytes of weights plus 16 MiB."""
    parent = next(parent for parent in folder.resolve().parents if parent.is_dir())
    free = shutil.disk_usage(parent).free
    needed = size + 2**24
    if free < needed:
        raise UserError(f"{folder}: needs {needed / 1e6:,.0f} MB, but the disk has only {free / 1e6:,.0f} MB free")


def check_finite(rounded: ExportSource, dtype: str) -> None:
    """Raise UserError if a weight overflowed in its new dtype."""
    for name, weight in rounded.model.state_dict().items():
        if not bool(torch.isfinite(weight).all()):
            raise UserError(f"{name} has weights outside the range of {dtype}; export float32 or bfloat16")


def write_huggingface(source: ExportSource, folder: Path, *, dtype: Dtype = "float32") -> None:
    """Write all files of the export into an existing, empty folder.

    Raises:
        UserError: the disk is full.
    """
    write_settings(source, folder, dtype=dtype)
    _write_weights(source, folder / WEIGHTS_FILE, DTYPES[dtype])
    write_text(folder / CARD_FILE, model_card(source))


def write_settings(source: ExportSource, folder: Path, *, dtype: Dtype = "float32") -> None:
    """Write config, tokenizer and generation config: all files but weights and model card.

    Raises:
        UserError: the disk is full.
    """
    tokenizer = source.tokenizer
    ids = {"bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id}
    write_json(folder / "config.json", to_huggingface_config(source.config, **ids, dtype=dtype))
    tokenizer.save(folder)  # includes what load_tokenizer needs, and the chat template
    write_json(folder / "tokenizer.json", {**tokenizer.to_json(), "post_processor": begin_with_bos(tokenizer)})
    write_json(folder / "tokenizer_config.json", _tokenizer_config(source))
    write_json(folder / "special_tokens_map.json", _special_tokens_map(tokenizer))
    write_json(folder / "generation_config.json", _generation_config(source))


def _write_weights(source: ExportSource, file: Path, dtype: torch.dtype) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    state = to_huggingface_state(source.config, source.model.state_dict())
    try:
        save_file({name: tensor.to(dtype) for name, tensor in state.items()}, file, metadata={"format": "pt"})
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: could not be written ({error})") from error


def begin_with_bos(tokenizer: Tokenizer) -> dict[str, Any] | None:
    """Return the post-processor of ``tokenizer.json`` that prepends bos as in training; None without bos."""
    if tokenizer.bos_id is None:
        return None
    text = next(token.text for token in tokenizer.specials if token.role == "bos")

    def template(*texts: str) -> list[dict[str, Any]]:
        parts: list[dict[str, Any]] = []
        for kind, name in enumerate(texts):
            parts.append({"SpecialToken": {"id": text, "type_id": kind}})
            parts.append({"Sequence": {"id": name, "type_id": kind}})
        return parts

    return {
        "type": "TemplateProcessing",
        "single": template("A"),
        "pair": template("A", "B"),
        "special_tokens": {text: {"id": text, "ids": [tokenizer.bos_id], "tokens": [text]}},
    }


def _special_tokens_map(tokenizer: Tokenizer) -> dict[str, str]:
    texts = {token.role: token.text for token in tokenizer.specials if token.control}
    texts.setdefault("pad", texts["eos"])  # padding a batch needs one
    return {f"{role}_token": text for role, text in texts.items()}


def _tokenizer_config(source: ExportSource) -> dict[str, Any]:
    return {
        # Other classes use their own split and would yield other ids, in transformers 5 as in 4.
        "tokenizer_class": "PreTrainedTokenizerFast",
        **_special_tokens_map(source.tokenizer),
        "add_bos_token": source.tokenizer.bos_id is not None,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": source.config.context_length,
        # transformers.js reads it only from here.
        **({} if source.chat_template is None else {"chat_template": source.chat_template}),
        **(_for_converters(source.tokenizer) if isinstance(source.tokenizer, SentencePieceTokenizer) else {}),
    }


def _for_converters(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return what llama.cpp's converter needs besides ``tokenizer.model``, which lacks the special tokens."""
    tokens = {str(token["id"]): token for token in tokenizer.added_tokens()}
    without_id = {i: {key: value for key, value in token.items() if key != "id"} for i, token in tokens.items()}
    return {"add_prefix_space": False, "added_tokens_decoder": without_id}


def _generation_config(source: ExportSource) -> dict[str, Any]:
    tokenizer = source.tokenizer
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.eos_id if tokenizer.pad_id is None else tokenizer.pad_id,
        "do_sample": True,
        "temperature": 0.8,
        "top_k": 40,
        "top_p": 0.95,
        # Tokens that occur in no text; our own generator never produces them either.
        **({"suppress_tokens": suppressed_tokens(source)} if suppressed_tokens(source) else {}),
    }
