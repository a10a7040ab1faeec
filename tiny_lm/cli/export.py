"""Commands that write a trained model in the formats of other programs."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tiny_lm.errors import UserError

if TYPE_CHECKING:
    from tiny_lm.export.source import Source

export_app = typer.Typer(
    help="Write a trained model for other programs, and prove that it is the same model.",
    rich_markup_mode=None,
    no_args_is_help=True,
)

RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="A run folder, or a checkpoint inside one.")]
OutputDir = Annotated[Path, typer.Option(help="The folder to write.")]
DtypeOption = Annotated[str, typer.Option("--dtype", metavar="float32|float16|bfloat16", help="Of the weights.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an earlier export.")]


@export_app.command("huggingface")
def export_huggingface(
    run: RunArgument, output_dir: OutputDir, dtype: DtypeOption = "float32", force: Force = False
) -> None:
    """Write a folder that transformers and vLLM load."""
    from tiny_lm.export.source import load_source

    _export_huggingface(load_source(run), output_dir, dtype, force)


@export_app.command("gguf")
def export_gguf(
    run: RunArgument,
    output_dir: OutputDir,
    outtype: Annotated[
        str, typer.Option(metavar="f32|f16|bf16|q8_0|q4_0|q4_1|q5_0|q5_1", help="Of the file that is always written.")
    ] = "f16",
    quantize: Annotated[str, typer.Option(metavar="TYPE,...", help="Further files, such as Q4_K_M,Q5_K_M,Q6_K.")] = "",
    force: Force = False,
) -> None:
    """Write GGUF files, which llama.cpp and Ollama run."""
    from tiny_lm.export import gguf
    from tiny_lm.export.gguf_file import BLOCKS
    from tiny_lm.export.source import load_source
    from tiny_lm.export.verify import show_table

    kinds = gguf.check_kinds([outtype, *quantize.replace(" ", "").split(",")])
    if kinds[0] not in BLOCKS:
        raise UserError(f"--outtype {outtype}: is made by quantizing; use --quantize {outtype.upper()}")
    source = load_source(run)
    files = gguf.export_gguf(source, output_dir, kinds, force=force, tell=lambda line: print(line, file=sys.stderr))
    show_table(f"float32 GGUF of {source.name} in llama.cpp", files[0].checks)
    for file in files:
        if (output_dir / file.name).is_file():
            types = ", ".join(f"{count} {name}" for name, count in file.facts.types.items())
            print(f"{output_dir / file.name}  {file.facts.bytes:,} bytes")
            print(f"    {file.facts.bits_per_weight:.2f} bits per weight ({types})")
            print(f"    perplexity {file.checks[-1].result}")
    print(output_dir / "verification.json")


def import_model(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A Hugging Face folder, or a run folder.")],
    output_dir: Annotated[Path | None, typer.Option(help="The run folder to write; by default runs/NAME.")] = None,
) -> None:
    """Make a run of ours from a model in Hugging Face's layout: GPT-2, Llama, Starcoder2 or Qwen3."""
    from tiny_lm.export import importing
    from tiny_lm.runs import RUNS_FOLDER

    run = importing.import_model(folder, output_dir or RUNS_FOLDER / f"{folder.resolve().name}-imported")
    print(run.folder)
    print(f"next: tiny-lm generate {run.folder} --prompt 'Once upon a time'", file=sys.stderr)


def convert_to_huggingface(
    checkpoint: Annotated[Path, typer.Option(help="A .ckpt file.")],
    output_dir: OutputDir,
    model_config: Annotated[str | None, typer.Option(help="Must be the config that the checkpoint carries.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Tokenizer folder, or any file in it.")] = None,
    tokenizer_config: Annotated[str | None, typer.Option(help="Must name the kind of the tokenizer folder.")] = None,
    dtype: DtypeOption = "float32",
    force: Force = False,
) -> None:
    """Write a Hugging Face folder from a checkpoint and a tokenizer given one by one."""
    from tiny_lm.export.source import load_checkpoint_source
    from tiny_lm.model.config import load_model_config
    from tiny_lm.runs import Run
    from tiny_lm.tokenizer import TokenizerConfig

    expected = load_model_config(model_config) if model_config else None
    named = TokenizerConfig.from_yaml(tokenizer_config) if tokenizer_config else None
    folder = tokenizer or (Path(named.output_dir) if named else Run(checkpoint.parent.parent).tokenizer)
    source = load_checkpoint_source(checkpoint, folder, model_config=expected)
    if named and named.type != source.tokenizer.kind:
        raise UserError(f"{tokenizer_config}: is of type {named.type}, but {folder} holds {source.tokenizer.kind}")
    _export_huggingface(source, output_dir, dtype, force)


def _export_huggingface(source: "Source", folder: Path, dtype: str, force: bool) -> None:
    from tiny_lm.export import huggingface
    from tiny_lm.export.verify import show_table

    checks = huggingface.export_huggingface(source, folder, dtype=huggingface.check_dtype(dtype), force=force)
    show_table(f"{folder} beside {source.name}", checks)
    _print_files(folder)
    print(f"next: tiny-lm generate {folder} --prompt 'Once upon a time'", file=sys.stderr)


def _print_files(folder: Path) -> None:
    for file in sorted(folder.iterdir()):
        print(f"{file}  {file.stat().st_size:,} bytes")
