"""Errors as clients of the two APIs expect them."""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest

from tiny_lm.errors import UserError
from tiny_lm.serving.generation import ClientDisconnectedError, RequestTimeoutError, StoppedError
from tiny_lm.serving.scheduler import QueueFull, SchedulerFailedError, SchedulerStoppedError
from tiny_lm.serving.template_process import TemplateFailedError

RETRY_SECONDS = 2
"""What a client that is refused for now is told to wait."""

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that is refused, with what its client is told.

    Attributes:
        status: of HTTP.
        message: one line.
        param: the field that is to blame.
        code: a word for programs, such as ``model_not_found``.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code


def error_body(path: str, status: int, message: str, *, param: str | None = None, code: str | None = None) -> object:
    """Return the JSON of an error: Ollama's below ``/api/``, OpenAI's everywhere else."""
    if path.startswith("/api/"):
        return {"error": message}
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(
    path: str,
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """Return an error as a response."""
    extra = {"retry-after": str(RETRY_SECONDS)} if status == 429 or code == "stopping" else {}
    body = error_body(path, status, message, param=param, code=code)
    return JSONResponse(body, status, {**extra, **(headers or {})})


def describe(error: Exception) -> ApiError:
    """Tell what ended a text, for a client that has its beginning already."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestTimeoutError):
        return ApiError(504, "the request took longer than this server allows", code="timeout")
    if isinstance(error, (StoppedError, SchedulerStoppedError)):
        return ApiError(503, "the server is stopping", code="stopping")
    if isinstance(error, SchedulerFailedError):
        return ApiError(503, "this model has failed; the server's log says why", code="model_failed")
    if isinstance(error, QueueFull):
        return ApiError(429, "too many requests are waiting: try again in a moment", code="queue_full")
    if isinstance(error, TemplateFailedError):
        return ApiError(500, str(error), code="chat_template_failed")
    if isinstance(error, UserError):
        return ApiError(400, str(error))
    return ApiError(500, "the server failed; its log says why", code="internal_error")


def install(app: FastAPI) -> None:
    """Let ``app`` answer every error in the shape of its API."""

    async def tell(request: HttpRequest, error: Exception) -> JSONResponse:
        told = describe(error)
        return error_response(request.url.path, told.status, told.message, param=told.param, code=told.code)

    async def tell_http(request: HttpRequest, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        message = _body_problem(error)
        if error.status_code == 404:
            path = request.url.path
            alike = [each for each in app.openapi()["paths"] if each.startswith("/api/") == path.startswith("/api/")]
            message = f"there is no {path[:100]} here; there are: {', '.join(alike)}"
        return error_response(request.url.path, error.status_code, message, headers=error.headers)

    async def tell_invalid(request: HttpRequest, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        message, param = _first_problem(error)
        return error_response(request.url.path, 400, message, param=param)

    async def tell_nobody(request: HttpRequest, error: Exception) -> Response:
        return Response(status_code=499)  # as nginx notes a client that went away

    app.add_exception_handler(ClientDisconnectedError, tell_nobody)
    for kind in (
        ApiError,
        RequestTimeoutError,
        StoppedError,
        SchedulerStoppedError,
        SchedulerFailedError,
        QueueFull,
        TemplateFailedError,
        UserError,
        Exception,
    ):
        app.add_exception_handler(kind, tell)
    app.add_exception_handler(HTTPException, tell_http)
    app.add_exception_handler(RequestValidationError, tell_invalid)


def _body_problem(error: HTTPException) -> str:
    """Return what is wrong with a request or its body in one line."""
    if isinstance(error.__cause__, UnicodeDecodeError):
        return "the body is no JSON: it is not UTF-8"
    if isinstance(error.__cause__, RecursionError):
        return "the body is nested too deeply"
    return str(error.detail)


_KINDS = {
    "prompt": "a text, token ids, or a list of texts or of lists of ids",
    "stop": "a text or a list of texts",
    "content": "a text or a list of parts",
}
"""What a field holds that takes several kinds of values."""

_KIND_NAMES = {"str", "int", "float", "bool"}
"""What pydantic puts between fields to name the kind that a value is not."""


def _first_problem(error: RequestValidationError) -> tuple[str, str | None]:
    """Return what is wrong with a body in one line, and the field at its top level."""
    problems = error.errors()
    problem = problems[0]
    if problem["type"] == "json_invalid":
        return f"the body is no JSON ({problem['ctx']['error']}, character {problem['loc'][1]})", None
    place = _place(problem)
    if not place:
        return "the body must be a JSON object, and its content type application/json", None
    # Where a field takes several kinds of values there is a problem for each kind; one within a value says more.
    alike = [each for each in problems if each["loc"][: len(place) + 1] == problem["loc"][: len(place) + 1]]
    telling = [each for each in alike if not each["type"].endswith("_type")]
    if len(alike) > 1 and not telling and place[-1] in _KINDS:
        return f"{'.'.join(place)}: must be {_KINDS[place[-1]]}", place[0]
    problem = telling[0] if telling else problem
    place = _place(problem)
    if problem.get("ctx", {}).get("max_length") == 0:
        return f"{'.'.join(place)}: is not supported by this server: leave it out, or empty", place[0]
    return f"{'.'.join(place)}: {problem['msg'].removeprefix('Value error, ')}", place[0]


def _place(problem: Mapping[str, Any]) -> list[str]:
    """Return the fields and numbers that lead to a problem, without the names of kinds that stand between them."""
    parts = problem["loc"][1:]
    return [str(part) for part in parts if isinstance(part, int) or (part.isidentifier() and part not in _KIND_NAMES)]
