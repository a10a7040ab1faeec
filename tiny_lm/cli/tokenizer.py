"""The commands ``tiny-lm tokenizer train``, ``inspect`` and ``import``."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tiny_lm.cli.data import check_errors, load_corpus_configs, survey
from tiny_lm.cli.options import DryRun, ReplaceErrors, Settings, print_configs
from tiny_lm.console import print_result

if TYPE_CHECKING:
    from tiny_lm.dataset import DatasetConfig, Errors
    from tiny_lm.tokenizer import Tokenizer, TokenizerConfig

tokenizer_app = typer.Typer(help="Train, inspect or import a tokenizer.", rich_markup_mode=None, no_args_is_help=True)


@tokenizer_app.command("train")
def train(
    config: Annotated[str, typer.Option(help="Tokenizer config: a YAML file or the name of a shipped one.")],
    seed: Annotated[
        int, typer.Option(min=0, help="As for `tiny-lm tokenize`: selects the documents held out for validation.")
    ] = 0,
    errors: ReplaceErrors = "strict",
    settings: Settings = None,
    dry_run: DryRun = False,
) -> None:
    """Train a tokenizer on the corpus named in its config."""
    tokenizer_config, dataset_config = load_corpus_configs(config, settings)
    if dry_run:
        print_configs([("tokenizer", tokenizer_config), ("dataset", dataset_config)])
        return
    chosen = check_errors(errors)
    split_within = survey(tokenizer_config, dataset_config, seed=seed, errors=chosen)
    tokenizer = train_and_save(tokenizer_config, dataset_config, seed=seed, errors=chosen, split_within=split_within)
    print(f"{tokenizer_config.output_dir}: {tokenizer.vocab_size:,} tokens")


def train_and_save(
    tokenizer_config: "TokenizerConfig",
    dataset_config: "DatasetConfig",
    *,
    seed: int = 0,
    errors: "Errors" = "strict",
    split_within: bool = False,
) -> "Tokenizer":
    """Train a tokenizer on the training split and write its folder."""
    from tiny_lm.cli.progress import track
    from tiny_lm.dataset import estimate_bytes, iter_documents
    from tiny_lm.locks import lock_folder
    from tiny_lm.tokenizer import train_tokenizer

    output_dir = Path(tokenizer_config.output_dir)
    val_split = tokenizer_config.val_split
    documents = iter_documents(
        dataset_config, "train", val_split=val_split, seed=seed, errors=errors, split_within=split_within
    )
    total_bytes = estimate_bytes(dataset_config, "train", val_split=val_split)
    documents = track(documents, "tokenizer", total_bytes=total_bytes)
    with lock_folder(output_dir, "another process is using this tokenizer; wait for its end", create=True):
        tokenizer = train_tokenizer(tokenizer_config, documents)
        tokenizer.save(output_dir)
    return tokenizer


@tokenizer_app.command()
def inspect(
    tokenizer: Annotated[Path, typer.Argument(metavar="FOLDER", help="Tokenizer folder, or any file in it.")],
    text: Annotated[str, typer.Option(help="Text to tokenize.")] = "Once upon a time, there was a little bear.",
) -> None:
    """Show a tokenizer's properties and how it splits a text."""
    from tiny_lm.tokenizer import load_tokenizer

    loaded = load_tokenizer(tokenizer)
    ids = loaded.encode(text)
    print_result(f"kind            {loaded.kind}")
    print_result(f"tokens          {loaded.vocab_size:,}")
    for token in loaded.specials:
        print_result(f"{token.role:<15} {token.id} {token.text}")
    print_result(f"hash            {loaded.hash}")
    print_result(f"bytes per token {len(text.encode()) / max(len(ids), 1):.2f} on this text:")
    for token_id in ids:
        print_result(f"{token_id:>8} {loaded.token_text(token_id)!r}")


@tokenizer_app.command("import")
def import_(
    pickle_file: Annotated[
        Path, typer.Argument(metavar="PICKLE", help="An old tokenizer.pkl with a tiktoken encoding.")
    ],
    output_dir: Annotated[Path, typer.Option(help="Tokenizer folder to write.")],
    config: Annotated[
        str | None,
        typer.Option(help="Tokenizer config that names the special tokens; default: <pad>, <eos>, <bos>, <unk>."),
    ] = None,
) -> None:
    """Import an old pickled tokenizer without unpickling code: only tiktoken's data is accepted."""
    from tiny_lm.export.gguf_vocabulary import describe_missing_split
    from tiny_lm.locks import lock_folder
    from tiny_lm.tokenizer import TokenizerConfig, import_pickled_tokenizer
    from tiny_lm.tokenizer.config import STANDARD_SPECIALS

    specials = TokenizerConfig.from_yaml(config).special_tokens if config else STANDARD_SPECIALS
    imported = import_pickled_tokenizer(pickle_file, specials)
    with lock_folder(output_dir, "another process is using this tokenizer; wait for its end", create=True):
        imported.save(output_dir)
    missing_split = describe_missing_split(imported)
    if missing_split:
        print(f"{pickle_file}: {missing_split}: no export to GGUF or Ollama", file=sys.stderr)
    print(f"{output_dir}: {imported.vocab_size:,} tokens")
