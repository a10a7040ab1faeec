"""The command that writes text with a trained model."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tiny_lm.console import print_message, print_result
from tiny_lm.errors import UserError
from tiny_lm.files import to_json

if TYPE_CHECKING:
    from tiny_lm.inference import Completion, GenerationConfig, TextGenerator

_MOST_SAMPLES = 1000
_PROMPT_BYTES = 16 * 2**20
_SEPARATOR = "---"
_LINE_END = re.compile("\r\n|\n|\r")


def generate(
    run: Annotated[
        str | None, typer.Argument(metavar="RUN", help="A run folder, a checkpoint inside one, or an exported folder.")
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="How the text begins; may be repeated.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="Prompts, one a line (\\n in a line is a line break); - reads standard input.")
    ] = None,
    num_samples: Annotated[int, typer.Option(min=1, max=_MOST_SAMPLES, help="Texts for each prompt.")] = 1,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "--max-tokens", help="Most tokens to write.")
    ] = 300,
    min_new_tokens: Annotated[int, typer.Option(help="Do not end before so many.")] = 0,
    temperature: Annotated[
        float, typer.Option(help="0 always takes the likeliest token; higher is more surprising.")
    ] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Draw from the k likeliest tokens only; 0: from all.")] = None,
    top_p: Annotated[
        float, typer.Option(help="Draw from the likeliest tokens that together have this probability.")
    ] = 1.0,
    min_p: Annotated[
        float, typer.Option(help="Draw from tokens with this share of the likeliest one's probability.")
    ] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: avoid tokens that stand in the text.")] = 1.0,
    presence_penalty: Annotated[float, typer.Option(help="Taken off the logits of tokens written before.")] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(help="The same, once for each time.")] = 0.0,
    stop: Annotated[list[str] | None, typer.Option(help="End before this string; may be repeated.")] = None,
    stop_token: Annotated[list[str] | None, typer.Option(help="End at this special token; may be repeated.")] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**62, help="The same seed gives the same text; sample i has seed + i.")
    ] = None,
    add_bos: Annotated[bool, typer.Option(help="Begin as training texts do, with the beginning-of-text token.")] = True,
    strict: Annotated[
        bool, typer.Option(help="Refuse a prompt longer than the context; else its end is read.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object for each text, one a line.")] = False,
    interactive: Annotated[
        bool, typer.Option("--interactive", help="A session: type beginnings, get stories.")
    ] = False,
    checkpoint: Annotated[
        Path | None, typer.Option(help="A .ckpt file or a folder of safetensors, beside --tokenizer.")
    ] = None,
    model_config: Annotated[str | None, typer.Option(help="Must be the config that the checkpoint carries.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Tokenizer folder, or any file in it.")] = None,
    tokenizer_dir: Annotated[Path | None, typer.Option(help="Tokenizer folder.")] = None,
    tokenizer_config: Annotated[str | None, typer.Option(help="Must name the kind of the tokenizer folder.")] = None,
    device: Annotated[str | None, typer.Option(help="Where to run: cpu, cuda, mps.")] = None,
    compile_step: Annotated[
        bool,
        typer.Option(
            "--compile", help="Compile first (some seconds): a single text on a CPU is up to 3 times as fast."
        ),
    ] = False,
) -> None:
    """Continue a prompt with a trained model."""
    from tiny_lm.inference import GenerationConfig

    request = GenerationConfig(
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        stop=tuple(stop or ()),
        stop_tokens=tuple(stop_token or ()),
        add_bos=add_bos,
        strict=strict,
    )
    if interactive and (as_json or num_samples > 1):
        raise UserError("--interactive tells one story at a time, as text: leave out --json and --num-samples")
    prompts = [*(prompt or ()), *(_read_prompts(prompt_file) if prompt_file else ())]
    generator = _open(run, checkpoint, model_config, tokenizer_dir or tokenizer, tokenizer_config, device)
    if compile_step:
        print_message("compiling the decoding step, which takes some seconds")
        generator.compile()
    if interactive:
        from tiny_lm.cli.interactive import Session

        Session(generator, request, seed).run(prompts)
        return
    prompts = prompts or ["Once upon a time"]
    for text in prompts:
        tell_dropped(generator, text, request)
    if len(prompts) == num_samples == 1 and not as_json:
        _write(prompts[0], generator, request, seed)
        return
    seeds = None if seed is None else [seed + number for _ in prompts for number in range(num_samples)]
    repeated = [text for text in prompts for _ in range(num_samples)]
    _print_all(generator.generate_batch(repeated, request, seed=seeds), seeds, as_json)


def _open(
    run: str | None,
    checkpoint: Path | None,
    model_config: str | None,
    tokenizer: Path | None,
    tokenizer_config: str | None,
    device: str | None,
) -> "TextGenerator":
    """Load a run, or a checkpoint and a tokenizer that are given one by one."""
    from tiny_lm.inference import TextGenerator
    from tiny_lm.model.config import load_model_config
    from tiny_lm.tokenizer import TokenizerConfig

    if (run is None) == (checkpoint is None):
        raise UserError("name a run folder, or a checkpoint with --checkpoint")
    if run is not None:
        return TextGenerator.from_path(run, device=device)
    assert checkpoint is not None
    expected = load_model_config(model_config) if model_config else None
    named = TokenizerConfig.from_yaml(tokenizer_config) if tokenizer_config else None
    folder = tokenizer or (Path(named.output_dir) if named else None)
    if checkpoint.suffix != ".ckpt":
        generator = TextGenerator.from_export(checkpoint, tokenizer_path=folder, device=device)
        if expected is not None and expected != generator.model.config:
            raise UserError(f"{checkpoint}: is another model than {model_config} says")
    elif folder is None:
        raise UserError("name the tokenizer with --tokenizer, --tokenizer-dir or --tokenizer-config")
    else:
        generator = TextGenerator.from_checkpoint(checkpoint, folder, model_config=expected, device=device)
    if named and named.type != generator.tokenizer.kind:
        raise UserError(f"{tokenizer_config}: is of type {named.type}, but {folder} holds {generator.tokenizer.kind}")
    return generator


def _read_prompts(file: Path) -> list[str]:
    """Read one prompt a line; empty lines are none. Only line ends end a line, not U+2028 or a form feed."""
    name = "standard input" if str(file) == "-" else str(file)
    try:
        if str(file) == "-":
            data = sys.stdin.buffer.read(_PROMPT_BYTES + 1)
        else:
            with file.open("rb") as stream:
                data = stream.read(_PROMPT_BYTES + 1)
    except OSError as error:
        raise UserError(f"{name}: could not be read ({error.strerror or error})") from error
    if len(data) > _PROMPT_BYTES:
        raise UserError(f"{name}: larger than {_PROMPT_BYTES // 2**20} MiB; divide it into several prompt files")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        problem = f"is not UTF-8 text (byte {error.start} is invalid)"
        raise UserError(f"{name}: {problem}; convert it, for example with iconv") from None
    prompts = [line.replace("\\n", "\n") for line in _LINE_END.split(text) if line.strip()]
    if not prompts:
        raise UserError(f"{name}: holds no prompt; write one on each line")
    return prompts


def tell_dropped(generator: "TextGenerator", prompt: str, request: "GenerationConfig") -> None:
    """Say which part of a prompt does not fit into the context."""
    dropped = "" if request.strict else generator.dropped(prompt, add_bos=request.add_bos)
    if dropped:
        shown = dropped if len(dropped) <= 60 else f"{dropped[:30]}...{dropped[-30:]}"
        context = generator.model.config.context_length
        print_message(
            f"the prompt is longer than the context of {context:,} tokens: its first {len(dropped):,} characters "
            f"are not read ({shown!r})"
        )


def _write(prompt: str, generator: "TextGenerator", request: "GenerationConfig", seed: int | None) -> None:
    """Print prompt and continuation, and nothing more, as it is made."""
    pieces = generator.stream(prompt, request, seed=seed)
    print_result(prompt, end="")
    for piece in pieces:
        print_result(piece, end="")
    print_result()


def _print_all(texts: Sequence["Completion"], seeds: Sequence[int] | None, as_json: bool) -> None:
    """Print many texts, with a line between them, or as JSON lines."""
    for number, text in enumerate(texts):
        if as_json:
            facts = {"tokens": len(text.ids), "finish_reason": text.finish_reason, "seed": seeds and seeds[number]}
            print_result(to_json({"prompt": text.prompt, "text": text.text, **facts}))
        else:
            print_result(f"{text.prompt}{text.text}" + (f"\n{_SEPARATOR}" if number + 1 < len(texts) else ""))
