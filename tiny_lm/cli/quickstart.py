"""The quickstart command: from raw text to generated stories."""

import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tiny_lm.cli.options import ReplaceErrors
from tiny_lm.cli.train import Configs, run_training
from tiny_lm.console import make_console, shell_command, styled
from tiny_lm.errors import UserError
from tiny_lm.runs import RUNS_FOLDER, Run, create_run
from tiny_lm.training.launch import check_variables

if TYPE_CHECKING:
    from rich.console import Console

    from tiny_lm.dataset import DatasetConfig
    from tiny_lm.training.fit import TrainingResult

_NAME = "quickstart"
_IN_USE = (
    "another process is using this folder; wait until it has finished, or run this one in another working directory"
)
_VALIDATIONS = 8
_PROMPTS = ("Once upon a time", "One day,", "")


def quickstart(
    text: Annotated[
        Path | None, typer.Option(help="Train on your own text: a file, a folder or a glob; default: built-in stories.")
    ] = None,
    minutes: Annotated[float, typer.Option(min=0.05, max=10_000, help="Time for training alone.")] = 3.0,
    errors: ReplaceErrors = "strict",
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of initial weights and batches.")] = 0,
) -> None:
    """Go from raw text to generated stories in minutes.

    Text, tokenizer, token stream, model, training, loss curve and three stories, also on a CPU.
    """
    from tiny_lm.locks import lock_folder
    from tiny_lm.tokenizer import TokenizerConfig

    if text == Path():
        raise UserError('--text "": is empty; name a file, a folder or a glob (for this folder: "$PWD")')
    if text and not text.exists() and not any(character in str(text) for character in "*?["):
        raise UserError(f"--text {text}: no such file or folder")
    # Locking one folder is enough: tokenizer, token stream and run have the same names in each quickstart.
    with lock_folder(Path(TokenizerConfig.from_yaml(_NAME).output_dir), _IN_USE, create=True):
        _run_quickstart(text, minutes, errors, seed)


def _run_quickstart(text: Path | None, minutes: float, errors: str, seed: int) -> None:
    check_variables()
    console = make_console()
    started = time.perf_counter()
    console.print(styled("1 of 4", "bold"), " text to tokens")
    stream = _prepare_text(text, errors, console)
    console.print(styled("2 of 4", "bold"), " measuring this machine")
    configs = _fit_to_minutes(minutes, seed, console)
    console.print(styled("3 of 4", "bold"), " training")
    with _claim_fresh_run() as run:
        result = run_training(run, configs, [_NAME] * 3)
    console.print(styled("4 of 4", "bold"), " three stories")
    _report(run, result, stream, time.perf_counter() - started)
    _print_stories(run, text is None, seed)
    program = "tiny-lm" if shutil.which("tiny-lm") else sys.argv[0]  # as the user can type it
    print(
        "Next:",
        shell_command(program, "generate", run.folder, "--prompt", "Once upon a time", "--temperature", "0.7"),
        shell_command(program, "quickstart", "--text", "your-own.txt", "--minutes", "10"),
        shell_command(program, "train", "speed", "--help"),
        sep="\n  ",
    )


def _write_stories(console: "Console") -> "DatasetConfig":
    """Write the built-in stories to text files, where a newcomer can read them; return their dataset config."""
    from tiny_lm.dataset import DatasetConfig, iter_documents, write_documents
    from tiny_lm.dataset.config import Splits

    built_in = DatasetConfig.from_yaml(_NAME)
    folder = Path("data") / _NAME
    write_documents(iter_documents(built_in, "train"), folder / "train.txt")
    write_documents(iter_documents(built_in, "validation"), folder / "valid.txt")
    console.print(f"        the built-in stories are in {folder}")
    return DatasetConfig(name=str(folder), source="local", splits=Splits(train="train.txt", validation="valid.txt"))


