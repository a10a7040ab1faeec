"""Open WebUI, as docs/deployment.md sets it up, before `tiny-lm serve`: it lists the models and streams a chat."""

import os
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect

from tiny_lm.data import BinDataConfig
from tiny_lm.data.tokenize import tokenize_corpus
from tiny_lm.model import model_config_from_dict
from tiny_lm.runs import Run
from tiny_lm.tokenizer import Tokenizer
from tiny_lm.training import TrainingConfig
from tiny_lm.training.fit import train

pytestmark = pytest.mark.openwebui

DOCUMENT = Path(__file__).parents[2] / "docs" / "deployment.md"
OPENWEBUI = os.environ.get("OPENWEBUI", ".venv-openwebui/bin/open-webui")
RECORD_LENGTHS = """() => {
    window.lengths = [];
    new MutationObserver(() => {
        const answer = document.querySelector(".chat-assistant");
        if (answer) lengths.push(answer.innerText.length);
    }).observe(document.body, {subtree: true, childList: true, characterData: true});
}"""
PROMPT = "Once upon a time, there was a small boat"


def documented_variables() -> dict[str, str]:
    section = DOCUMENT.read_text(encoding="utf-8").partition("## Open WebUI")[2].partition("\n## ")[0]
    exports = re.findall(r"^    export (.*)$", section, flags=re.MULTILINE)
    return dict(shlex.split(line)[0].split("=", 1) for line in exports)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


@contextmanager
def running(command: list[str], url: str, log: Path, **environment: str) -> Iterator[None]:
    """Run a server until the block ends, from when it answers."""
    with (
        log.open("w") as output,
        subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, cwd=log.parent, env={**os.environ, **environment}
        ) as process,
    ):
        try:
            deadline = time.monotonic() + 300
            while True:
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                try:
                    if httpx.get(url, trust_env=False).status_code == 200:
                        break
                except httpx.TransportError:
                    time.sleep(0.3)
            yield
        finally:
            process.terminate()


def train_slow(run: Run, data: BinDataConfig) -> Run:
    """Train a model that is large enough to be seen telling, on one endless story, so that no answer ends early."""
    model = {"vocab_size": 512, "context_length": 256, "d_model": 512, "n_layers": 8, "n_heads": 8}
    training = TrainingConfig(max_steps=16, learning_rate=1e-3, precision="32-true", sample_tokens=0)
    train(model_config_from_dict(model, source="test"), training, data, run)
    return run


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer, stories: list[str]) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("openwebui")
    endless = {"train": [" ".join(stories[:280])], "val": [" ".join(stories[280:])]}
    tokenize_corpus(tokenizer, endless, folder, source="test")
    paths = {"train_path": str(folder / "train.bin"), "val_path": str(folder / "val.bin")}
    data = BinDataConfig(**paths, block_size=64, batch_size=4)
    runs = [train_slow(Run(folder / name), data).folder for name in ("oak", "elm")]
    port, own = free_port(), free_port()
    serve = [sys.executable, "-c", "from tiny_lm.cli import main; main('serve')", *map(str, runs), "--port", str(port)]
    variables = documented_variables()
    assert variables["OPENAI_API_BASE_URL"] == "http://127.0.0.1:8000/v1"
    variables |= {"OPENAI_API_BASE_URL": f"http://127.0.0.1:{port}/v1", "DATA_DIR": str(folder / "data")}
    (folder / "data").mkdir()
    page = [str(Path(OPENWEBUI).absolute()), "serve", "--host", "127.0.0.1", "--port", str(own)]
    with (
        running(serve, f"http://127.0.0.1:{port}/v1/models", folder / "serve.log"),
        running(page, f"http://127.0.0.1:{own}/health", folder / "openwebui.log", **variables),
    ):
        yield f"http://127.0.0.1:{own}"


@dataclass
class Chat:
    """A page of Open WebUI, and what the browser complained about, asked for meanwhile."""

    page: Page
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@pytest.fixture
def chat(browser: Browser, address: str) -> Iterator[Chat]:
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    chat = Chat(page)
    page.on("console", lambda message: chat.errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: chat.errors.append(str(error)))
    page.on("request", lambda request: chat.requests.append(request.url))
    page.goto(address)
    page.set_default_timeout(15_000)
    page.get_by_role("button", name="Okay, Let's Go!").click(timeout=60_000)  # the news of the release
    expect(page.locator("#chat-input")).to_be_visible()
    yield chat
    page.close()


def test_models_are_listed_and_a_chat_streams(chat: Chat, address: str, tmp_path: Path) -> None:
    page = chat.page
    page.get_by_role("button", name="Selected model").or_(page.locator("[id^=model-selector]")).first.click()
    names = page.locator("[role=option], [aria-roledescription=model-item]")
    expect(names.filter(has_text="oak")).to_be_visible()
    names.filter(has_text="elm").click()
    page.locator("#chat-input").click()
    page.keyboard.type(PROMPT)
    page.evaluate(RECORD_LENGTHS)
    page.keyboard.press("Enter")
    answer = page.locator(".chat-assistant")
    expect(answer).to_be_visible()
    expect(page.get_by_label("Regenerate")).to_be_visible(timeout=60_000)
    page.screenshot(path=tmp_path / "openwebui.png")
    assert len(answer.inner_text()) > 20
    assert "tools" not in answer.inner_text()
    assert len(set(page.evaluate("lengths"))) >= 5  # it came in parts
    expect(page.get_by_role("heading", level=1)).to_have_text(PROMPT)  # the chat's name, which no model was asked for
    assert page.get_by_text("elm", exact=True).first.is_visible()
    assert chat.errors == []
    assert [url for url in chat.requests if not url.startswith((address, "data:", "blob:"))] == []
