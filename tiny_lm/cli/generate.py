"""The command that generates text with a trained model."""

import inspect
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tiny_lm.cli.options import warn_if_truncated
from tiny_lm.console import print_message, print_result
from tiny_lm.errors import UserError
from tiny_lm.files import to_json

if TYPE_CHECKING:
    from tiny_lm.inference import Completion, GenerationConfig, TextGenerator

_MAX_SAMPLES = 1000
_MAX_PROMPT_FILE_BYTES = 16 * 2**20
_SEPARATOR = "---"
_LINE_END = re.compile("\r\n|\n|\r")


def _complete(
    load: "Callable[[str | None], TextGenerator]",
    prompt: Annotated[list[str] | None, typer.Option(help="Start of the text; may be repeated.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="Prompts, one per line (\\n in a line is a line break); - reads standard input.")
    ] = None,
    num_samples: Annotated[int, typer.Option(min=1, max=_MAX_SAMPLES, help="Completions of each prompt.")] = 1,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "--max-tokens", help="Maximum number of new tokens.")
    ] = 300,
    min_new_tokens: Annotated[int, typer.Option(help="Minimum number of new tokens.")] = 0,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Sample from the k likeliest tokens only; 0: from all.")] = None,
    top_p: Annotated[
        float, typer.Option(help="Sample from the likeliest tokens that together have this probability.")
    ] = 1.0,
    min_p: Annotated[
        float, typer.Option(help="Sample from tokens with this fraction of the likeliest one's probability.")
    ] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: avoid tokens that occur in the text.")] = 1.0,
    presence_penalty: Annotated[float, typer.Option(help="Subtracted from the logits of generated tokens.")] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(help="The same, once for each occurrence.")] = 0.0,
    stop: Annotated[list[str] | None, typer.Option(help="End before this string; may be repeated.")] = None,
    stop_token: Annotated[list[str] | None, typer.Option(help="End at this special token; may be repeated.")] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**62, help="Same seed, same text; sample i has seed + i.")
    ] = None,
    add_bos: Annotated[bool, typer.Option(help="Prepend the bos token, as in training texts.")] = True,
    strict: Annotated[
        bool, typer.Option(help="Refuse a prompt longer than the context instead of truncating it.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object for each text, one per line.")] = False,
    interactive: Annotated[
        bool, typer.Option("--interactive", help="Start a session: type prompts, get stories.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="Device to run on: cpu, cuda, mps.")] = None,
    compile_step: Annotated[
        bool,
        typer.Option(
            "--compile", help="Compile first (some seconds): up to 3 times as fast for a single text on a CPU."
        ),
    ] = False,
) -> None:
    """Load a generator for a device, and complete prompts; the options are those of both commands below."""
    from tiny_lm.inference import GenerationConfig

    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        stop=stop or (),
        stop_tokens=stop_token or (),
        add_bos=add_bos,
        strict=strict,
    )
    if interactive and (as_json or num_samples > 1):
        raise UserError("--interactive generates one story at a time, as text: omit --json and --num-samples")
    prompts = [*(prompt or ()), *(_read_prompts(prompt_file) if prompt_file else ())]
    generator = load(device)
    if compile_step:
        print_message("compiling the decoding step, which takes some seconds")
        generator.compile()
    if interactive:
        from tiny_lm.cli.interactive import Session

        Session(generator, config, seed).run(prompts)
        return
    prompts = prompts or ["Once upon a time"]
    for text in prompts:
        warn_if_truncated(generator, text, config)
    if len(prompts) == num_samples == 1 and not as_json:
        _print_stream(prompts[0], generator, config, seed)
        return
    seeds = None if seed is None else [seed + number for _ in prompts for number in range(num_samples)]
    repeated = [text for text in prompts for _ in range(num_samples)]
    _print_all(generator.generate_batch(repeated, config, seed=seeds), seeds, as_json)


