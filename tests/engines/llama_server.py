"""llama.cpp's own server, started for a test, and as an engine that exports are compared with.

Ollama (since 0.30) runs every GGUF file in this very program, with flags such as those of ``OLLAMA_FLAGS``.
"""

import os
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from torch import Tensor

from tiny_lm.export.source import ExportSource
from tiny_lm.export.verify import suppressed_tokens

ROOT = Path(__file__).parent.parent.parent
LLAMA_CPP = Path(os.environ.get("LLAMA_CPP", ROOT / "build" / "llama.cpp"))
LLAMA_SERVER = LLAMA_CPP / "cmake" / "bin" / "llama-server"
START_SECONDS = 60

EXACT_FLAGS = ("-ctk", "f32", "-ctv", "f32", "--flash-attn", "off")
"""Keys and values in float32, and the plain attention."""

OLLAMA_FLAGS = ("--offline", "--no-webui", "--no-jinja", "--chat-template", "chatml", "--context-shift")
"""What Ollama adds where a Modelfile has a TEMPLATE: it renders prompts itself and sends them to /completion."""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def serve(file: Path, *flags: str) -> Iterator[httpx.Client]:
    """Start the server on a file, and stop it again."""
    if not LLAMA_SERVER.is_file():
        pytest.fail(f"{LLAMA_SERVER} is not built: make test-llama-server")
    port = free_port()
    command = [str(LLAMA_SERVER), "-m", str(file), "--host", "127.0.0.1", "--port", str(port), "-np", "1", "-t", "1"]
    log = file.with_suffix(".log")
    with log.open("wb") as output:
        process = subprocess.Popen([*command, *flags], stdout=output, stderr=output, stdin=subprocess.DEVNULL)
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:
                wait_until_healthy(client, process, log)
                yield client
        finally:
            process.terminate()
            process.wait(timeout=30)


def wait_until_healthy(client: httpx.Client, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, f"the server ended: {log.read_text()[-2000:]}"
        try:
            if client.get("/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    raise AssertionError(f"the server did not answer within {START_SECONDS} s: {log.read_text()[-2000:]}")


class LlamaServerEngine:
    """The server as an engine of ``tiny_lm.export.verify``."""

    name = "llama-server"

    def __init__(self, client: httpx.Client, source: ExportSource) -> None:
        self._client, self._size, self._eos_id = client, source.config.vocab_size, source.tokenizer.eos_id
        self.banned = [[token, False] for token in suppressed_tokens(source)]

    def post(self, path: str, **body: Any) -> Any:
        answer = self._client.post(path, json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def encode(self, text: str) -> list[int]:
        return self.post("/tokenize", content=text, add_special=False, parse_special=False)["tokens"]

    def encode_document_start(self, text: str) -> list[int]:
        return self.post("/tokenize", content=text, add_special=True, parse_special=False)["tokens"]

    def log_probabilities(self, ids: Sequence[int]) -> Tensor:
        return torch.stack([self._last(list(ids[: i + 1])) for i in range(len(ids))])

    def _last(self, ids: list[int]) -> Tensor:
        answer = self.post("/completion", prompt=ids, n_predict=1, n_probs=self._size, temperature=0)
        told = answer["completion_probabilities"][0]["top_logprobs"]
        found = torch.full((self._size,), float("nan"))
        found[[one["id"] for one in told]] = torch.tensor([one["logprob"] for one in told])
        return found

    def greedy(self, ids: Sequence[int], count: int) -> list[int]:
        answer = self.post(
            "/completion",
            prompt=list(ids),
            n_predict=count,
            temperature=0,
            logit_bias=self.banned,
            return_tokens=True,
        )
        return [token for token in answer["tokens"] if token != self._eos_id]
