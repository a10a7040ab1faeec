"""The child process that renders chat templates: a downloaded template is a program, so it runs where it can be killed.

It imports nothing of the package but this file. Each line on standard input is a request in JSON, the first one the
template itself; each gets a line on standard output in response.
"""

import json
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Template

RENDER_SECONDS = 5.0
"""Timeout of one rendering; usual templates take less than a millisecond."""

MAX_OUTPUT = 2**22
"""Characters of a rendered prompt: four times the largest request body."""

_MEMORY_BYTES = 2**29
"""Address space of this process, of which Python and Jinja take about 50 MB."""

_MAX_ERROR = 300


def main() -> None:
    """Compile the template of the first line, then render the messages of each further one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, which closes standard input
    import jinja2.sandbox  # before memory is limited

    _limit_memory()
    template: Template | None = None

    def compile_template(request: dict[str, Any]) -> str:
        nonlocal template
        template = _environment().from_string(request["source"])
        return ""

    def render(request: dict[str, Any]) -> str:
        assert template is not None
        return _render(template, request)

    work = compile_template
    for line in sys.stdin:
        response = _respond(work, json.loads(line), jinja2.TemplateError)
        sys.stdout.write(json.dumps(response) + "\n")
        sys.stdout.flush()
        work = render


def _limit_memory() -> None:
    with suppress(ImportError, ValueError, OSError):  # Windows has no such limits; macOS does not enforce this one
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))


def _respond(
    work: Callable[[dict[str, Any]], str], request: dict[str, Any], refusal: type[Exception]
) -> dict[str, str]:
    """Return the text that ``work`` makes of a request, or its error; the process dies if it takes too long."""
    if hasattr(signal, "setitimer"):
        # The default action ends the process even inside a long call into C, and after its parent has died.
        signal.setitimer(signal.ITIMER_REAL, RENDER_SECONDS)
    try:
        return {"text": work(request)}
    except Exception as error:  # a template can raise anything
        what = str(error) if isinstance(error, refusal) and str(error) else f"{type(error).__name__}: {error}"
        return {"error": " ".join(what.removesuffix(": ").split())[:_MAX_ERROR]}
    finally:
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)


def _environment() -> Any:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _render(template: "Template", request: dict[str, Any]) -> str:
    """Render messages, and stop a template whose output does not end."""
    parts, size = [], 0
    for part in template.generate(**request):
        parts.append(part)
        size += len(part)
        if size > MAX_OUTPUT:
            raise ValueError(f"it writes more than {MAX_OUTPUT:,} characters")
    text = "".join(parts)
    text.encode()  # fails on lone surrogates, which no tokenizer encodes
    return text


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)
