"""The real TorchServe serves the archive of a run, and tells what the run tells (``make test-torchserve``)."""

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from server_process import free_ports, server
from tiny_exports import FAMILIES, train_run

from tiny_lm import TextGenerator
from tiny_lm.export.source import load_source
from tiny_lm.export.torchserve import CONFIG_FILE, configuration, export_torchserve, serve_words
from tiny_lm.runs import Run
from tiny_lm.tokenizer import Tokenizer

pytestmark = pytest.mark.torchserve

PROMPT = "One day, a girl named Lily"


@pytest.fixture(scope="module")
def runs(tokenizer: Tokenizer, stories: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """A run of each family."""
    return {
        family: train_run(family, 0, tokenizer, stories, tmp_path_factory.mktemp(family), steps=300)
        for family in FAMILIES
    }


@pytest.fixture(scope="module")
def client(runs: dict[str, Run], tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """One TorchServe for the archives of all families."""
    store = tmp_path_factory.mktemp("served") / "store"
    port = free_ports(5)
    models = []
    for family, run in runs.items():
        source = load_source(run.folder)
        export_torchserve(source, store.parent / family, port=port)
        words = serve_words(store.parent / family, source)
        models.append(words[words.index("--models") + 1])
    store.mkdir()
    for archive in store.parent.glob("*/*.mar"):
        archive.rename(store / archive.name)
    (store / CONFIG_FILE).write_text(configuration(port))
    words = [*words[: words.index("--model-store")], "--model-store", str(store), "--ts-config"]
    words += [str(store / CONFIG_FILE), "--models", *models]
    logs = str(store.parent / "logs")
    with server(
        shlex.join(words),
        store.parent,
        f"http://127.0.0.1:{port}/ping",
        path=Path(sys.executable).parent,
        environment={"LOG_LOCATION": logs, "METRICS_LOCATION": logs},
    ) as served:
        yield served


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_is_that_of_the_run(family: str, runs: dict[str, Run], client: httpx.Client) -> None:
    content = {"prompt": PROMPT, "max_new_tokens": 64, "temperature": 0}
    answer = client.post(f"/predictions/{runs[family].name}", json=content)
    assert answer.status_code == 200, answer.text
    expected = TextGenerator.from_run(runs[family].folder).generate(PROMPT, max_new_tokens=64, temperature=0)
    assert answer.json()["text"] == expected
    assert len(expected) > len(PROMPT) + 20


def test_what_is_wrong_is_told(runs: dict[str, Run], client: httpx.Client) -> None:
    address = f"/predictions/{runs['gpt2'].name}"
    for content, reason in (
        ({"prompt": "x", "top_p": 7}, r"top-p must be"),
        ({"prompts": "x"}, r"unknown field"),
        ({"prompt": "x" * 20_001}, r"may have at most 20,000 characters"),
    ):
        answer = client.post(address, json=content)
        assert answer.status_code == 400
        assert re.search(reason, answer.json()["error"])
    assert client.post(address, content=b"{", headers={"content-type": "application/json"}).status_code == 400
    assert client.post(address, json={"prompt": "x" * 300_000}).status_code == 413
    assert client.get("/ping").json() == {"status": "Healthy"}
