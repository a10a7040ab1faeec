"""The page: every section's view, put into the templates that lie beside this file."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from tiny_lm.errors import UserError
from tiny_lm.evaluation.report.attention import AttentionMaps, map_attention
from tiny_lm.evaluation.report.charts import Chart, Line, draw
from tiny_lm.evaluation.report.compare import compare_bits, find_profile
from tiny_lm.evaluation.report.curves import training_charts
from tiny_lm.evaluation.report.material import Material, gather
from tiny_lm.evaluation.report.overview import (
    command_line,
    cost_rows,
    data_rows,
    figures,
    git_line,
    headline,
    machine_rows,
    recipe_rows,
    view_model,
)
from tiny_lm.evaluation.report.results import Evaluation
from tiny_lm.evaluation.report.samples import choose_moments, read_moments
from tiny_lm.evaluation.report.surprise import measure_tokens
from tiny_lm.evaluation.report.vocabulary import view_tokenizer
from tiny_lm.files import write_text
from tiny_lm.pages import shared_script, shared_style, text
from tiny_lm.pages.surprise import LEVELS, TokenSurprise
from tiny_lm.runs import Run

if TYPE_CHECKING:
    from jinja2 import Environment

_TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class ReadStory:
    """What the model made of one story: None where there was none to read."""

    title: str
    tokens: list[TokenSurprise] | None
    attention: AttentionMaps
    attention_tokens: list[str]

    @property
    def mean_bits(self) -> float:
        """Mean surprise at a token."""
        return fmean(token.bits for token in self.tokens or [])


def write_report(run: Run, settings: Sequence[str] = ()) -> Path:
    """Write ``report.html`` into the folder of a run, in training or at its end, and return its path.

    What the folder lacks is left out of the page, which says so.

    Args:
        run: the run folder.
        settings: overrides of its data config, such as ``data.val_path=...`` for a stream that was moved.

    Raises:
        UserError: ``run.json`` is damaged, a setting is unknown, or the page cannot be written.
    """
    write_text(run.report, _render(gather(run, settings)))
    return run.report


@cache
def _environment() -> "Environment":
    """Return what reads the templates and keeps them compiled."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: text.visible(value) if type(value) is str else value,  # markup of our own stays
    )
    environment.filters.update(
        number=text.number, fixed=text.fixed, short=text.short, percent=text.percent, visible=text.visible
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "sort_keys": False}
    return environment


def _render(material: Material) -> str:
    own = {
        "style": shared_style() + (_TEMPLATES / "report.css").read_text("utf-8"),
        "script": shared_script() + (_TEMPLATES / "report.js").read_text("utf-8"),
    }
    return _environment().get_template("report.html").render(**_views(material), **own)


def _views(material: Material) -> dict[str, Any]:
    """Return what the templates name."""
    model = view_model(material)
    moments = read_moments(material.samples)
    story = _read_story(material)
    charts = training_charts(material.events, _epoch(material))
    position = _position_chart(material.evaluation)
    return {
        "title": material.run.name,
        "written": f"{datetime.now(timezone.utc):%d %B %Y, %H:%M} UTC",
        "status": material.text("status"),
        "headline": headline(material, model),
        "figures": figures(material, model),
        "validated": material.number("metrics", "val_loss") is not None,
        "model": model,
        "data_rows": data_rows(material),
        "recipe_rows": recipe_rows(material),
        "charts": charts,
        "profile": find_profile(material),
        "bars": compare_bits(material),
        "moments": choose_moments(moments),
        "moments_in_all": len(moments),
        "story": story,
        "levels": LEVELS,
        "evaluation": material.evaluation,
        "position_chart": position,
        "tokenizer": view_tokenizer(material),
        "cost_rows": cost_rows(material),
        "machine_rows": machine_rows(material),
        "git": git_line(material),
        "command": command_line(material),
        "configs": material.config_texts,
        "checkpoint": material.checkpoint.name if material.checkpoint else "",
        "step": material.model.step if material.model else None,
        "missing": material.missing,
        "data": _page_data([*charts, *([position] if position else [])], story),
    }


def _epoch(material: Material) -> float | None:
    """Return the optimizer steps in which the training text is read once."""
    tokens, step = material.number("train_tokens"), material.number("tokens_per_step")
    return tokens / step if tokens and step else None


def _read_story(material: Material) -> ReadStory | None:
    """Let the model read a validation story or, where the stream is gone, the last one that it told itself."""
    if material.model is None or material.tokenizer is None:
        return None
    network, tokenizer = material.model.model, material.tokenizer
    found = material.streams.story if material.streams else None
    if found is not None:
        ids, title = found.ids, f"validation story {found.number}" + ("" if found.is_whole else " (its beginning)")
        tokens = measure_tokens(network, tokenizer, ids)
    else:
        moments = read_moments(material.samples)
        if not moments:
            return None
        told = moments[-1].stories[0]
        try:
            ids = tokenizer.encode(told.beginning + told.continuation, bos=True)[: material.model.config.context_length]
        except UserError:
            return None
        title, tokens = "a story of its own", None
    maps = map_attention(network, ids)
    return ReadStory(title, tokens, maps, [tokenizer.token_text(i) for i in maps.ids])


def _position_chart(evaluation: Evaluation | None) -> Chart | None:
    """Draw the loss over the place in the context, each range at its middle."""
    if evaluation is None:
        return None
    curve = [((part.first + part.last) // 2, part.loss) for part in evaluation.position_loss if part.tokens]
    line = Line("loss", curve, "val", marks=len(curve) <= 40)
    return draw("position", "Loss by place in the context", "nats per token", [line], x_name="position", log_x=True)


def _page_data(charts: list[Chart], story: ReadStory | None) -> dict[str, Any]:
    """Return what the script of the page reads: points of the charts, surprise, attention."""
    data: dict[str, Any] = {"charts": {chart.key: chart.data for chart in charts}, "tokens": [], "attention": None}
    if story is None:
        return data
    data["tokens"] = [token.data() for token in story.tokens or []]
    data["attention"] = {
        "tokens": [text.visible(token) for token in story.attention_tokens],
        "clearest": story.attention.clearest,
        "maps": [[head.layer, head.head, head.habit, head.data] for head in story.attention.maps],
    }
    return data
