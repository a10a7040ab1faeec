"""The demo in a real browser: stories stream, stop, show their tokens and stand side by side; nobody else is asked."""

import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import torch
import uvicorn
from playwright.sync_api import Browser, Page, expect
from report_runs import train_small

from tiny_lm.data import BinDataConfig
from tiny_lm.inference import GenerationConfig, TextGenerator
from tiny_lm.model import build_model, model_config_from_dict
from tiny_lm.runs import Run
from tiny_lm.serving.demo.backend import DemoBackend
from tiny_lm.serving.demo.server import build_app
from tiny_lm.tokenizer import Tokenizer

Scheme = Literal["light", "dark"]

RECORD_LENGTHS = """() => {
    const story = document.querySelector("#first .story"), sheet = document.querySelector("#first .sheet");
    window.lengths = [];
    new MutationObserver(() => {
        if (sheet.dataset.state === "generating") lengths.push(story.innerText.length);
    }).observe(story, {subtree: true, childList: true, characterData: true});
}"""


@dataclass
class Opened:
    """A page, and what the browser complained about and asked for meanwhile."""

    page: Page
    messages: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def begin(self, button: str) -> None:
        """Press a button that begins a story, and wait until another one stands there than before."""
        sheet = self.page.locator("#first .sheet")
        before = sheet.get_attribute("data-story") or "none"
        self.page.locator(button).click()
        expect(sheet).to_have_attribute("data-story", re.compile(rf"^(?!{before}$)"))

    def story(self, which: str = "first") -> str:
        """Wait for the end of a story and return it, its beginning included."""
        expect(self.page.locator(f"#{which} .sheet")).to_have_attribute("data-state", "done", timeout=60_000)
        return self.page.locator(f"#{which} .story").text_content() or ""


@dataclass
class Served:
    """A running demo of two trained models."""

    address: str
    runs: list[Path]
    asked_elsewhere: list[bytes]
    """What the server's process sent to the proxy that it was given: all that it asks of other machines."""


@contextmanager
def recording_proxy() -> Iterator[tuple[str, list[bytes]]]:
    """Yield the address of a proxy that refuses everything, and the list of what was asked."""
    asked: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def work() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                with connection:
                    asked.append(connection.recv(1000))

        threading.Thread(target=work, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", asked
        listening.shutdown(socket.SHUT_RDWR)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, stream_folder: Path) -> Iterator[Served]:
    def data() -> BinDataConfig:
        paths = {"train_path": str(stream_folder / "train.bin"), "val_path": str(stream_folder / "val.bin")}
        return BinDataConfig(**paths, block_size=64, batch_size=8)

    folder = tmp_path_factory.mktemp("runs")
    runs = [
        train_small(Run(folder / name), data, steps=60, seed=seed).folder for name, seed in (("oak", 1), ("elm", 2))
    ]
    command = [sys.executable, "-c", "from tiny_lm.cli import main; main('demo')", *map(str, runs), "--port", "0"]
    with recording_proxy() as (proxy, asked):
        proxies = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), proxy)
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **proxies}) as process:
            try:
                assert process.stdout is not None
                yield Served(process.stdout.readline().strip(), runs, asked)
            finally:
                process.terminate()


@pytest.fixture
def open_page(browser: Browser, served: Served) -> Iterator[Callable[..., Opened]]:
    opened = []

    def do(width: int = 1400, scheme: Scheme = "light", address: str = served.address) -> Opened:
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        result = Opened(page)
        page.on("console", lambda message: result.messages.append(message.text))
        page.on("pageerror", lambda error: result.messages.append(str(error)))
        page.on("request", lambda request: result.requests.append(request.url))
        page.set_default_timeout(8000)
        page.goto(address)
        expect(page.locator("#generate")).to_be_enabled()
        opened.append(page)
        return result

    yield do
    for page in opened:
        page.close()


def set_number(page: Page, label: str, value: float) -> None:
    field = page.get_by_label(f"number input for {label}")
    field.fill(str(value))
    field.blur()


def show_tokens(page: Page) -> None:
    page.locator("#view label", has_text="Tokens").click()


