"""The page: what stands where, and what happens when a button is pressed."""

import json
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiny_lm.errors import UserError
from tiny_lm.pages import shared_script, shared_style
from tiny_lm.pages.surprise import LEVELS
from tiny_lm.serving.demo.backend import (
    NO_STORY,
    PROMPT_LENGTH,
    SEEDS,
    TEMPERATURES,
    TOKENS,
    DemoBackend,
    DemoParams,
    View,
)

if TYPE_CHECKING:
    import gradio

_FOLDER = Path(__file__).parent
_NOBODY = "nobody"

_PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
"""Of every event: it is no API, and the page shows itself that a story is under way."""

_EXAMPLES = {
    "A small boat": "Once upon a time, there was a small boat that was afraid of",
    "The old box": "Grandma opened the old box. Inside there was",
    "A rainy day": "One rainy day, a mouse named Pip found",
    "A call for help": '"Please help me!" called the little',
}


def page_style() -> str:
    """Return the style of the page."""
    return shared_style() + (_FOLDER / "demo.css").read_text("utf-8")


def build_page(tellers: DemoBackend) -> "gradio.Blocks":
    """Lay out the page on which ``tellers`` tell."""
    import gradio as gr

    tell_story, stop_stories = _events(tellers)
    page = gr.Blocks(title="tiny-lm · stories", analytics_enabled=False, fill_width=True)
    with page:
        gr.HTML(_heading(tellers), elem_id="heading")
        with gr.Column(elem_id="desk"):
            with gr.Column(elem_id="asking"):
                prompt, model, other = _ask(tellers)
                with gr.Row(elem_id="buttons"):
                    tell = gr.Button("Tell the story", variant="primary", size="md", elem_id="tell", min_width=0)
                    again = gr.Button("Another", size="md", elem_id="again", min_width=0)
                    stop = gr.Button("Stop", variant="stop", size="md", elem_id="stop", min_width=0)
            with gr.Column(elem_id="telling"):
                gr.Radio(
                    ["Story", "Tokens"], value="Story", label="Show", show_label=False, interactive=True, elem_id="view"
                )
                with gr.Column(elem_id="sheets"):
                    sheets = [_sheet("first"), _sheet("second")]
            with gr.Column(elem_id="settings"):
                settings = _settings()
        seed = settings[-1]
        rolled = again.click(None, None, seed, js=f"() => Math.floor(Math.random() * {SEEDS})", **_PRIVATE)
        for who, sheet in zip((model, other), sheets, strict=True):
            for begins in (tell.click, prompt.submit, rolled.then):
                begins(
                    tell_story,
                    [who, prompt, *settings],
                    sheet,
                    concurrency_limit=16,
                    concurrency_id="stories",
                    **_PRIVATE,
                )
        stop.click(stop_stories, None, None, queue=False, **_PRIVATE)
        page.unload(stop_stories)
    page.queue(max_size=32, api_open=False)
    return page


def _heading(tellers: DemoBackend) -> str:
    names = [f'<span class="name">{escape(name)}</span> {escape(tellers.describe(name))}' for name in tellers.names]
    return (
        '<header><p class="eyebrow">tiny-lm</p><h1>Begin a story. A small model ends it.</h1>'
        f'<p class="who">{"<br>".join(names)}</p></header>'
    )


def _ask(tellers: DemoBackend) -> tuple[Any, Any, Any]:
    """Lay out what is asked: the beginning, examples of one, and who tells."""
    import gradio as gr

    prompt = gr.Textbox(
        "Once upon a time", label="How it begins", lines=3, max_lines=8, max_length=PROMPT_LENGTH, elem_id="prompt",
        placeholder="A sentence, or half of one. Empty: a story from nothing.",
    )  # fmt: skip
    with gr.Row(elem_id="examples"):
        for name, text in _EXAMPLES.items():
            example = gr.Button(name, size="sm", min_width=0)
            example.click(None, None, prompt, js=f"() => {json.dumps(text)}", **_PRIVATE)
    with gr.Row(elem_id="models"):
        several = len(tellers.names) > 1
        model = gr.Dropdown(
            tellers.names, value=tellers.names[0], label="Who tells", visible=several, filterable=False, min_width=120
        )
        other = gr.Dropdown(
            [_NOBODY, *tellers.names], value=_NOBODY, label="And beside it", visible=several, filterable=False,
            min_width=120, elem_id="other",
        )  # fmt: skip
    return prompt, model, other


def _settings() -> list[Any]:
    """Lay out how it is told, in the order of the fields of :class:`DemoParams`."""
    import gradio as gr

    with gr.Accordion("How it is told", open=True, elem_id="how"):
        tokens = gr.Slider(*TOKENS, value=200, step=10, label="Tokens", info="at most", buttons=[])
        temperature = gr.Slider(
            *TEMPERATURES, value=0.8, step=0.05, label="Temperature", info="low is sure, high is wild", buttons=[]
        )
        top_k = gr.Slider(0, 200, value=0, step=1, label="Top-k", info="only the k likeliest; 0: all", buttons=[])
        top_p = gr.Slider(
            0.05, 1.0, value=0.95, step=0.05, label="Top-p", info="only the likeliest with this share", buttons=[]
        )
        seed = gr.Slider(0, SEEDS - 1, value=1, step=1, label="Seed", info="the same, the same story", buttons=[])
    return [tokens, temperature, top_k, top_p, seed]


def _sheet(name: str) -> Any:
    """Lay out the place of one story, which the script fills."""
    import gradio as gr

    limits = [f"&lt; {LEVELS[0]:g}", *(f"{level:g}" for level in LEVELS[:-1]), f"{LEVELS[-1]:g}+"]
    scale = "".join(f'<li class="h{level}">{limit}</li>' for level, limit in enumerate(limits))
    template = (_FOLDER / "sheet.html").read_text("utf-8").replace("SCALE", scale)
    script = shared_script() + (_FOLDER / "demo.js").read_text("utf-8")
    return gr.HTML(NO_STORY, html_template=template, js_on_load=script, elem_id=name, apply_default_css=False)


def _events(tellers: DemoBackend) -> tuple[Callable[..., Iterator[View]], Callable[..., None]]:
    """Return what happens when a story is asked for, and when it is stopped or its page is closed."""
    import gradio as gr

    def tell(
        name: str,
        prompt: str,
        tokens: int,
        temperature: float,
        top_k: int,
        top_p: float,
        seed: int,
        request: gr.Request,
    ) -> Iterator[View]:
        if name == _NOBODY:
            yield NO_STORY
            return
        try:
            wish = DemoParams(prompt, tokens, temperature, top_k, top_p, seed)
            yield from tellers.tell(name, wish, str(request.session_hash))
        except UserError as error:
            raise gr.Error(str(error), print_exception=False, title="That cannot be told") from None

    def stop(request: gr.Request) -> None:
        tellers.stop(str(request.session_hash))

    return tell, stop
