"""A larger model grades the stories: grammar, creativity, consistency with the beginning, and plot.

This is how the TinyStories paper evaluates (Eldan and Li 2023, arXiv:2305.07759, section 4): the judge sees the
beginning and what the model made of it, and gives a mark of 1 to 10 for each. Any server will do that speaks
``/v1/chat/completions`` as OpenAI does: Ollama, vLLM, llama.cpp, a hosted one.
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

_MOST_BYTES = 2**20  # of an answer; a comment and four marks have a few hundred
_MOST_CHARACTERS = 50_000  # of what the judge wrote, its thinking included
_MOST_STORY = 20_000  # characters of a story that are sent
_ATTEMPTS = 5  # at a request that fails in a way that may pass
_ANSWERS = 2  # times that a judge is asked about one story if its answer holds no marks
_LONGEST_WAIT = 60.0


@dataclass(frozen=True)
class Verdict:
    """What the judge thinks of all stories together."""

    url: str
    model: str
    stories: int
    graded: int
    """Stories with four valid marks; the means are over these."""
    grades: dict[str, float]
    answers: str = JUDGE_FILE
    """File in the run folder with every raw answer."""

    def to_dict(self) -> dict[str, Any]:
        """Return the verdict as JSON values."""
        return asdict(self)


@dataclass
class _Answer:
    """One request and what came of it; a line of ``judge.jsonl``."""

    story: int
    prompt: str
    text: str
    attempts: int = 0
    status: int | None = None
    answer: str | None = None
    """The raw answer: what the judge wrote, or the body of a response that is no chat completion."""
    grades: dict[str, int] | None = None
    error: str | None = None


class _RefusedError(Exception):
    """The server says that no request of this kind will succeed."""


@dataclass(frozen=True)
class Judge:
    """A model behind an OpenAI-compatible server."""

    url: str
    """Of the chat completions."""
    model: str
    key: str | None = field(default=None, repr=False)
    timeout: float = 120.0
    """Seconds that an answer may take."""
    sleep: Callable[[float], None] = time.sleep

    @classmethod
    def from_options(cls, url: str, model: str, key_variable: str | None) -> "Judge":
        """Make a judge of what the user typed.

        Args:
            url: ``http://host:port``, with or without ``/v1`` or ``/v1/chat/completions``.
            model: its name at that server.
            key_variable: environment variable with the key; None: send no key.

        Raises:
            UserError: the address is none, or the variable is not set.
        """
        try:
            parts = urlsplit(url)
            is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            is_address = False
        if not is_address:
            raise UserError(f"--judge {url}: is no address, such as http://localhost:11434/v1")
        if parts.username or parts.query:
            raise UserError("--judge: name the key with --judge-key-env, and not in the address")
        if key_variable and not os.environ.get(key_variable):
            raise UserError(f"--judge-key-env {key_variable}: this environment variable is not set")
        base = url.rstrip("/").removesuffix("/chat/completions")
        if not urlsplit(base).path.strip("/"):
            base += "/v1"
        return cls(f"{base}/chat/completions", model, os.environ[key_variable] if key_variable else None)

    def check_answers(self) -> None:
        """Check that there is a server at all, before hours of other work are done.

        Raises:
            UserError: nothing answers there.
        """
        import httpx

        try:
            with httpx.stream("GET", self.url.removesuffix("/chat/completions") + "/models", **self._options(10.0)):
                pass  # whatever it says, it is there
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise UserError(f"--judge {self.url}: does not answer ({_reason(error)})") from None

    def grade(
        self, stories: Sequence[tuple[str, str]], answers: Path, progress: Callable[[int], None] | None = None
    ) -> Verdict:
        """Have each story graded; one that the judge fails at is left out of the means.

        Args:
            stories: beginning and continuation of each.
            answers: file for every raw answer, one JSON object a line; written also where the judge gives up.
            progress: told of each story that was graded.

        Raises:
            UserError: the server refuses all requests (a wrong key or model), or no story could be graded.
        """
        import httpx

        log: list[_Answer] = []
        try:
            with httpx.Client(**self._options(self.timeout)) as client:
                for number, (prompt, text) in enumerate(stories):
                    self._grade_one(client, number, prompt, text, log)
                    if progress:
                        progress(1)
        except _RefusedError as error:
            raise UserError(f"--judge {self.url}: {error}") from None
        finally:
            write_text(answers, "".join(to_json(asdict(answer)) + "\n" for answer in log))
        graded = [answer.grades for answer in log if answer.grades]
        if not graded:
            last = next((answer.error for answer in reversed(log) if answer.error), "no stories")
            raise UserError(f"--judge {self.url}: graded none of {len(stories)} stories ({last}); see {answers}")
        means = {aspect: fmean(grades[aspect] for grades in graded) for aspect in ASPECTS}
        return Verdict(self.url, self.model, len(stories), len(graded), means)

    def _options(self, timeout: float) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        return {"timeout": timeout, "headers": headers, "follow_redirects": False}

    def _grade_one(self, client: "httpx.Client", number: int, prompt: str, text: str, log: list[_Answer]) -> None:
        """Ask about one story, again if the answer holds no marks, and log each answer."""
        for _ in range(_ANSWERS):
            answer = _Answer(number, prompt, text)
            log.append(answer)
            body = self._ask(client, answer)
            if body is None:
                return  # the server failed again and again
            try:
                answer.answer = _content(body)
                answer.grades = parse_grades(answer.answer)
            except ValueError as error:
                answer.answer = answer.answer or body.decode("utf-8", errors="replace")
                answer.error = str(error)
            else:
                return

    def _ask(self, client: "httpx.Client", answer: _Answer) -> bytes | None:
        """Return the body of the server's answer; None where there is none after several attempts.

        Raises:
            _RefusedError: the server will not answer any such request.
        """
        import httpx

        messages = [
            {"role": "system", "content": _INSTRUCTIONS},
            {"role": "user", "content": f"{answer.prompt}\n***\n{answer.text[:_MOST_STORY]}"},
        ]
        request = {"model": self.model, "messages": messages, "temperature": 0, "stream": False}
        for attempt in range(_ATTEMPTS):
            answer.attempts = attempt + 1
            wait = min(2.0**attempt, _LONGEST_WAIT)
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
            if attempt + 1 < _ATTEMPTS:
                self.sleep(wait)
        return None


def _post(
    client: "httpx.Client", url: str, request: dict[str, Any], timeout: float
) -> tuple[int, "httpx.Headers", bytes]:
    """Post a request and read the answer, up to a limit of bytes and of time in all.

    Raises:
        ValueError: the answer is too long.
        TimeoutError: it came too slowly; httpx itself limits only the time between two of its parts.
    """
    end = time.monotonic() + timeout
    with client.stream("POST", url, json=request) as response:
        body = b""
        for part in response.iter_bytes():
            body += part
            if len(body) > _MOST_BYTES:
                raise ValueError(f"the answer is longer than {_MOST_BYTES:,} bytes")
            if time.monotonic() > end:
                raise TimeoutError(f"no whole answer within {timeout:g} s")
        return response.status_code, response.headers, body


def _retry_after(headers: "httpx.Headers", otherwise: float) -> float:
    """Return how many seconds the server asks to wait, within reason."""
    try:
        return min(max(float(headers.get("retry-after", otherwise)), 0.0), _LONGEST_WAIT)
    except ValueError:  # it may be a date
        return otherwise


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def _message(body: str) -> str:
    """Return what a refusal says: OpenAI's servers wrap it in an object."""
    try:
        said = json.loads(body)["error"]["message"]
    except (ValueError, RecursionError, LookupError, TypeError):
        said = body
    return " ".join(str(said).split())[:200]


