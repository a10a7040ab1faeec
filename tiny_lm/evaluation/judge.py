"""A larger model grades the samples: grammar, creativity, consistency with the prompt, and plot.

This is the method of the TinyStories paper (Eldan and Li 2023, arXiv:2305.07759, section 4): the judge sees prompt and
completion and grades each aspect from 1 to 10. Any server with OpenAI's ``/v1/chat/completions`` will do: Ollama, vLLM,
llama.cpp, or a hosted one.
"""

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from tiny_lm.errors import UserError
from tiny_lm.files import to_json, write_text

if TYPE_CHECKING:
    import httpx

JUDGE_FILE = "judge.jsonl"

ASPECTS = ("grammar", "creativity", "consistency", "plot")

_INSTRUCTIONS = """\
You mark stories that a very small language model wrote for children of three to five years. A person wrote the \
beginning; the model wrote everything behind the line of three stars. Judge the model's part only, and as strictly as \
you would judge a pupil's homework. Give four marks from 1 (very poor) to 10 (faultless):
grammar: are the sentences correct, and do all words exist?
creativity: is there an idea of its own in it, or only what any story has?
consistency: does it go on from the beginning, with the same persons, things and facts, and does it not contradict \
itself?
plot: does one thing lead to another, up to an end that makes sense?
Think about it in one or two sentences, and write nothing else than one JSON object of this form:
{"comment": "...", "grammar": 5, "creativity": 5, "consistency": 5, "plot": 5}"""

_MAX_RESPONSE_BYTES = 2**20  # a comment and four grades take a few hundred
_MAX_ANSWER_CHARS = 50_000  # what the judge wrote, including its reasoning
_MAX_SAMPLE_CHARS = 20_000  # longer samples are truncated
_MAX_ATTEMPTS = 5  # attempts at a request that fails with a transient error
_MAX_ANSWERS = 2  # times the judge is asked about a sample if its answer has no grades
_MAX_WAIT = 60.0  # seconds between two attempts


@dataclass(frozen=True)
class JudgeResult:
    """Mean grades over all samples."""

    url: str
    model: str
    stories: int
    graded: int
    """Samples with four valid grades; the means are over these."""
    grades: dict[str, float]
    answers: str = JUDGE_FILE
    """File in the run folder with all raw answers."""

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        return asdict(self)


@dataclass
class _Answer:
    """One request and its outcome: a line of ``judge.jsonl``."""

    story: int
    prompt: str
    text: str
    attempts: int = 0
    status: int | None = None
    answer: str | None = None
    """The raw answer: what the judge wrote, or the body of a response that is not a chat completion."""
    grades: dict[str, int] | None = None
    error: str | None = None


class _RefusedError(Exception):
    """The server refuses all requests of this kind."""


@dataclass(frozen=True)
class Judge:
    """A model behind an OpenAI-compatible server."""

    url: str
    """URL of the chat completions endpoint."""
    model: str
    key: str | None = field(default=None, repr=False)
    timeout: float = 120.0
    """Seconds an answer may take."""
    sleep: Callable[[float], None] = time.sleep

    @classmethod
    def from_options(cls, url: str, model: str, key_variable: str | None) -> "Judge":
        """Build a judge from command-line options.

        Args:
            url: ``http://host:port``, with or without ``/v1`` or ``/v1/chat/completions``.
            model: the model's name on that server.
            key_variable: environment variable with the API key; None: send no key.

        Raises:
            UserError: the URL is invalid, or the variable is not set.
        """
        try:
            parts = urlsplit(url)
            is_valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            is_valid = False
        if not is_valid:
            raise UserError(f"--judge {url}: not a valid URL; example: http://localhost:11434/v1")
        if parts.username or parts.query:
            raise UserError("--judge: pass the key with --judge-key-env, not in the URL")
        if key_variable and not os.environ.get(key_variable):
            raise UserError(f"--judge-key-env {key_variable}: this environment variable is not set")
        base = url.rstrip("/").removesuffix("/chat/completions")
        if not urlsplit(base).path.strip("/"):
            base += "/v1"
        return cls(f"{base}/chat/completions", model, os.environ[key_variable] if key_variable else None)

    def check_reachable(self) -> None:
        """Check that the server responds, before hours of other work are done.

        Raises:
            UserError: the server cannot be reached.
        """
        import httpx

        try:
            with httpx.stream("GET", self.url.removesuffix("/chat/completions") + "/models", **self._options(10.0)):
                pass  # any status will do
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise UserError(f"--judge {self.url}: does not answer ({_reason(error)})") from None

    def grade(
        self, samples: Sequence[tuple[str, str]], answers: Path, on_progress: Callable[[int], None] | None = None
    ) -> JudgeResult:
        """Grade each sample; those the judge fails on are excluded from the means.

        Args:
            samples: pairs of prompt and completion.
            answers: file for all raw answers, one JSON object per line; also written if grading fails.
            on_progress: called after each sample.

        Raises:
            UserError: the server refuses all requests (wrong key or model), or no sample could be graded.
        """
        import httpx

        log: list[_Answer] = []
        try:
            with httpx.Client(**self._options(self.timeout)) as client:
                for number, (prompt, text) in enumerate(samples):
                    self._grade_one(client, number, prompt, text, log)
                    if on_progress:
                        on_progress(1)
        except _RefusedError as error:
            raise UserError(f"--judge {self.url}: {error}") from None
        finally:
            write_text(answers, "".join(to_json(asdict(answer)) + "\n" for answer in log))
        graded = [answer.grades for answer in log if answer.grades]
        if not graded:
            last = next((answer.error for answer in reversed(log) if answer.error), "no samples")
            raise UserError(f"--judge {self.url}: graded none of {len(samples)} samples ({last}); see {answers}")
        means = {aspect: fmean(grades[aspect] for grades in graded) for aspect in ASPECTS}
        return JudgeResult(self.url, self.model, len(samples), len(graded), means)

    def _options(self, timeout: float) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        return {"timeout": timeout, "headers": headers, "follow_redirects": False}

    def _grade_one(self, client: "httpx.Client", number: int, prompt: str, text: str, log: list[_Answer]) -> None:
        """Grade one sample, asking again if the answer has no grades, and log each answer."""
        for _ in range(_MAX_ANSWERS):
            answer = _Answer(number, prompt, text)
            log.append(answer)
            body = self._ask(client, answer)
            if body is None:
                return  # the server kept failing
            try:
                answer.answer = _content(body)
                answer.grades = parse_grades(answer.answer)
            except ValueError as error:
                answer.answer = answer.answer or body.decode("utf-8", errors="replace")
                answer.error = str(error)
            else:
                return

    def _ask(self, client: "httpx.Client", answer: _Answer) -> bytes | None:
        """Return the body of the response, or None after several failed attempts.

        Raises:
            _RefusedError: the server refuses all such requests.
        """
        import httpx

        messages = [
            {"role": "system", "content": _INSTRUCTIONS},
            {"role": "user", "content": f"{answer.prompt}\n***\n{answer.text[:_MAX_SAMPLE_CHARS]}"},
        ]
        request = {"model": self.model, "messages": messages, "temperature": 0, "stream": False}
        for attempt in range(_MAX_ATTEMPTS):
            answer.attempts = attempt + 1
            wait = min(2.0**attempt, _MAX_WAIT)
            try:
                status, headers, body = _post(client, self.url, request, self.timeout)
            except (httpx.HTTPError, TimeoutError) as error:
                answer.error = _reason(error)
            except ValueError as error:
                answer.error = str(error)
                return None
            else:
                answer.status = status
                if status == 200:
                    answer.error = None
                    return body
                answer.answer = body.decode("utf-8", errors="replace")
                answer.error = f"HTTP {status}: {_message(answer.answer)}"
                if status not in (408, 409, 429) and status < 500:
                    raise _RefusedError(answer.error)
                wait = _retry_after(headers, wait)
            if attempt + 1 < _MAX_ATTEMPTS:
                self.sleep(wait)
        return None