def choose(page: Page, label: str, name: str) -> None:
    page.get_by_label(label).click()
    page.get_by_role("option", name=name).click()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_two_stories_at_every_width_and_nobody_else_is_asked(
    open_page: Callable[..., Opened], served: Served, tmp_path: Path, width: int, scheme: Scheme
) -> None:
    opened = open_page(width, scheme)
    page = opened.page

    def look(name: str) -> None:
        page.screenshot(path=tmp_path / f"demo-{name}-{scheme}-{width}.png", full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        outside = page.evaluate(
            """(width) => [...document.querySelectorAll('body *')].filter((element) => {
                const box = element.getBoundingClientRect();
                return box.width && (box.right > width + 1 || box.left < -1) && element.checkVisibility();
            }).map((element) => element.outerHTML.slice(0, 80))""",
            width,
        )
        assert outside == []

    look("rest")
    assert page.get_by_text("Gradio").count() == page.get_by_text("API").count() == 0
    assert page.locator("a").count() == 0
    choose(page, "Compare with", "elm")
    page.locator("#generate").click()
    assert opened.story("first") != opened.story("second")
    show_tokens(page)
    page.locator("#first .tokens .t").nth(10).hover()
    look("told")
    places = [page.locator(f"#{name}").bounding_box() for name in ("first", "second")]
    assert places[0] and places[1]
    assert (places[0]["y"] == places[1]["y"]) == (width == 1400)  # side by side, or one below the other
    ground = page.evaluate("getComputedStyle(document.querySelector('.gradio-container')).backgroundColor")
    light = sum(map(int, re.findall(r"\d+", ground)[:3])) / 3
    assert light > 200 if scheme == "light" else light < 60
    assert opened.messages == []
    assert [url for url in opened.requests if not url.startswith((served.address, "data:"))] == []
    assert served.asked_elsewhere == []


def test_a_typed_beginning_streams_to_the_story_of_its_seed(open_page: Callable[..., Opened], served: Served) -> None:
    request = GenerationConfig(max_new_tokens=500, temperature=0.7, top_k=20, top_p=0.9)
    prompt = 'One day, <b>Pip</b> & "Mia"'
    generator = TextGenerator.from_run(served.runs[0])
    told = generator.generate_batch([prompt] * 20, request, seed=range(20))
    seed, expected = max(enumerate(told), key=lambda pair: len(pair[1].ids))
    assert len(expected.ids) > 100
    opened = open_page()
    page = opened.page
    page.get_by_label("Prompt").fill(prompt)
    for label, value in (("Tokens", 500), ("Temperature", 0.7), ("Top-k", 20), ("Top-p", 0.9), ("Seed", seed)):
        set_number(page, label, value)
    page.evaluate(RECORD_LENGTHS)
    page.locator("#generate").click()
    story = opened.story()
    assert story == prompt + expected.text
    lengths = page.evaluate("lengths")
    assert lengths == sorted(lengths)
    assert len(set(lengths)) >= 3  # it grew before the eyes of the reader
    assert f"{len(expected.ids)} tokens · " in page.locator("#first .facts").inner_text()
    opened.begin("#generate")
    assert opened.story() == story
    opened.begin("#again")
    assert opened.story() != story
    assert page.get_by_label("number input for Seed").input_value() != str(seed)


def test_a_token_tells_what_the_model_thought(open_page: Callable[..., Opened]) -> None:
    opened = open_page()
    page = opened.page
    page.locator("#examples button").first.click()
    expect(page.get_by_label("Prompt")).to_have_value(re.compile("small boat"))
    page.locator("#generate").click()
    told = opened.story()
    show_tokens(page)
    tokens, note = page.locator("#first .tokens"), page.locator("#first .note")
    shown = (tokens.text_content() or "").replace("↵", "").replace("␣", " ")
    assert shown.split() == told.split()
    token = tokens.locator(".t").nth(12)
    token.hover()
    assert (token.text_content() or "").strip() in note.inner_text()
    assert re.search(r"(%|1 in [\d,]+) · [\d.]+ bits · (its first choice|rank \d|not in its top)", note.inner_text())
    assert note.locator("li").count() == 5
    tokens.focus()
    page.keyboard.press("ArrowRight")
    expect(tokens.locator(".t").nth(13)).to_have_class(re.compile(r"\bon\b"))
    colours = page.eval_on_selector_all("#first .t", "all => all.map((t) => getComputedStyle(t).backgroundColor)")
    assert len(set(colours)) >= 4


def test_too_long_a_beginning_is_refused_in_words(open_page: Callable[..., Opened], served: Served) -> None:
    opened = open_page()
    page = opened.page
    page.get_by_label("Prompt").fill("x" * 3000)
    assert len(page.get_by_label("Prompt").input_value()) == 2000
    page.get_by_label("Prompt").evaluate("(area) => area.removeAttribute('maxlength')")
    page.get_by_label("Prompt").fill("x" * 3000)
    page.locator("#generate").click()
    expect(page.get_by_text("3,000 characters; the maximum is 2,000")).to_be_visible()


@pytest.fixture
def slow(tokenizer: Tokenizer) -> Iterator[tuple[str, DemoBackend]]:
    """A demo, in this process, of a model that needs seconds for a story."""
    size = {"vocab_size": tokenizer.vocab_size, "context_length": 64, "d_model": 768, "n_layers": 12, "n_heads": 12}
    torch.manual_seed(0)
    model = build_model(model_config_from_dict(size, source="test"))  # knows nothing, so it does not end by itself
    backend = DemoBackend({"slow": TextGenerator(model, tokenizer)})
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        server = uvicorn.Server(uvicorn.Config(build_app(backend, port), log_level="warning", ws="none"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        yield f"http://127.0.0.1:{port}", backend
        server.should_exit = server.force_exit = True
        thread.join()
    backend.close()


@pytest.mark.filterwarnings("ignore:.future.no_silent_downcasting:DeprecationWarning")  # of Gradio's own use of pandas
def test_stop_and_leaving_free_the_model(open_page: Callable[..., Opened], slow: tuple[str, DemoBackend]) -> None:
    address, backend = slow
    opened = open_page(address=address)
    page = opened.page
    set_number(page, "Tokens", 500)
    set_number(page, "Temperature", 0.1)
    assert page.get_by_label("Model").count() == 0  # there is no choice
    for _ in range(2):  # it can go on after a stop
        opened.begin("#generate")
        expect(page.locator("#first .facts")).to_contain_text(re.compile(r"^[1-9]\d* tokens"))
        assert backend.num_running == 1
        page.locator("#stop").click()
        opened.story()
        assert page.locator("#first .facts").inner_text().endswith("stopped")
        assert backend.num_running == 0
    opened.begin("#generate")
    page.close()
    deadline = time.monotonic() + 30
    while backend.num_running and time.monotonic() < deadline:
        time.sleep(0.05)
    assert backend.num_running == 0
    assert opened.messages == []
