"""Commands for text: download it, write the built-in stories, tokenize it."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, get_args

import typer

from tiny_lm.cli.options import DryRun, ReplaceErrors, Settings, print_configs
from tiny_lm.config import nearest, parse_overrides
from tiny_lm.console import print_message, shell_command
from tiny_lm.errors import UserError

if TYPE_CHECKING:
    from tiny_lm.data import StreamMetadata
    from tiny_lm.dataset import DatasetConfig
    from tiny_lm.tokenizer import Tokenizer, TokenizerConfig

data_app = typer.Typer(
    help="Download a dataset, or write the built-in one.", rich_markup_mode=None, no_args_is_help=True
)


@data_app.command()
def download(
    config: Annotated[
        str, typer.Option(help="Dataset config: a YAML file or the name of a shipped one.")
    ] = "tinystories",
    settings: Settings = None,
    dry_run: DryRun = False,
) -> None:
    """Download or cache a raw dataset and count its documents."""
    from tiny_lm import dataset

    overrides = parse_overrides(settings or [], ["dataset"])
    dataset_config = dataset.DatasetConfig.from_yaml(config, overrides["dataset"])
    if dry_run:
        print_configs([("dataset", dataset_config)])
        return
    notes = dataset.ReadingNotes()
    counts = dataset.download(dataset_config, notes=notes)
    if notes.files:
        print_message(f"{dataset.describe(dataset_config)}: {notes.describe()}")
    for split, count in counts.items():
        print(f"{dataset.describe(dataset_config)}  {split}: {count:,} documents")


@data_app.command()
def stories(
    output: Annotated[Path, typer.Option("--output", "-o", help="Text file to write; -: standard output.")] = Path(
        "stories.txt"
    ),
    count: Annotated[int, typer.Option(min=1, max=10**9, help="Number of stories.")] = 20_000,
    seed: Annotated[int, typer.Option(min=0, help="Another seed gives other stories.")] = 0,
    split: Annotated[str, typer.Option(metavar="train|validation", help="No story is in both.")] = "train",
) -> None:
    """Write the built-in children's stories to a text file, separated by <|endoftext|> lines."""
    from tiny_lm.cli.progress import track
    from tiny_lm.dataset import DatasetConfig, Split, estimate_bytes, write_documents
    from tiny_lm.dataset.stories import generate_stories
    from tiny_lm.files import is_stdout

    if split not in get_args(Split):
        raise UserError(f"--split {split}: unknown{nearest(split, get_args(Split))}")
    chosen: Split = "train" if split == "train" else "validation"
    config = DatasetConfig(name="stories", source="stories", num_stories=count, num_validation=count, seed=seed)
    documents = generate_stories(count, seed=seed, split=chosen)
    documents = track(documents, "writing stories", total_bytes=estimate_bytes(config, chosen))
    written = write_documents(documents, output)
    print(f"{output}: {written:,} stories", file=sys.stderr if is_stdout(output) else sys.stdout)


def tokenize(
    config: Annotated[str, typer.Option(help="Tokenizer config: a YAML file or the name of a shipped one.")],
    seed: Annotated[int, typer.Option(min=0, help="Splits train and validation if the dataset does not.")] = 0,
    errors: ReplaceErrors = "strict",
    tokenizer_folder: Annotated[
        Path | None, typer.Option("--tokenizer", help="Use this tokenizer, such as an imported run's.")
    ] = None,
    settings: Settings = None,
    dry_run: DryRun = False,
) -> None:
    """Tokenize a corpus into token streams.

    Writes train.bin, val.bin, metadata.json and a copy of the tokenizer into the config's tokenized_output_dir. The
    tokenizer config names the corpus; the tokenizer in its output_dir must be trained first, with `tiny-lm tokenizer
    train`.
    """
    from tiny_lm.tokenizer import load_tokenizer
    from tiny_lm.tokenizer.train import matches_config

    tokenizer_config, dataset_config = load_corpus_configs(config, settings)
    if dry_run:
        print_configs([("tokenizer", tokenizer_config), ("dataset", dataset_config)])
        return
    train_command = shell_command(
        "tiny-lm", "tokenizer", "train", "--config", config, *(word for s in settings or [] for word in ("--set", s))
    )
    if tokenizer_folder is None and not any(Path(tokenizer_config.output_dir).glob("*")):
        raise UserError(f"{tokenizer_config.output_dir}: no tokenizer yet; train it first with `{train_command}`")
    tokenizer = load_tokenizer(tokenizer_folder or tokenizer_config.output_dir)
    if tokenizer_folder is None and not matches_config(tokenizer, tokenizer_config):
        raise UserError(
            f"{tokenizer_config.output_dir}: does not match {config} (type, special tokens or "
            "split pattern differ); train it again with "
            f"`{train_command}`"
        )
    chosen = check_errors(errors)
    split_within = survey(tokenizer_config, dataset_config, seed=seed, errors=chosen)
    metadata = write_streams(
        tokenizer, tokenizer_config, dataset_config, seed=seed, errors=chosen, split_within=split_within
    )
    for name, file in metadata.files.items():
        print(
            f"{Path(tokenizer_config.tokenized_output_dir) / name}: {file.tokens:,} tokens, "
            f"{file.documents:,} documents, {file.bytes_per_token:.2f} bytes per token"
        )