def _content(body: bytes) -> str:
    """Return what the model wrote, out of a chat completion.

    Raises:
        ValueError: the body is none.
    """
    try:
        content = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, RecursionError, LookupError, TypeError) as error:
        raise ValueError(f"the answer is no chat completion ({type(error).__name__})") from None
    if not isinstance(content, str):
        raise ValueError("the answer is no chat completion (its content is no text)")
    return content


def parse_grades(text: str) -> dict[str, int]:
    """Return the four marks of a judge's answer: those of its last JSON object, since a model may think aloud first.

    Raises:
        ValueError: there is no such object, or a mark is missing or no whole number from 1 to 10.
    """
    if len(text) > _MOST_CHARACTERS:
        raise ValueError(f"the answer is longer than {_MOST_CHARACTERS:,} characters")
    found = None
    decoder = json.JSONDecoder()
    place = text.find("{")
    while place >= 0:
        try:
            value, end = decoder.raw_decode(text, place)
        except (ValueError, RecursionError):
            end = place + 1
        else:
            if isinstance(value, dict) and "grammar" in value:
                found = value
        place = text.find("{", end)
    if found is None:
        begins = " ".join(text[:200].split())[:40]
        raise ValueError(f"the answer holds no JSON object with marks; it begins {begins!r}")
    grades = {}
    for aspect in ASPECTS:
        grade = found.get(aspect)
        if isinstance(grade, bool) or not isinstance(grade, (int, float)) or grade not in range(1, 11):
            raise ValueError(f"the mark for {aspect} is no whole number from 1 to 10: {str(grade)[:40]}")
        grades[aspect] = int(grade)
    return grades
