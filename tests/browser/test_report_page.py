"""The report in a real browser: widths, colour schemes, what happens under the pointer and the keys."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from playwright.sync_api import Browser, Page
from report_runs import train_small, write_evaluation

from tiny_lm.data import BinDataConfig
from tiny_lm.evaluation.report import write_report
from tiny_lm.runs import Run


@dataclass
class Opened:
    """A page, and what the browser complained about and asked for meanwhile."""

    page: Page
    messages: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, stream_folder: Path) -> Path:
    def data() -> BinDataConfig:
        paths = {"train_path": str(stream_folder / "train.bin"), "val_path": str(stream_folder / "val.bin")}
        return BinDataConfig(**paths, block_size=64, batch_size=8)

    run = train_small(Run(tmp_path_factory.mktemp("runs") / "small"), data, steps=240)
    write_evaluation(run)
    return write_report(run)


@pytest.fixture
def open_page(browser: Browser, path: Path) -> Iterator[Callable[..., Opened]]:
    opened = []

    def do(width: int = 1400, scheme: Literal["light", "dark"] = "light", file: Path = path, **options: bool) -> Opened:
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme, **options)
        result = Opened(page)
        page.on("console", lambda message: result.messages.append(message.text))
        page.on("pageerror", lambda error: result.messages.append(str(error)))
        page.on("request", lambda request: result.requests.append(request.url))
        page.goto(file.as_uri())
        opened.append(page)
        return result

    yield do
    for page in opened:
        page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_the_page_is_calm_at_every_width(
    open_page: Callable[..., Opened], path: Path, tmp_path: Path, width: int, scheme: Literal["light", "dark"]
) -> None:
    opened = open_page(width, scheme)
    page = opened.page
    page.screenshot(path=tmp_path / f"report-{scheme}-{width}.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    names = page.evaluate(
        """[...document.querySelectorAll('.measures th')].map((name) => {
            const range = document.createRange();
            range.selectNodeContents(name);
            return range.getClientRects().length;
        })"""
    )
    assert set(names) == {1}  # each on one line
    page.evaluate("document.querySelectorAll('details').forEach((details) => details.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    outside = page.evaluate(
        """(width) => [...document.querySelectorAll('body *')].filter((element) => {
            const box = element.getBoundingClientRect();
            return box.width && (box.right > width + 1 || box.left < -1) && !element.matches('.skip');
        }).map((element) => element.outerHTML.slice(0, 80))""",
        width,
    )
    assert outside == []
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    light = sum(map(int, re.findall(r"\d+", ground)[:3])) / 3
    assert light > 200 if scheme == "light" else light < 60
    assert opened.messages == []
    assert [url for url in opened.requests if url != path.as_uri() and not url.startswith("data:")] == []


def test_charts_are_drawn_and_tell_their_values(open_page: Callable[..., Opened]) -> None:
    page = open_page().page
    boxes = page.eval_on_selector_all(
        "[data-chart] path.line", "paths => paths.map((p) => p.getBoundingClientRect()).map((b) => [b.width, b.height])"
    )
    assert len(boxes) == 9  # three of losses, one of the rate, two of norm and speed each, one of the evaluation
    assert all(width > 150 for width, _ in boxes)
    assert boxes[0][1] > 100  # the loss fell
    plot = page.locator("[data-chart=loss] .plot")
    plot.hover(position={"x": 300, "y": 100})
    readout = page.locator("[data-chart=loss] .readout")
    assert re.search(r"optimizer step \d+ · training.* [\d.]+ .* · validation [\d.]+", readout.inner_text())
    assert page.locator("[data-chart=loss] .cursor line").count() == 1
    chart = page.locator("[data-chart=loss]")
    chart.focus()
    page.keyboard.press("ArrowLeft")
    before = readout.inner_text()
    page.keyboard.press("ArrowLeft")
    assert readout.inner_text() != before


def test_a_token_tells_what_the_model_thought(open_page: Callable[..., Opened]) -> None:
    page = open_page().page
    chosen = page.locator("#heat .t.on")  # before anything is pointed at: the most surprising one
    assert chosen.count() == 1
    assert float(page.locator("#heat-note .odds").inner_text().split(" · ")[1].removesuffix(" bits")) == pytest.approx(
        max(token["bits"] for token in page.evaluate("JSON.parse(document.getElementById('data').textContent).tokens")),
        abs=0.06,
    )
    token = page.locator("#heat .t[data-i='12']")
    token.hover()
    note = page.locator("#heat-note")
    text = note.inner_text()
    assert token.inner_text().strip() in text
    assert re.search(r"(%|1 in [\d,]+) · [\d.]+ bits · (its first choice|rank [\d,]+)", text)
    assert note.locator("li").count() == 5
    page.locator("#heat").focus()
    page.keyboard.press("ArrowRight")
    assert "on" in (page.locator("#heat .t[data-i='13']").get_attribute("class") or "").split()
    colours = page.eval_on_selector_all("#heat .t", "all => all.map((t) => getComputedStyle(t).backgroundColor)")
    assert len(set(colours)) >= 4


def test_heads_are_drawn_and_chosen(open_page: Callable[..., Opened]) -> None:
    page = open_page(400).page
    buttons = page.locator(".thumbs button")
    assert buttons.count() == 8
    buttons.nth(5).click()
    assert buttons.nth(5).get_attribute("aria-pressed") == "true"
    assert "Layer 2, head 2" in page.locator(".chosen").inner_text()
    colours = page.eval_on_selector(
        ".big canvas",
        """(canvas) => {
            const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data, seen = new Set();
            for (let i = 0; i < data.length; i += 4000) seen.add(data.slice(i, i + 4).join());
            return seen.size;
        }""",
    )
    assert colours > 10
    page.locator(".reading .t").nth(3).click()
    shares = [int(text.rstrip("%")) for text in page.locator(".top li span:last-child").all_inner_texts()]
    assert len(shares) == 4
    assert 96 <= sum(shares) <= 104  # the fourth token looks at four tokens
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.tagName") == "BUTTON"


def test_without_scripts_all_but_the_maps_is_there(open_page: Callable[..., Opened]) -> None:
    page = open_page(java_script_enabled=False).page
    assert page.locator("#heat .t").count() > 30
    assert "rank" in (page.locator("#heat .t").first.get_attribute("title") or "")
    assert page.locator("[data-chart=loss] path.line").count() == 3
    assert page.locator("noscript").is_visible()


def test_hostile_text_runs_nothing(open_page: Callable[..., Opened], path: Path, tmp_path: Path) -> None:
    run = Run(path.parent)
    evil = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
    before = run.samples.read_text(encoding="utf-8")
    run.samples.write_text(f"## Step 3\n\n> {evil}\n", encoding="utf-8")
    write_evaluation(run, samples=[{"prompt": evil, "text": evil}], created=evil)
    page_file = tmp_path / "report.html"
    page_file.write_bytes(write_report(run).read_bytes())
    run.samples.write_text(before, encoding="utf-8")
    opened = open_page(file=page_file)
    assert opened.page.title() == "small · training report"
    assert opened.page.locator("img").count() == 0
    assert opened.messages == []
    assert evil in opened.page.locator("#stories").inner_text()
