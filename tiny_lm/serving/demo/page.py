"""Layout and events of the page."""

import json
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiny_lm.errors import UserError
from tiny_lm.pages import shared_script, shared_style
from tiny_lm.pages.surprise import LEVELS
from tiny_lm.serving.demo.backend import (
    EMPTY_VIEW,
    MAX_PROMPT_LENGTH,
    NUM_SEEDS,
    TEMPERATURE_RANGE,
    TOKEN_RANGE,
    DemoBackend,
    DemoParams,
    ViewState,
)

if TYPE_CHECKING:
    import gradio

_FOLDER = Path(__file__).parent
_NO_MODEL = "none"

_PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
"""Options of every event: it is not an API, and the page has its own progress display."""

_EXAMPLES = {
    "A small boat": "Once upon a time, there was a small boat that was afraid of",
    "The old box": "Grandma opened the old box. Inside there was",
    "A rainy day": "One rainy day, a mouse named Pip found",
    "A call for help": '"Please help me!" called the little',
}


def page_style() -> str:
    """Return the style of the page."""
    return shared_style() + (_FOLDER / "demo.css").read_text("utf-8")


def build_page(backend: DemoBackend) -> "gradio.Blocks":
    """Lay out the page for the models of ``backend``."""
    import gradio as gr

    generate, stop_all = _events(backend)
    page = gr.Blocks(title="tiny-lm · stories", analytics_enabled=False, fill_width=True)
    with page:
        gr.HTML(_heading(backend), elem_id="heading")
        with gr.Column(elem_id="desk"):
            with gr.Column(elem_id="input"):
                prompt, model, other = _inputs(backend)
                with gr.Row(elem_id="buttons"):
                    start = gr.Button("Write a story", variant="primary", size="md", elem_id="generate", min_width=0)
                    again = gr.Button("Another", size="md", elem_id="again", min_width=0)
                    stop = gr.Button("Stop", variant="stop", size="md", elem_id="stop", min_width=0)
            with gr.Column(elem_id="output"):
                gr.Radio(
                    ["Story", "Tokens"], value="Story", label="Show", show_label=False, interactive=True, elem_id="view"
                )
                with gr.Column(elem_id="sheets"):
                    sheets = [_sheet("first"), _sheet("second")]
            with gr.Column(elem_id="settings"):
                settings = _settings()
        seed = settings[-1]
        new_seed = again.click(None, None, seed, js=f"() => Math.floor(Math.random() * {NUM_SEEDS})", **_PRIVATE)
        for name, sheet in zip((model, other), sheets, strict=True):
            for trigger in (start.click, prompt.submit, new_seed.then):
                trigger(
                    generate,
                    [name, prompt, *settings],
                    sheet,
                    concurrency_limit=16,
                    concurrency_id="stories",
                    api_name="tell",
                    **_PRIVATE,
                )
        stop.click(stop_all, None, None, queue=False, **_PRIVATE)
        page.unload(stop_all)
    page.queue(max_size=32, api_open=False)
    return page


def _heading(backend: DemoBackend) -> str:
    names = [f'<span class="name">{escape(name)}</span> {escape(backend.describe(name))}' for name in backend.names]
    return (
        '<header><p class="eyebrow">tiny-lm</p><h1>Start a story. A small model finishes it.</h1>'
        f'<p class="who">{"<br>".join(names)}</p></header>'
    )


def _inputs(backend: DemoBackend) -> tuple[Any, Any, Any]:
    """Lay out the prompt, example prompts, and the choice of models."""
    import gradio as gr

    prompt = gr.Textbox(
        "Once upon a time", label="Prompt", lines=3, max_lines=8, max_length=MAX_PROMPT_LENGTH, elem_id="prompt",
        placeholder="A sentence, or half of one; empty to let the model start.",
    )  # fmt: skip
    with gr.Row(elem_id="examples"):
        for name, text in _EXAMPLES.items():
            example = gr.Button(name, size="sm", min_width=0)
            example.click(None, None, prompt, js=f"() => {json.dumps(text)}", **_PRIVATE)
    with gr.Row(elem_id="models"):
        several = len(backend.names) > 1
        model = gr.Dropdown(
            backend.names, value=backend.names[0], label="Model", visible=several, filterable=False, min_width=120
        )
        other = gr.Dropdown(
            [_NO_MODEL, *backend.names], value=_NO_MODEL, label="Compare with", visible=several, filterable=False,
            min_width=120, elem_id="other",
        )  # fmt: skip
    return prompt, model, other


def _settings() -> list[Any]:
    """Lay out the sampling parameters, in the order of the fields of :class:`DemoParams`."""
    import gradio as gr

    with gr.Accordion("Settings", open=True, elem_id="how"):
        tokens = gr.Slider(*TOKEN_RANGE, value=200, step=10, label="Tokens", info="maximum", buttons=[])
        temperature = gr.Slider(
            *TEMPERATURE_RANGE,
            value=0.8,
            step=0.05,
            label="Temperature",
            info="higher is more varied",
            buttons=[],
        )
        top_k = gr.Slider(0, 200, value=0, step=1, label="Top-k", info="only the k likeliest; 0: all", buttons=[])
        top_p = gr.Slider(
            0.05,
            1.0,
            value=0.95,
            step=0.05,
            label="Top-p",
            info="only the likeliest with this share",
            buttons=[],
        )
        seed = gr.Slider(0, NUM_SEEDS - 1, value=1, step=1, label="Seed", info="same seed, same story", buttons=[])
    return [tokens, temperature, top_k, top_p, seed]


def _sheet(name: str) -> Any:
    """Return the element of one story, which the script fills."""
    import gradio as gr

    limits = [f"&lt; {LEVELS[0]:g}", *(f"{level:g}" for level in LEVELS[:-1]), f"{LEVELS[-1]:g}+"]
    scale = "".join(f'<li class="h{level}">{limit}</li>' for level, limit in enumerate(limits))
    template = (_FOLDER / "sheet.html").read_text("utf-8").replace("SCALE", scale)
    script = shared_script() + (_FOLDER / "demo.js").read_text("utf-8")
    return gr.HTML(EMPTY_VIEW, html_template=template, js_on_load=script, elem_id=name, apply_default_css=False)


def _events(backend: DemoBackend) -> tuple[Callable[..., Iterator[ViewState]], Callable[..., None]]:
    """Return two handlers: one generates a story, the other stops the stories of a page."""
    import gradio as gr

    def generate(
        name: str,
        prompt: str,
        tokens: int,
        temperature: float,
        top_k: int,
        top_p: float,
        seed: int,
        request: gr.Request,
    ) -> Iterator[ViewState]:
        if name == _NO_MODEL:
            yield EMPTY_VIEW
            return
        try:
            params = DemoParams(prompt, tokens, temperature, top_k, top_p, seed)
            yield from backend.generate(name, params, str(request.session_hash))
        except UserError as error:
            raise gr.Error(str(error), print_exception=False, title="Invalid request") from None

    def stop(request: gr.Request) -> None:
        backend.stop(str(request.session_hash))

    return generate, stop