def _prepare_text(text: Path | None, errors: str, console: "Console") -> dict[str, Any]:
    """Train the tokenizer and write the token streams; return their rows of the final table."""
    from tiny_lm.cli.data import check_errors, survey, write_streams
    from tiny_lm.cli.tokenizer import train_and_save
    from tiny_lm.dataset import DatasetConfig
    from tiny_lm.dataset.names import name_from_path
    from tiny_lm.tokenizer import TokenizerConfig

    chosen = check_errors(errors)
    dataset_config = DatasetConfig(name=name_from_path(text), source="local") if text else _write_stories(console)
    tokenizer_config = TokenizerConfig.from_yaml(_NAME, {"val_split": 0.05})
    split_within = survey(tokenizer_config, dataset_config, errors=chosen)
    tokenizer = train_and_save(tokenizer_config, dataset_config, errors=chosen, split_within=split_within)
    metadata = write_streams(tokenizer, tokenizer_config, dataset_config, errors=chosen, split_within=split_within)
    train, val = metadata.files["train.bin"], metadata.files["val.bin"]
    return {
        "text": dataset_config.name,
        "documents": f"{train.documents:,} for training, {val.documents:,} for validation"
        + (", the ends of the same documents" if split_within else ""),
        "tokenizer": f"{tokenizer.vocab_size:,} tokens, {train.bytes_per_token:.2f} bytes each",
        "token stream": f"{train.tokens:,} tokens in {tokenizer_config.tokenized_output_dir}",
    }


def _fit_to_minutes(minutes: float, seed: int, console: "Console") -> Configs:
    """Load the quickstart configs and set the number of steps that fits into the time."""
    from tiny_lm.data import BinDataConfig
    from tiny_lm.model.config import load_model_config
    from tiny_lm.training import TrainingConfig
    from tiny_lm.training.planning.run_time import measure_speed

    model_config = load_model_config(_NAME)
    training_config = TrainingConfig.from_yaml(_NAME, {"seed": seed})
    data_config = BinDataConfig.from_yaml(_NAME)
    speed = measure_speed(model_config, training_config, data_config)
    seconds = minutes * 60 - _VALIDATIONS * speed.validation_seconds
    tokens_per_step = data_config.batch_size * data_config.block_size
    steps = max(int(seconds * speed.tokens_per_second / tokens_per_step), 20)
    console.print(f"        {speed.tokens_per_second:,.0f} tokens/s, so {steps:,} steps in {minutes:g} minutes")
    every = -(-steps // _VALIDATIONS)
    training_config = replace(
        training_config, max_steps=steps, val_every_n_steps=every, save_every_n_steps=every, run_name=_NAME
    )
    return model_config, training_config, data_config


@contextmanager
def _claim_fresh_run() -> Iterator[Run]:
    """Lock an empty `runs/quickstart` while the block runs; an existing run is renamed.

    Raises:
        UserError: another process is training there.
    """
    run = Run(RUNS_FOLDER / _NAME)
    if run.folder.exists():
        with run.claim():
            when = time.strftime("%Y%m%d-%H%M%S", time.gmtime(run.folder.stat().st_mtime))
            kept = create_run(f"{_NAME}-{when}").folder  # an empty folder, which the rename replaces
            if os.name == "nt":
                kept.rmdir()  # on Windows, a rename does not replace a folder
            run.folder.rename(kept)
    with run.claim():
        yield run


def _report(run: Run, result: "TrainingResult", stream: dict[str, Any], seconds: float) -> None:
    """Print the summary table."""
    from rich.table import Table

    record = run.read_metadata()
    rows = {
        **stream,
        "model": f"{record['parameters']:,} parameters",
        "training": f"{result.steps:,} steps, {record['tokens']:,} tokens, {record['seconds']:,.0f} s",
        "machine": record["device"],
        "val loss": f"{result.metrics['val_loss']:.3f} (perplexity {result.metrics['val_ppl']:.2f})",
        "bits per byte": f"{result.metrics['val_bpb']:.3f}",
        "loss curve": str(run.plots / "loss.png"),
        "report": str(run.report),
        "total": f"{seconds:,.0f} s",
    }
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in rows.items():
        table.add_row(styled(name, "bold"), value)
    make_console(stderr=False).print(table)


def _print_stories(run: Run, built_in: bool, seed: int) -> None:
    """Generate and print three stories."""
    from tiny_lm.inference import GenerationConfig, TextGenerator

    generator = TextGenerator.from_run(run.folder)
    request = GenerationConfig(max_new_tokens=300, temperature=0.7, top_p=0.95)
    for number, prompt in enumerate(_PROMPTS if built_in else ("", "", ""), start=1):
        print(f"\n--- {number} " + "-" * 74)
        story = generator.stream(prompt, request, seed=seed + number)
        print(prompt + "".join(story))
    print("-" * 80)
