"""Commands that write text with a trained model."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tiny_lm.errors import UserError

if TYPE_CHECKING:
    from tiny_lm.inference import TextGenerator

Prompt = Annotated[str, typer.Option(help="How the text begins.")]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", "--max-tokens", help="Most tokens to write.")]
Temperature = Annotated[float, typer.Option(help="0 always takes the likeliest token; higher is more surprising.")]
TopK = Annotated[int | None, typer.Option(help="Draw from the k likeliest tokens only; 0: from all.")]
TopP = Annotated[float, typer.Option(help="Draw from the likeliest tokens that together have this probability.")]
Seed = Annotated[int | None, typer.Option(min=0, max=2**63 - 1, help="The same seed gives the same text.")]
AddBos = Annotated[bool, typer.Option(help="Begin as training texts do, with the beginning-of-text token.")]


def generate(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder, or a checkpoint inside one.")],
    prompt: Prompt = "Once upon a time",
    max_new_tokens: MaxNewTokens = 300,
    temperature: Temperature = 0.8,
    top_k: TopK = None,
    top_p: TopP = 1.0,
    seed: Seed = None,
    add_bos: AddBos = True,
) -> None:
    """Continue a prompt with a trained model."""
    from tiny_lm.inference import TextGenerator

    _write(TextGenerator.from_run(run), prompt, max_new_tokens, temperature, top_k, top_p, seed, add_bos)


def generate_from_checkpoint(
    checkpoint: Annotated[Path, typer.Option(help="A .ckpt file.")],
    model_config: Annotated[str | None, typer.Option(help="Must be the config that the checkpoint carries.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Tokenizer folder, or any file in it.")] = None,
    tokenizer_dir: Annotated[Path | None, typer.Option(help="Tokenizer folder.")] = None,
    tokenizer_config: Annotated[str | None, typer.Option(help="Must name the kind of the tokenizer folder.")] = None,
    prompt: Prompt = "Once upon a time",
    max_new_tokens: MaxNewTokens = 300,
    temperature: Temperature = 0.8,
    top_k: TopK = None,
    top_p: TopP = 1.0,
    seed: Seed = None,
    add_bos: AddBos = True,
) -> None:
    """Continue a prompt with a checkpoint and a tokenizer given one by one."""
    from tiny_lm.inference import TextGenerator
    from tiny_lm.model.config import load_model_config
    from tiny_lm.tokenizer import TokenizerConfig

    expected = load_model_config(model_config) if model_config else None
    named = TokenizerConfig.from_yaml(tokenizer_config) if tokenizer_config else None
    folder = tokenizer_dir or tokenizer or (Path(named.output_dir) if named else None)
    if folder is None:
        raise UserError("name the tokenizer with --tokenizer, --tokenizer-dir or --tokenizer-config")
    generator = TextGenerator.from_checkpoint(checkpoint, folder, model_config=expected)
    if named and named.type != generator.tokenizer.kind:
        raise UserError(f"{tokenizer_config}: is of type {named.type}, but {folder} holds {generator.tokenizer.kind}")
    _write(generator, prompt, max_new_tokens, temperature, top_k, top_p, seed, add_bos)


def _write(
    generator: "TextGenerator",
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float,
    seed: int | None,
    add_bos: bool,
) -> None:
    """Print prompt and continuation, and nothing more, as it is made."""
    from tiny_lm.inference import Sampling

    sampling = Sampling(temperature, top_k, top_p)
    length, context = len(generator.tokenizer.encode(prompt, bos=add_bos)), generator.model.config.context_length
    if length > context:
        print(f"the prompt has {length} tokens, the context {context}: its beginning is not read", file=sys.stderr)
    pieces = generator.stream(prompt, max_new_tokens, sampling=sampling, seed=seed, add_bos=add_bos)
    sys.stdout.write(prompt)
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