def load_corpus_configs(config: str, settings: list[str] | None) -> "tuple[TokenizerConfig, DatasetConfig]":
    """Load a tokenizer config and the dataset config that it names.

    Raises:
        UserError: one is invalid, or an output folder is the folder of the corpus.
    """
    from tiny_lm.dataset import DatasetConfig
    from tiny_lm.dataset.names import path_from_name
    from tiny_lm.tokenizer import TokenizerConfig

    overrides = parse_overrides(settings or [], ["tokenizer", "dataset"])
    tokenizer_config = TokenizerConfig.from_yaml(config, overrides["tokenizer"])
    dataset_config = DatasetConfig.from_yaml(tokenizer_config.dataset_config, overrides["dataset"])
    if dataset_config.source == "local":
        for key in ("output_dir", "tokenized_output_dir"):
            folder = getattr(tokenizer_config, key)
            if os.path.realpath(folder) == os.path.realpath(path_from_name(dataset_config.name)):
                raise UserError(f"{config}: {key} {folder} is the folder of the corpus; choose another folder")
    return tokenizer_config, dataset_config


def survey(
    tokenizer_config: "TokenizerConfig",
    dataset_config: "DatasetConfig",
    *,
    seed: int = 0,
    errors: Literal["strict", "replace"] = "strict",
) -> bool:
    """Describe how a local corpus is read; return whether to divide its documents into train and validation.

    Raises:
        UserError: the corpus cannot be read, or holds no document.
    """
    from tiny_lm.dataset import survey_corpus

    found = survey_corpus(dataset_config, val_split=tokenizer_config.val_split, seed=seed, errors=errors)
    if found is None:
        return False
    print_message(found.description)
    return found.split_within


def write_streams(
    tokenizer: "Tokenizer",
    tokenizer_config: "TokenizerConfig",
    dataset_config: "DatasetConfig",
    *,
    seed: int = 0,
    errors: Literal["strict", "replace"] = "strict",
    split_within: bool = False,
) -> "StreamMetadata":
    """Tokenize a dataset with a progress bar."""
    from tiny_lm.cli.progress import document_progress
    from tiny_lm.data.tokenize import tokenize_dataset
    from tiny_lm.dataset import estimate_bytes

    val_split = tokenizer_config.val_split
    sizes = [estimate_bytes(dataset_config, split, val_split=val_split) for split in ("train", "validation")]
    total = None if None in sizes else sum(filter(None, sizes))
    with document_progress("tokenizing", total_bytes=total) as on_document:
        return tokenize_dataset(
            tokenizer_config,
            dataset_config,
            tokenizer=tokenizer,
            seed=seed,
            errors=errors,
            split_within=split_within,
            on_document=on_document,
        )


def check_errors(errors: str) -> Literal["strict", "replace"]:
    """Validate `--errors`.

    Raises:
        UserError: it is neither strict nor replace.
    """
    if errors not in ("strict", "replace"):
        raise UserError(f"--errors {errors}: unknown{nearest(errors, ['strict', 'replace'])}")
    return "strict" if errors == "strict" else "replace"
