"""The real vLLM serves an export of each family, and is the same model (``make test-vllm`` makes its environment)."""

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from server_process import free_ports, server
from tiny_exports import FAMILIES, train_run

from tiny_lm.export.serve_config import ServeOptions, serve_commands
from tiny_lm.export.source import ExportSource, load_source
from tiny_lm.export.verify import OwnEngine, check_greedy, check_tokens, choose_sequences
from tiny_lm.tokenizer import Tokenizer

pytestmark = pytest.mark.vllm

TOLERANCE = 1e-4
VLLM = Path(os.environ.get("VLLM_ENVIRONMENT", Path(__file__).parents[2] / ".venv-vllm")) / "bin"


@dataclass
class VLLMEngine:
    """The server as an engine."""

    client: httpx.Client
    model: str
    size: int
    name: str = "vLLM"

    def _post(self, path: str, **content: Any) -> Any:
        answer = self.client.post(path, json={"model": self.model, **content})
        assert answer.status_code == 200, answer.text[:1000]
        return answer.json()

    def encode(self, text: str) -> list[int]:
        return self._post("/tokenize", prompt=text, add_special_tokens=False)["tokens"]

    def encode_document_start(self, text: str) -> list[int]:
        return self._post("/tokenize", prompt=text)["tokens"]

    def log_probabilities(self, ids: Sequence[int]) -> torch.Tensor:
        """Return those of all tokens after each of ``ids`` but the last: [T - 1, V]."""
        made = self._post("/v1/completions", prompt=list(ids), max_tokens=1, prompt_logprobs=self.size)
        rows = made["choices"][0]["prompt_logprobs"][1:]
        return torch.tensor([[row[str(token)]["logprob"] for token in range(self.size)] for row in rows])

    def complete(self, prompt: str | list[int], count: int) -> dict[str, Any]:
        made = self._post("/v1/completions", prompt=prompt, max_tokens=count, temperature=0, return_token_ids=True)
        return made["choices"][0]

    def greedy(self, ids: Sequence[int], count: int) -> list[int]:
        made = self.complete(list(ids), count)
        return made["token_ids"][:-1] if made["finish_reason"] == "stop" else made["token_ids"]


@pytest.fixture(scope="module", params=FAMILIES)
def served(
    request: pytest.FixtureRequest, tokenizer: Tokenizer, stories: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[ExportSource, VLLMEngine]]:
    """A run of a family, and vLLM serving it as ``tiny-lm serve-config`` says."""
    folder = tmp_path_factory.mktemp(request.param)
    run = train_run(request.param, 0, tokenizer, stories, folder, steps=800, d_model=128)  # heads of 32 and 64
    source = load_source(run.folder)
    port = free_ports()
    commands = serve_commands("vllm", source, str(run.folder), ServeOptions(port))
    block = "\n".join(commands.lines()) + f" --max-logprobs {source.config.vocab_size}"  # to see all of them
    tool = Path(sys.executable).parent  # `tiny-lm`, which exports
    with server(
        f'PATH="{tool}:$PATH" {block}', folder, f"http://127.0.0.1:{port}/health", path=VLLM, environment={}
    ) as client:
        yield source, VLLMEngine(client, commands.commands[0][6], source.config.vocab_size)


def test_ids_and_beginnings_are_ours(served: tuple[ExportSource, VLLMEngine]) -> None:
    source, engine = served
    checks = check_tokens(source, OwnEngine(source), engine)
    assert [check.result for check in checks if not check.passed] == []


def test_log_probabilities_are_ours(served: tuple[ExportSource, VLLMEngine]) -> None:
    source, engine = served
    own = OwnEngine(source)
    largest = 0.0
    for window in choose_sequences(source, 4):
        ids = window[:-1]  # vLLM wants room for one more
        ours, theirs = own.log_probabilities(ids)[:-1], engine.log_probabilities(ids)
        assert theirs.shape == ours.shape == (len(ids) - 1, source.config.vocab_size)
        largest = max(largest, float((theirs - ours).abs().max()))
    print(f"{source.config.architecture}: largest difference {largest:.2g}")
    assert largest <= TOLERANCE


def test_greedy_text_is_ours(served: tuple[ExportSource, VLLMEngine]) -> None:
    source, engine = served
    check = check_greedy(source, OwnEngine(source), engine, TOLERANCE)
    assert check.passed, check.result


def test_a_prompt_of_text_goes_on_from_bos(served: tuple[ExportSource, VLLMEngine]) -> None:
    source, engine = served
    prompt = "One day, a girl named Lily"
    ids = source.tokenizer.encode(prompt, bos=True)
    expected = source.tokenizer.decode(OwnEngine(source).greedy(ids, 64))
    assert engine.complete(prompt, 64)["text"] == expected
    assert expected.strip()
