"""The command ``tiny-lm eval``."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from tiny_lm.cli.options import Settings, expand_multi_value
from tiny_lm.cli.report import write_report_beside
from tiny_lm.console import make_console, print_result
from tiny_lm.errors import UserError
from tiny_lm.files import to_json

if TYPE_CHECKING:
    from rich.console import Console

    from tiny_lm.evaluation.evaluate import EvaluationOptions, LoadedRun
    from tiny_lm.evaluation.judge import Judge
    from tiny_lm.evaluation.quality import OnProgress
    from tiny_lm.evaluation.results import Evaluation
    from tiny_lm.inference.request import Completion


_MIN_TOKENS = 200
"""A mean over fewer tokens is too noisy for the table."""


class EvalCommand(TyperCommand):
    """Lets ``--generate`` take several prompts."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the command line."""
        return super().parse_args(ctx, expand_multi_value(args, "--generate"))


def evaluate(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Run folders, or checkpoints inside them.")],
    generate: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT...", help="Also complete these prompts; give them after RUN."),
    ] = None,
    plot: Annotated[bool, typer.Option("--plot", help="Also plot the training curves again.")] = False,
    stride: Annotated[
        int | None,
        typer.Option(
            min=1, help="Score overlapping sequences, this many tokens apart; default: adjacent ones, as in training."
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, max=10_000, help="Number of samples to generate and measure.")] = 24,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum tokens per sample.")] = 300,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy.")] = 0.8,
    top_p: Annotated[
        float, typer.Option(help="Sample from the smallest set of tokens with this total probability.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, max=2**32, help="The same seed gives the same samples.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print all results as JSON instead of the table.")] = False,
    judge: Annotated[
        str | None, typer.Option(metavar="URL", help="Let a model behind this OpenAI-compatible URL grade the samples.")
    ] = None,
    judge_model: Annotated[str | None, typer.Option(metavar="NAME", help="Model name on that server.")] = None,
    judge_key_env: Annotated[
        str | None, typer.Option(metavar="VARIABLE", help="Environment variable with the server's API key.")
    ] = None,
    settings: Settings = None,
) -> None:
    """Measure runs: exact validation loss, bits per byte, and the quality of samples.

    Writes evaluation.json into each run folder. Several runs are compared in one table and one plot.
    """
    from tiny_lm.cli.progress import stages
    from tiny_lm.evaluation.evaluate import EvaluationOptions, evaluate_run, load_run

    options = EvaluationOptions(stride, samples, max_new_tokens, temperature, top_p, seed, tuple(settings or ()))
    options.sampling  # noqa: B018  # rejects values out of range before anything is read
    grader = _open_judge(judge, judge_model, judge_key_env)
    console = make_console()
    loaded_runs = [load_run(run, options) for run in runs]
    evaluations, completions = [], []
    failure: UserError | None = None
    for run, loaded in zip(runs, loaded_runs, strict=True):
        if len(loaded_runs) > 1:
            console.print(f"evaluating {run}", markup=False)
        with stages(console) as on_progress:
            evaluation = evaluate_run(loaded, options, on_progress)
            evaluation.save(loaded.run)
            if grader and not failure:
                try:
                    evaluation = _grade(grader, loaded, evaluation, on_progress)
                except UserError as error:  # print the measurements first
                    failure = error
            evaluations.append(evaluation)
            completions.append(_complete(loaded, generate or [], options))
        _write_outputs(loaded, options, plot, console)
    if as_json:
        _print_json(evaluations, completions)
    elif len(evaluations) == 1:
        _print_rows(evaluations[0])
        _print_completions(evaluations, completions)
    else:
        _print_comparison(evaluations)
        _compare(loaded_runs, evaluations, console)
        _print_completions(evaluations, completions)
    if failure:
        raise failure


def _open_judge(url: str | None, model: str | None, key_variable: str | None) -> "Judge | None":
    """Return the judge named by the options, if any, after checking that its server responds."""
    if url is None:
        if model or key_variable:
            raise UserError("--judge-model and --judge-key-env belong to --judge URL, which is missing")
        return None
    if not model:
        raise UserError("--judge needs --judge-model: the name of a model on that server")
    from tiny_lm.evaluation.judge import Judge

    grader = Judge.from_options(url, model, key_variable)
    grader.check_reachable()
    return grader


def _grade(judge: "Judge", loaded: "LoadedRun", evaluation: "Evaluation", on_progress: "OnProgress") -> "Evaluation":
    """Grade the samples and add the grades to the run's ``evaluation.json``."""
    from tiny_lm.evaluation.judge import JUDGE_FILE

    pairs = [(sample.prompt, sample.text) for sample in evaluation.samples]
    result = judge.grade(
        pairs, loaded.run.folder / JUDGE_FILE, lambda count: on_progress("asking the judge", count, len(pairs))
    )
    graded = evaluation.with_judge(result.to_dict())
    graded.save(loaded.run)
    return graded


def _complete(loaded: "LoadedRun", prompts: list[str], options: "EvaluationOptions") -> "list[Completion]":
    from tiny_lm.evaluation.generation import generate_samples

    return generate_samples(
        loaded.generator, prompts, options.sampling, max_new_tokens=options.max_new_tokens, seed=options.seed
    )


def _write_outputs(loaded: "LoadedRun", options: "EvaluationOptions", plot: bool, console: "Console") -> None:
    """Update a run's report and, if asked for, its plots."""
    write_report_beside(loaded.run, options.settings)
    if plot:
        from tiny_lm.evaluation.plots import plot_run

        paths = " ".join(map(str, plot_run(loaded.run, _events(loaded))))
        console.print(f"curves: {paths or 'none; metrics.jsonl has no training loss yet'}", markup=False)


def _events(loaded: "LoadedRun") -> list[dict[str, Any]]:
    from tiny_lm.runs import read_metrics

    return read_metrics(loaded.run.metrics) if loaded.run.metrics.is_file() else []


# --- printing --------------------------------------------------------------------------------------------------------


def _print_json(evaluations: "Sequence[Evaluation]", completions: "Sequence[list[Completion]]") -> None:
    """Print one object for one run, a list of them for several."""
    results = [
        {**evaluation.to_dict(), "generated": [{"prompt": each.prompt, "text": each.text} for each in generated]}
        for evaluation, generated in zip(evaluations, completions, strict=True)
    ]
    print_result(to_json(results if len(results) > 1 else results[0], indent=2))


def _print_rows(evaluation: "Evaluation") -> None:
    """Print the results of one run, one per line."""
    stream, quality = evaluation.stream, evaluation.quality
    overlap, unseen = quality.copied, quality.copied.validation
    method = {
        "blocked": f"blocked: adjacent sequences of {stream.window} tokens",
        "sliding": f"sliding: sequences of {stream.window} tokens, {stream.stride} of them new: "
        f"at least {stream.window - stream.stride} tokens of context",
    }[stream.method]
    rows = {
        "run": evaluation.run,
        "checkpoint": f"{Path(evaluation.checkpoint).name}, step {evaluation.step:,}",
        "validation": f"{stream.path}: {stream.tokens:,} tokens, {stream.bytes:,} bytes",
        "method": f"{method}, in {stream.precision}",
        "val loss": f"{evaluation.loss:.4f} nats per token",
        "perplexity": f"{evaluation.perplexity:.3f}",
        "bits per byte": f"{evaluation.bits_per_byte:.4f}",
        "loss by context": "  ".join(
            f"{part.first}-{part.last}: {part.loss:.3f}" if part.last > part.first else f"{part.first}: {part.loss:.3f}"
            for part in evaluation.position_loss
            if part.tokens >= _MIN_TOKENS  # with a stride only a file's first sequence has early targets
        ),
        "samples": f"{quality.samples} for {quality.prompts} prompts, temperature {quality.temperature:g}, "
        f"at most {quality.max_new_tokens} tokens, seed {quality.seed}",
        "ended with eos": f"{quality.ended:.0%}",
        "tokens": f"mean {quality.length.mean:.0f}, median {quality.length.median:g}, "
        f"{quality.length.min} to {quality.length.max}",
        "distinct 1-4": "  ".join(f"{share:.3f}" for share in quality.distinct.values()),
        "repeated 2-4": "  ".join(f"{share:.3f}" for share in quality.repeated.values()),
        "verbatim overlap": f"{overlap.longest} tokens of the training text, mean {overlap.mean_longest:.1f}"
        + (f" (unseen text: {unseen.longest}, mean {unseen.mean_longest:.1f})" if unseen else ""),
        "": to_json(overlap.text),
        "memorized": f"{overlap.share:.1%} of the tokens, in matches of {overlap.long} or more"
        + (f" (unseen text: {unseen.share:.1%})" if unseen else ""),
        "invented words": f"{quality.invented_words.share:.1%}  {' '.join(quality.invented_words.examples)}",
        **({"judge": _describe_grades(evaluation.judge)} if evaluation.judge else {}),
        "written": str(Path(evaluation.run) / "evaluation.json"),
    }
    for name, value in rows.items():
        print(f"{name:<17} {value}".rstrip())


def _describe_grades(judge: dict[str, Any]) -> str:
    grades = "  ".join(f"{name} {grade:.1f}" for name, grade in judge["grades"].items())
    return f"{grades}  (of 10; {judge['graded']} of {judge['stories']} samples, by {judge['model']})"


def _print_comparison(evaluations: "Sequence[Evaluation]") -> None:
    """Print one row per run."""
    columns = {
        "run": [evaluation.run for evaluation in evaluations],
        "step": [f"{evaluation.step:,}" for evaluation in evaluations],
        "val loss": [f"{evaluation.loss:.4f}" for evaluation in evaluations],
        "perplexity": [f"{evaluation.perplexity:.2f}" for evaluation in evaluations],
        "bits/byte": [f"{evaluation.bits_per_byte:.4f}" for evaluation in evaluations],
        "distinct-3": [f"{evaluation.quality.distinct['3']:.3f}" for evaluation in evaluations],
        "repeated-3": [f"{evaluation.quality.repeated['3']:.3f}" for evaluation in evaluations],
        "ended": [f"{evaluation.quality.ended:.0%}" for evaluation in evaluations],
        "overlap": [f"{evaluation.quality.copied.longest}" for evaluation in evaluations],
        "invented": [f"{evaluation.quality.invented_words.share:.1%}" for evaluation in evaluations],
    }
    for name in ("grammar", "creativity", "consistency", "plot"):
        if any(evaluation.judge for evaluation in evaluations):
            columns[name] = [f"{e.judge['grades'][name]:.1f}" if e.judge else "" for e in evaluations]
    widths = {name: max(len(name), *map(len, cells)) for name, cells in columns.items()}
    for row in zip(*([name, *cells] for name, cells in columns.items()), strict=True):
        cells = [cell.rjust(width) for cell, width in zip(row, widths.values(), strict=True)]
        print("  ".join([row[0].ljust(widths["run"]), *cells[1:]]).rstrip())


def _compare(loaded_runs: "Sequence[LoadedRun]", evaluations: "Sequence[Evaluation]", console: "Console") -> None:
    """Plot all runs together, and warn where their results are not comparable."""
    from tiny_lm.evaluation.plots import compare_runs

    names = [loaded.run.name for loaded in loaded_runs]
    if len(set(names)) < len(names):
        names = [str(loaded.checkpoint) for loaded in loaded_runs]
    curves = {name: _events(loaded) for name, loaded in zip(names, loaded_runs, strict=True)}
    bits_per_byte = {name: evaluation.bits_per_byte for name, evaluation in zip(names, evaluations, strict=True)}
    path = loaded_runs[0].run.folder.parent / "comparison.png"
    try:
        console.print(f"plot: {compare_runs(curves, bits_per_byte, path)}", markup=False)
    except UserError as error:  # the parent folder may be read-only
        console.print(f"no plot: {error}", markup=False)
    if len({loaded.val.metadata.tokenizer_hash for loaded in loaded_runs}) > 1:
        console.print(
            "the runs have different tokenizers: compare bits per byte; loss, perplexity and verbatim overlap count "
            "tokens, which differ in length"
        )
    if len({evaluation.stream.bytes for evaluation in evaluations}) > 1:
        console.print("the runs were validated on different texts: their results are only roughly comparable")


def _print_completions(evaluations: "Sequence[Evaluation]", completions: "Sequence[list[Completion]]") -> None:
    for evaluation, generated in zip(evaluations, completions, strict=True):
        for number, each in enumerate(generated, start=1):
            print(f"\n--- {number}{f' {evaluation.run}' if len(evaluations) > 1 else ''} ".ljust(80, "-"))
            print(each.prompt + each.text)
    sys.stdout.flush()