def _post(
    client: "httpx.Client", url: str, request: dict[str, Any], timeout: float
) -> tuple[int, "httpx.Headers", bytes]:
    """Post a request and read the response, limited in size and total time.

    Raises:
        ValueError: the response is too long.
        TimeoutError: it took too long; httpx itself limits only the time between two chunks.
    """
    deadline = time.monotonic() + timeout
    with client.stream("POST", url, json=request) as response:
        body = b""
        for chunk in response.iter_bytes():
            body += chunk
            if len(body) > _MAX_RESPONSE_BYTES:
                raise ValueError(f"the answer is longer than {_MAX_RESPONSE_BYTES:,} bytes")
            if time.monotonic() > deadline:
                raise TimeoutError(f"no complete answer within {timeout:g} s")
        return response.status_code, response.headers, body


def _retry_after(headers: "httpx.Headers", default: float) -> float:
    """Return the seconds the server asks to wait, capped."""
    try:
        return min(max(float(headers.get("retry-after", default)), 0.0), _MAX_WAIT)
    except ValueError:  # it may be a date
        return default


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def _message(body: str) -> str:
    """Return an error response's message, which OpenAI's servers wrap in an object."""
    try:
        message = json.loads(body)["error"]["message"]
    except (ValueError, RecursionError, LookupError, TypeError):
        message = body
    return " ".join(str(message).split())[:200]


def _content(body: bytes) -> str:
    """Return the content of a chat completion.

    Raises:
        ValueError: the body is not a chat completion.
    """
    try:
        content = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, RecursionError, LookupError, TypeError) as error:
        raise ValueError(f"the answer is not a chat completion ({type(error).__name__})") from None
    if not isinstance(content, str):
        raise ValueError("the answer is not a chat completion (its content is not text)")
    return content


def parse_grades(text: str) -> dict[str, int]:
    """Parse the four grades from a judge's answer: its last JSON object, since a model may reason first.

    Raises:
        ValueError: the object is missing, or a grade is missing or not an integer from 1 to 10.
    """
    if len(text) > _MAX_ANSWER_CHARS:
        raise ValueError(f"the answer is longer than {_MAX_ANSWER_CHARS:,} characters")
    found = None
    decoder = json.JSONDecoder()
    start = text.find("{")
    while start >= 0:
        try:
            value, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            end = start + 1
        else:
            if isinstance(value, dict) and "grammar" in value:
                found = value
        start = text.find("{", end)
    if found is None:
        beginning = " ".join(text[:200].split())[:40]
        raise ValueError(f"the answer has no JSON object with grades; it begins {beginning!r}")
    grades = {}
    for aspect in ASPECTS:
        grade = found.get(aspect)
        if isinstance(grade, bool) or not isinstance(grade, (int, float)) or grade not in range(1, 11):
            raise ValueError(f"the grade for {aspect} is not an integer from 1 to 10: {str(grade)[:40]}")
        grades[aspect] = int(grade)
    return grades
