"""The command that measures runs."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from tiny_lm.cli.options import Settings, spread
from tiny_lm.cli.report import write_report_beside
from tiny_lm.console import make_console, print_result
from tiny_lm.errors import UserError
from tiny_lm.files import to_json

if TYPE_CHECKING:
    from rich.console import Console

    from tiny_lm.evaluation.evaluate import Evaluation, EvaluationOptions, Subject
    from tiny_lm.evaluation.judge import Judge
    from tiny_lm.evaluation.quality import Progress
    from tiny_lm.inference.request import Generated


_FEW_TOKENS = 200
"""A mean over fewer tokens says nothing, so the table leaves it out."""


class EvalCommand(TyperCommand):
    """Lets ``--generate`` take several beginnings at once."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the words of the command line."""
        return super().parse_args(ctx, spread(args, "--generate"))


def evaluate(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Run folders, or checkpoints inside them.")],
    generate: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT...", help="Also continue these beginnings, given behind RUN."),
    ] = None,
    plot: Annotated[bool, typer.Option("--plot", help="Also draw the training curves anew.")] = False,
    stride: Annotated[
        int | None,
        typer.Option(min=1, help="Slide the window by so many tokens; default: windows side by side, as in training."),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, max=10_000, help="Stories to tell and to measure.")] = 24,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a story.")] = 300,
    temperature: Annotated[float, typer.Option(help="Of the stories; 0 always takes the likeliest token.")] = 0.8,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens of this probability together.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, max=2**32, help="The same seed gives the same stories.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print all figures as JSON instead of the table.")] = False,
    judge: Annotated[
        str | None, typer.Option(metavar="URL", help="Have a model grade the stories: an OpenAI-compatible address.")
    ] = None,
    judge_model: Annotated[str | None, typer.Option(metavar="NAME", help="Which model of that server.")] = None,
    judge_key_env: Annotated[
        str | None, typer.Option(metavar="VARIABLE", help="Environment variable that holds the server's key.")
    ] = None,
    settings: Settings = None,
) -> None:
    """Measure runs: exact validation loss and bits per byte, and the stories they tell.

    Writes evaluation.json into each run folder. Several runs are compared in one table and one picture.
    """
    from tiny_lm.cli.progress import stages
    from tiny_lm.evaluation.evaluate import EvaluationOptions, evaluate_run, open_subject

    options = EvaluationOptions(stride, samples, max_new_tokens, temperature, top_p, seed, tuple(settings or ()))
    options.sampling  # noqa: B018  # refuses what is out of range before anything is read
    grader = _open_judge(judge, judge_model, judge_key_env)
    console = make_console()
    subjects = [open_subject(run, options) for run in runs]
    evaluations, stories = [], []
    failure: UserError | None = None
    for run, subject in zip(runs, subjects, strict=True):
        if len(subjects) > 1:
            console.print(f"evaluating {run}", markup=False)
        with stages(console) as progress:
            evaluation = evaluate_run(subject, options, progress)
            evaluation.save(subject.run)
            if grader and not failure:
                try:
                    evaluation = _grade(grader, subject, evaluation, progress)
                except UserError as error:  # what was measured is told before
                    failure = error
            evaluations.append(evaluation)
            stories.append(_continue(subject, generate or [], options))
        _draw(subject, options, plot, console)
    if as_json:
        _print_json(evaluations, stories)
    elif len(evaluations) == 1:
        _print_rows(evaluations[0])
        _print_stories(evaluations, stories)
    else:
        _print_comparison(evaluations)
        _compare(subjects, evaluations, console)
        _print_stories(evaluations, stories)
    if failure:
        raise failure


def _open_judge(url: str | None, model: str | None, key_variable: str | None) -> "Judge | None":
    """Return the judge that the options name, if they name one, after it has answered."""
    if url is None:
        if model or key_variable:
            raise UserError("--judge-model and --judge-key-env belong to --judge URL, which is missing")
        return None
    if not model:
        raise UserError("--judge needs --judge-model: the name of a model of that server")
    from tiny_lm.evaluation.judge import Judge

    grader = Judge.from_options(url, model, key_variable)
    grader.check_answers()
    return grader


