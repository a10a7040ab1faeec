"""Import a model in Hugging Face layout, or another run, as a run folder."""

import logging
from datetime import datetime, timezone
from pathlib import Path

import torch

from tiny_lm.environment import environment
from tiny_lm.errors import UserError
from tiny_lm.export.gguf_vocabulary import describe_missing_split
from tiny_lm.export.source import load_source
from tiny_lm.files import atomic_folder, atomic_path
from tiny_lm.model import num_parameters
from tiny_lm.model.checkpoint import CHECKPOINT_KEY
from tiny_lm.model.huggingface_folder import load_huggingface_model
from tiny_lm.runs import Run
from tiny_lm.tokenizer.huggingface_import import load_huggingface_tokenizer

logger = logging.getLogger(__name__)


def import_model(folder: Path, output_dir: Path) -> Run:
    """Write a run folder with a model, its config and tokenizer, at step 0 and without optimizer state.

    Args:
        folder: a Hugging Face folder of one of the four classes, or a run folder.
        output_dir: the run folder to write.

    Returns:
        the run, for ``tiny-lm generate``, all exports and ``load_checkpoint_model``.

    Raises:
        UserError: the model or its tokenizer is not supported, or the folder cannot be written.
    """
    if (folder / "run.json").is_file():
        source = load_source(folder)
        model, config, tokenizer = source.model, source.config, source.tokenizer
    else:
        model, config = load_huggingface_model(folder)
        tokenizer = load_huggingface_tokenizer(folder)
    missing_split = describe_missing_split(tokenizer)
    if missing_split:
        logger.warning("%s: %s: no export to GGUF or Ollama", folder, missing_split)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{folder}: its tokenizer has {tokenizer.vocab_size} tokens, but its model only {config.vocab_size}"
        )
    checkpoint = {
        "state_dict": {f"model.{name}": weight for name, weight in model.state_dict().items()},
        "global_step": 0,
        CHECKPOINT_KEY: {"model": config.to_dict(), "tokenizer_hash": tokenizer.hash},
    }
    with atomic_folder(output_dir) as temporary:
        run = Run(temporary)
        config.save(run.configs / "model.yaml")
        tokenizer.save(run.tokenizer)
        with atomic_path(run.last_checkpoint) as file:
            torch.save(checkpoint, file)
        run.update_metadata(
            status="imported",
            imported_from=str(folder),
            imported=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            environment=environment(),
            parameters=num_parameters(config),
        )
    return Run(output_dir)