def _with_shared_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command that takes ``**options`` the options of :func:`_complete`."""
    own = list(inspect.signature(command).parameters.values())[:-1]
    shared = list(inspect.signature(_complete).parameters.values())[1:]
    command.__signature__ = inspect.Signature([*own, *shared])  # type: ignore[attr-defined]  # read by inspect
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in (*own, *shared)}
    return command


@_with_shared_options
def generate(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="A run folder, a checkpoint inside one, or an exported folder.")
    ],
    **options: Any,
) -> None:
    """Generate text with a trained model."""
    from tiny_lm.inference import TextGenerator

    _complete(lambda device: TextGenerator.from_path(run, device=device), **options)


@_with_shared_options
def generate_from_checkpoint(
    checkpoint: Annotated[Path, typer.Option(help="A .ckpt file, or a folder in Hugging Face's layout.")],
    model_config: Annotated[str | None, typer.Option(help="Must equal the config in the checkpoint.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Tokenizer folder, or any file in it.")] = None,
    tokenizer_dir: Annotated[Path | None, typer.Option(help="Tokenizer folder.")] = None,
    tokenizer_config: Annotated[str | None, typer.Option(help="Must have the type of the tokenizer.")] = None,
    **options: Any,
) -> None:
    """Generate text with a checkpoint and a tokenizer."""
    folder = tokenizer_dir or tokenizer
    _complete(lambda device: _load(checkpoint, model_config, folder, tokenizer_config, device), **options)


def _load(
    checkpoint: Path, model_config: str | None, folder: Path | None, tokenizer_config: str | None, device: str | None
) -> "TextGenerator":
    from tiny_lm.inference import TextGenerator
    from tiny_lm.model.config import load_model_config
    from tiny_lm.tokenizer import TokenizerConfig

    expected = load_model_config(model_config) if model_config else None
    config = TokenizerConfig.from_yaml(tokenizer_config) if tokenizer_config else None
    folder = folder or (Path(config.output_dir) if config else None)
    if checkpoint.suffix != ".ckpt":
        generator = TextGenerator.from_export(checkpoint, tokenizer_path=folder, device=device)
        if expected is not None and expected != generator.model.config:
            raise UserError(f"{checkpoint}: is not the model of {model_config}")
    elif folder is None:
        raise UserError("name the tokenizer with --tokenizer, --tokenizer-dir or --tokenizer-config")
    else:
        generator = TextGenerator.from_checkpoint(checkpoint, folder, model_config=expected, device=device)
    if config and config.type != generator.tokenizer.kind:
        raise UserError(f"{tokenizer_config}: is of type {config.type}, but {folder} is {generator.tokenizer.kind}")
    return generator


def _read_prompts(file: Path) -> list[str]:
    """Read one prompt per line, without empty lines. Only line ends end a line, not U+2028 or a form feed."""
    name = "standard input" if str(file) == "-" else str(file)
    try:
        if str(file) == "-":
            data = sys.stdin.buffer.read(_MAX_PROMPT_FILE_BYTES + 1)
        else:
            with file.open("rb") as stream:
                data = stream.read(_MAX_PROMPT_FILE_BYTES + 1)
    except OSError as error:
        raise UserError(f"{name}: could not be read ({error.strerror or error})") from error
    if len(data) > _MAX_PROMPT_FILE_BYTES:
        raise UserError(f"{name}: larger than {_MAX_PROMPT_FILE_BYTES // 2**20} MiB; split it into several files")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        problem = f"is not UTF-8 text (byte {error.start} is invalid)"
        raise UserError(f"{name}: {problem}; convert it, for example with iconv") from None
    prompts = [line.replace("\\n", "\n") for line in _LINE_END.split(text) if line.strip()]
    if not prompts:
        raise UserError(f"{name}: contains no prompt; write one per line")
    return prompts


def _print_stream(prompt: str, generator: "TextGenerator", config: "GenerationConfig", seed: int | None) -> None:
    """Print prompt and completion, and nothing else, while it is generated."""
    chunks = generator.stream(prompt, config, seed=seed)
    print_result(prompt, end="")
    for chunk in chunks:
        print_result(chunk, end="")
    print_result()


def _print_all(completions: Sequence["Completion"], seeds: Sequence[int] | None, as_json: bool) -> None:
    """Print texts with a line between them, or as JSON lines."""
    for number, each in enumerate(completions):
        if as_json:
            metadata = {"tokens": len(each.ids), "finish_reason": each.finish_reason, "seed": seeds and seeds[number]}
            print_result(to_json({"prompt": each.prompt, "text": each.text, **metadata}))
        else:
            separator = f"\n{_SEPARATOR}" if number + 1 < len(completions) else ""
            print_result(f"{each.prompt}{each.text}{separator}")
