"""The commands ``tiny-lm export``, ``import`` and ``convert``: models for other programs, and back."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tiny_lm.console import print_message, shell_command
from tiny_lm.errors import UserError
from tiny_lm.runs import run_folder_of

if TYPE_CHECKING:
    from tiny_lm.export.gguf import GGUFFile
    from tiny_lm.export.source import ExportSource

export_app = typer.Typer(
    help="Export a trained model for other programs, and verify the result.",
    rich_markup_mode=None,
    no_args_is_help=True,
)

RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="A run folder, or a checkpoint inside one.")]
OutputDir = Annotated[Path, typer.Option(help="Output folder.")]
DtypeOption = Annotated[str, typer.Option("--dtype", metavar="float32|float16|bfloat16", help="Dtype of the weights.")]
Quantize = Annotated[str, typer.Option(metavar="TYPE,...", help="Additional types, such as Q4_K_M,Q5_K_M,Q6_K.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an earlier export.")]


@export_app.command("huggingface")
def export_huggingface(
    run: RunArgument, output_dir: OutputDir, dtype: DtypeOption = "float32", force: Force = False
) -> None:
    """Export for transformers and vLLM (safetensors)."""
    from tiny_lm.export.source import load_source

    _export_huggingface(load_source(run), output_dir, dtype, force)


@export_app.command("gguf")
def export_gguf(
    run: RunArgument,
    output_dir: OutputDir,
    outtype: Annotated[
        str,
        typer.Option(metavar="f32|f16|bf16|q8_0|q4_0|q4_1|q5_0|q5_1", help="Type of the file that is always written."),
    ] = "f16",
    quantize: Quantize = "",
    force: Force = False,
) -> None:
    """Export GGUF files for llama.cpp and Ollama."""
    from tiny_lm.export import gguf
    from tiny_lm.export.source import load_source

    kinds = _gguf_kinds(outtype, quantize)
    source = load_source(run)
    files = gguf.export_gguf(source, output_dir, kinds, force=force, log=print_message)
    _show_gguf(source, output_dir, files)


@export_app.command("ollama")
def export_ollama(
    run: RunArgument,
    output_dir: OutputDir,
    outtype: Annotated[
        str | None,
        typer.Option(
            metavar="f32|f16|bf16|q8_0|q4_0|q4_1|q5_0|q5_1",
            help="GGUF type; default: f16, or the types of --quantize.",
        ),
    ] = None,
    quantize: Quantize = "",
    name: Annotated[str | None, typer.Option(help="Model name in Ollama; default: the run's.")] = None,
    license_: Annotated[
        str | None,
        typer.Option(
            "--license", metavar="NAME|FILE", help="License of the model, such as MIT, or a file with its text."
        ),
    ] = None,
    create: Annotated[bool, typer.Option("--create", help="Also create the model in the installed Ollama.")] = False,
    force: Force = False,
) -> None:
    """Export for Ollama: GGUF files with Modelfiles."""
    from tiny_lm.export import ollama
    from tiny_lm.export.source import load_source

    kinds = _gguf_kinds(outtype or ("" if quantize else "f16"), quantize)
    license_text = ollama.read_license(license_)
    if create:
        ollama.find_ollama()
    source = load_source(run)
    files, models = ollama.export_ollama(
        source, output_dir, kinds, name=name, license_text=license_text, force=force, log=print_message
    )
    _show_gguf(source, output_dir, files)
    for model in models:
        print(model.modelfile)
        if create:
            print(f"{model.name} in Ollama: {model.commands[1][-1]}{ollama.create_model(source, model)}")
    if not license_:
        print_message("The Modelfile has no license; set one with --license, such as MIT or a file.")
    for command in [] if create else [shell_command(*words) for model in models for words in model.commands]:
        print_message(f"next: {command}")


def _gguf_kinds(outtype: str, quantize: str) -> list[str]:
    from tiny_lm.export import gguf
    from tiny_lm.export.gguf_file import BLOCKS

    if outtype and gguf.check_kinds([outtype])[0] not in BLOCKS:
        raise UserError(f"--outtype {outtype}: is a quantized type; use --quantize {outtype.upper()}")
    return gguf.check_kinds([outtype, *quantize.replace(" ", "").split(",")])


def _show_gguf(source: "ExportSource", folder: Path, files: "list[GGUFFile]") -> None:
    from tiny_lm.export.verify import show_table

    show_table(f"float32 GGUF of {source.name} in llama.cpp", files[0].checks)
    for file in files:
        if (folder / file.name).is_file():
            types = ", ".join(f"{count} {name}" for name, count in file.facts.types.items())
            print(f"{folder / file.name}  {file.facts.bytes:,} bytes")
            print(f"    {file.facts.bits_per_weight:.2f} bits per weight ({types})")
            print(f"    perplexity {file.checks[-1].result}")
    print(folder / "verification.json")


def _suggest(*words: object) -> None:
    print_message(f"next: {shell_command(*words, '--prompt', 'Once upon a time')}")


@export_app.command("onnx")
def export_onnx(run: RunArgument, output_dir: OutputDir, force: Force = False) -> None:
    """Export for ONNX Runtime and transformers.js."""
    from tiny_lm.export import onnx
    from tiny_lm.export.source import load_source
    from tiny_lm.export.verify import show_table

    source = load_source(run)
    for file in onnx.export_onnx(source, output_dir, force=force):
        show_table(f"{file.name} of {source.name} in ONNX Runtime", file.checks)
        bits = f"{file.facts.bits_per_weight:.2f} bits per weight"
        print(f"{output_dir / file.name}  {file.facts.bytes:,} bytes, {bits}, opset {file.facts.opset}")
    print(output_dir / "verification.json")
    _suggest("python", output_dir / onnx.PROGRAM)


def import_model(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A Hugging Face folder, or a run folder.")],
    output_dir: Annotated[Path | None, typer.Option(help="Run folder to write; default: runs/NAME-imported.")] = None,
) -> None:
    """Import a model in Hugging Face layout as a run: GPT-2, Llama, Starcoder2 or Qwen3."""
    from tiny_lm.export import importing
    from tiny_lm.runs import RUNS_FOLDER

    run = importing.import_model(folder, output_dir or RUNS_FOLDER / f"{folder.resolve().name}-imported")
    print(run.folder)
    _suggest("tiny-lm", "generate", run.folder)


def convert_to_huggingface(
    checkpoint: Annotated[Path, typer.Option(help="A .ckpt file.")],
    output_dir: OutputDir,
    model_config: Annotated[str | None, typer.Option(help="Model config; must equal the checkpoint's.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Tokenizer folder, or any file in it.")] = None,
    tokenizer_config: Annotated[
        str | None, typer.Option(help="Tokenizer config; must match the tokenizer folder.")
    ] = None,
    dtype: DtypeOption = "float32",
    force: Force = False,
) -> None:
    """Export a checkpoint and a tokenizer from separate paths to Hugging Face layout."""
    source = load_named_source(checkpoint, model_config, tokenizer, tokenizer_config)
    _export_huggingface(source, output_dir, dtype, force)


def load_named_source(
    checkpoint: Path, model_config: str | None, tokenizer: Path | None, tokenizer_config: str | None
) -> "ExportSource":
    """Load a checkpoint and a tokenizer and check them against the config files.

    Raises:
        UserError: a file is missing or damaged, or does not match its config.
    """
    from tiny_lm.export.source import load_checkpoint_source
    from tiny_lm.model.config import load_model_config
    from tiny_lm.runs import Run
    from tiny_lm.tokenizer import TokenizerConfig

    expected = load_model_config(model_config) if model_config else None
    named = TokenizerConfig.from_yaml(tokenizer_config) if tokenizer_config else None
    folder = tokenizer or (Path(named.output_dir) if named else Run(run_folder_of(checkpoint)).tokenizer)
    source = load_checkpoint_source(checkpoint, folder, model_config=expected)
    if named and named.type != source.tokenizer.kind:
        raise UserError(f"{tokenizer_config}: is of type {named.type}, but {folder} holds {source.tokenizer.kind}")
    return source


def _export_huggingface(source: "ExportSource", folder: Path, dtype: str, force: bool) -> None:
    from tiny_lm.export import huggingface
    from tiny_lm.export.verify import show_table

    checks = huggingface.export_huggingface(source, folder, dtype=huggingface.check_dtype(dtype), force=force)
    show_table(f"{folder} beside {source.name}", checks)
    _print_files(folder)
    _suggest("tiny-lm", "generate", folder)


def _print_files(folder: Path) -> None:
    for file in sorted(folder.iterdir()):
        print(f"{file}  {file.stat().st_size:,} bytes")
