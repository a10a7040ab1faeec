"""The page: all sections rendered with the templates in ``templates/``."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from tiny_lm.errors import UserError
from tiny_lm.evaluation.report.artifacts import RunArtifacts, load_artifacts
from tiny_lm.evaluation.report.attention import AttentionMaps, map_attention
from tiny_lm.evaluation.report.charts import Chart, Line, build_chart
from tiny_lm.evaluation.report.compare import compare_bits, find_profile
from tiny_lm.evaluation.report.curves import training_charts
from tiny_lm.evaluation.report.overview import (
    command_line,
    cost_rows,
    data_rows,
    git_line,
    headline,
    key_metrics,
    machine_rows,
    recipe_rows,
    view_model,
)
from tiny_lm.evaluation.report.samples import choose_steps, read_sampled_steps
from tiny_lm.evaluation.report.surprise import measure_tokens
from tiny_lm.evaluation.report.vocabulary import view_tokenizer
from tiny_lm.evaluation.results import Evaluation
from tiny_lm.files import write_text
from tiny_lm.pages import shared_script, shared_style, text
from tiny_lm.pages.surprise import LEVELS, TokenSurprise
from tiny_lm.runs import Run

if TYPE_CHECKING:
    from jinja2 import Environment

_TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class AnalyzedText:
    """One text with the model's surprise and attention on it."""

    title: str
    """Names the text, for readers."""
    tokens: list[TokenSurprise] | None
    attention: AttentionMaps
    attention_tokens: list[str]

    @property
    def mean_bits(self) -> float:
        """Mean surprise per token."""
        return fmean(token.bits for token in self.tokens or [])


def write_report(run: Run, settings: Sequence[str] = ()) -> Path:
    """Write ``report.html`` into a run folder, during or after training, and return its path.

    Where the folder lacks something, the page says so.

    Args:
        run: the run folder.
        settings: overrides of its data config, such as ``data.val_path=...`` for a stream that was moved.

    Raises:
        UserError: ``run.json`` is damaged, a setting is unknown, or the page cannot be written.
    """
    write_text(run.report, _render(load_artifacts(run, settings)))
    return run.report


@cache
def _environment() -> "Environment":
    """Return the Jinja environment; it caches compiled templates."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: (
            text.visible(value) if type(value) is str else value
        ),  # our own markup is of another type
    )
    environment.filters.update(
        number=text.number, fixed=text.fixed, short=text.short, percent=text.percent, visible=text.visible
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "sort_keys": False}
    return environment


def _render(artifacts: RunArtifacts) -> str:
    assets = {
        "style": shared_style() + (_TEMPLATES / "report.css").read_text("utf-8"),
        "script": shared_script() + (_TEMPLATES / "report.js").read_text("utf-8"),
    }
    return _environment().get_template("report.html").render(**_views(artifacts), **assets)


def _views(artifacts: RunArtifacts) -> dict[str, Any]:
    """Return the variables of the templates."""
    model = view_model(artifacts)
    steps = read_sampled_steps(artifacts.samples)
    analyzed = _analyze_text(artifacts)
    charts = training_charts(artifacts.events, _epoch(artifacts))
    position = _position_chart(artifacts.evaluation)
    return {
        "title": artifacts.run.name,
        "written": f"{datetime.now(timezone.utc):%d %B %Y, %H:%M} UTC",
        "status": artifacts.text("status"),
        "headline": headline(artifacts, model),
        "key_metrics": key_metrics(artifacts, model),
        "validated": artifacts.number("metrics", "val_loss") is not None,
        "model": model,
        "data_rows": data_rows(artifacts),
        "recipe_rows": recipe_rows(artifacts),
        "charts": charts,
        "profile": find_profile(artifacts),
        "bars": compare_bits(artifacts),
        "sampled_steps": choose_steps(steps),
        "num_sampled_steps": len(steps),
        "analyzed": analyzed,
        "levels": LEVELS,
        "evaluation": artifacts.evaluation,
        "position_chart": position,
        "tokenizer": view_tokenizer(artifacts),
        "cost_rows": cost_rows(artifacts),
        "machine_rows": machine_rows(artifacts),
        "git": git_line(artifacts),
        "command": command_line(artifacts),
        "configs": artifacts.config_texts,
        "checkpoint": artifacts.checkpoint.name if artifacts.checkpoint else "",
        "step": artifacts.model.step if artifacts.model else None,
        "missing": artifacts.missing,
        "data": _page_data([*charts, *([position] if position else [])], analyzed),
    }


def _epoch(artifacts: RunArtifacts) -> float | None:
    """Return the number of optimizer steps per epoch."""
    tokens, step = artifacts.number("train_tokens"), artifacts.number("tokens_per_step")
    return tokens / step if tokens and step else None


def _analyze_text(artifacts: RunArtifacts) -> AnalyzedText | None:
    """Run the model on a validation document or, if the stream is gone, on its last sample."""
    if artifacts.model is None or artifacts.tokenizer is None:
        return None
    model, tokenizer = artifacts.model.model, artifacts.tokenizer
    document = artifacts.streams.document if artifacts.streams else None
    if document is not None:
        ids = document.ids
        title = f"validation document {document.number}" + ("" if document.is_whole else " (its beginning)")
        tokens = measure_tokens(model, tokenizer, ids)
    else:
        steps = read_sampled_steps(artifacts.samples)
        if not steps:
            return None
        sample = steps[-1].samples[0]
        try:
            ids = tokenizer.encode(sample.prompt + sample.completion, bos=True)[: artifacts.model.config.context_length]
        except UserError:
            return None
        title, tokens = "the model's own sample", None
    maps = map_attention(model, ids)
    return AnalyzedText(title, tokens, maps, [tokenizer.token_text(i) for i in maps.ids])


def _position_chart(evaluation: Evaluation | None) -> Chart | None:
    """Chart the loss by position in the context, each bucket at its middle."""
    if evaluation is None:
        return None
    curve = [((part.first + part.last) // 2, part.loss) for part in evaluation.position_loss if part.tokens]
    line = Line("loss", curve, "val", marks=len(curve) <= 40)
    return build_chart(
        "position", "Loss by position in the context", "nats per token", [line], x_name="position", log_x=True
    )


def _page_data(charts: list[Chart], analyzed: AnalyzedText | None) -> dict[str, Any]:
    """Return the data of the page's script: chart points, surprise and attention."""
    data: dict[str, Any] = {"charts": {chart.key: chart.data for chart in charts}, "tokens": [], "attention": None}
    if analyzed is None:
        return data
    data["tokens"] = [token.data() for token in analyzed.tokens or []]
    data["attention"] = {
        "tokens": [text.visible(token) for token in analyzed.attention_tokens],
        "clearest": analyzed.attention.clearest,
        "maps": [[head.layer, head.head, head.habit, head.data] for head in analyzed.attention.maps],
    }
    return data