def _grade(judge: "Judge", subject: "Subject", evaluation: "Evaluation", progress: "Progress") -> "Evaluation":
    """Have the stories graded, and add the grades to the run's ``evaluation.json``."""
    from tiny_lm.evaluation.judge import JUDGE_FILE

    def tell(stories: int) -> None:
        progress("asking the judge", stories, len(evaluation.samples))

    pairs = [(story.prompt, story.text) for story in evaluation.samples]
    verdict = judge.grade(pairs, subject.run.folder / JUDGE_FILE, tell)
    graded = evaluation.with_judge(verdict.to_dict())
    graded.save(subject.run)
    return graded


def _continue(subject: "Subject", prompts: list[str], options: "EvaluationOptions") -> "list[Generated]":
    from tiny_lm.evaluation.stories import tell_stories

    return tell_stories(
        subject.generator, prompts, options.sampling, max_new_tokens=options.max_new_tokens, seed=options.seed
    )


def _draw(subject: "Subject", options: "EvaluationOptions", plot: bool, console: "Console") -> None:
    """Draw what belongs to one run, and write its report anew."""
    write_report_beside(subject.run, options.settings)
    if plot:
        from tiny_lm.evaluation.plots import plot_run

        pictures = plot_run(subject.run, _events(subject))
        told = " ".join(map(str, pictures)) or "none, since metrics.jsonl holds no training loss"
        console.print(f"curves: {told}", markup=False)


def _events(subject: "Subject") -> list[dict[str, Any]]:
    from tiny_lm.runs import read_metrics

    return read_metrics(subject.run.metrics) if subject.run.metrics.is_file() else []


# --- printing --------------------------------------------------------------------------------------------------------


def _print_json(evaluations: "Sequence[Evaluation]", stories: "Sequence[list[Generated]]") -> None:
    """Print one object for one run, a list of them for several."""
    found = [
        {**evaluation.to_dict(), "generated": [{"prompt": story.prompt, "text": story.text} for story in told]}
        for evaluation, told in zip(evaluations, stories, strict=True)
    ]
    print_result(to_json(found if len(found) > 1 else found[0], indent=2))


def _print_rows(evaluation: "Evaluation") -> None:
    """Print the figures of one run, a line for each."""
    stream, quality = evaluation.stream, evaluation.quality
    copied, unseen = quality.copied, quality.copied.validation
    read = {
        "blocked": f"blocked: windows of {stream.window} tokens side by side",
        "sliding": f"sliding: windows of {stream.window} tokens, {stream.stride} of them new: "
        f"each token has {stream.window - stream.stride} or more before it",
    }[stream.method]
    rows = {
        "run": evaluation.run,
        "checkpoint": f"{Path(evaluation.checkpoint).name}, step {evaluation.step:,}",
        "validation": f"{stream.path}: {stream.tokens:,} tokens, {stream.bytes:,} bytes",
        "read": f"{read}, in {stream.precision}",
        "val loss": f"{evaluation.loss:.4f} nats per token",
        "perplexity": f"{evaluation.perplexity:.3f}",
        "bits per byte": f"{evaluation.bits_per_byte:.4f}",
        "loss by context": "  ".join(
            f"{part.first}-{part.last}: {part.loss:.3f}" if part.last > part.first else f"{part.first}: {part.loss:.3f}"
            for part in evaluation.position_loss
            if part.tokens >= _FEW_TOKENS  # with sliding windows only a file's first one has targets near its beginning
        ),
        "stories": f"{quality.samples} from {quality.prompts} beginnings, temperature {quality.temperature:g}, "
        f"at most {quality.max_new_tokens} tokens, seed {quality.seed}",
        "ended themselves": f"{quality.ended:.0%}",
        "tokens": f"mean {quality.length.mean:.0f}, median {quality.length.median:g}, "
        f"{quality.length.min} to {quality.length.max}",
        "distinct 1-4": "  ".join(f"{share:.3f}" for share in quality.distinct.values()),
        "repeated 2-4": "  ".join(f"{share:.3f}" for share in quality.repeated.values()),
        "longest copy": f"{copied.longest} tokens of the training text, mean {copied.mean_longest:.1f}"
        + (f" (unseen stories: {unseen.longest}, mean {unseen.mean_longest:.1f})" if unseen else ""),
        "": to_json(copied.text),
        "copied": f"{copied.share:.1%} of the tokens, in copies of {copied.long} or more"
        + (f" (unseen stories: {unseen.share:.1%})" if unseen else ""),
        "invented words": f"{quality.invented_words.share:.1%}  {' '.join(quality.invented_words.examples)}",
        **({"judge": _judged(evaluation.judge)} if evaluation.judge else {}),
        "written": str(Path(evaluation.run) / "evaluation.json"),
    }
    for name, value in rows.items():
        print(f"{name:<17} {value}".rstrip())


def _judged(judge: dict[str, Any]) -> str:
    grades = "  ".join(f"{name} {grade:.1f}" for name, grade in judge["grades"].items())
    return f"{grades}  (of 10; {judge['graded']} of {judge['stories']} stories, by {judge['model']})"


def _print_comparison(evaluations: "Sequence[Evaluation]") -> None:
    """Print a row for each run."""
    columns = {
        "run": [evaluation.run for evaluation in evaluations],
        "step": [f"{evaluation.step:,}" for evaluation in evaluations],
        "val loss": [f"{evaluation.loss:.4f}" for evaluation in evaluations],
        "perplexity": [f"{evaluation.perplexity:.2f}" for evaluation in evaluations],
        "bits/byte": [f"{evaluation.bits_per_byte:.4f}" for evaluation in evaluations],
        "distinct-3": [f"{evaluation.quality.distinct['3']:.3f}" for evaluation in evaluations],
        "repeated-3": [f"{evaluation.quality.repeated['3']:.3f}" for evaluation in evaluations],
        "ended": [f"{evaluation.quality.ended:.0%}" for evaluation in evaluations],
        "copy": [f"{evaluation.quality.copied.longest}" for evaluation in evaluations],
        "invented": [f"{evaluation.quality.invented_words.share:.1%}" for evaluation in evaluations],
    }
    for name in ("grammar", "creativity", "consistency", "plot"):
        if any(evaluation.judge for evaluation in evaluations):
            columns[name] = [f"{e.judge['grades'][name]:.1f}" if e.judge else "" for e in evaluations]
    widths = {name: max(len(name), *map(len, cells)) for name, cells in columns.items()}
    for row in zip(*([name, *cells] for name, cells in columns.items()), strict=True):
        cells = [cell.rjust(width) for cell, width in zip(row, widths.values(), strict=True)]
        print("  ".join([row[0].ljust(widths["run"]), *cells[1:]]).rstrip())


def _compare(subjects: "Sequence[Subject]", evaluations: "Sequence[Evaluation]", console: "Console") -> None:
    """Draw all runs in one picture, and say what their figures do not tell."""
    from tiny_lm.evaluation.plots import compare_runs

    names = [subject.run.name for subject in subjects]
    if len(set(names)) < len(names):
        names = [str(subject.checkpoint) for subject in subjects]
    curves = {name: _events(subject) for name, subject in zip(names, subjects, strict=True)}
    figures = {name: evaluation.bits_per_byte for name, evaluation in zip(names, evaluations, strict=True)}
    path = subjects[0].run.folder.parent / "comparison.png"
    try:
        console.print(f"picture: {compare_runs(curves, figures, path)}", markup=False)
    except UserError as error:  # the folder around a run may be read-only
        console.print(f"no picture: {error}", markup=False)
    if len({subject.val.metadata.tokenizer_hash for subject in subjects}) > 1:
        console.print(
            "the runs have different tokenizers: compare bits per byte; loss, perplexity and copies count tokens, "
            "which differ in length"
        )
    if len({evaluation.stream.bytes for evaluation in evaluations}) > 1:
        console.print("the runs were validated on different texts: their figures compare only roughly")


def _print_stories(evaluations: "Sequence[Evaluation]", stories: "Sequence[list[Generated]]") -> None:
    for evaluation, told in zip(evaluations, stories, strict=True):
        for number, story in enumerate(told, start=1):
            print(f"\n--- {number}{f' {evaluation.run}' if len(evaluations) > 1 else ''} ".ljust(80, "-"))
            print(story.prompt + story.text)
    sys.stdout.flush()
