"""Error responses in the format of the two APIs."""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest

from tiny_lm.errors import UserError
from tiny_lm.serving.generation import ClientDisconnectedError, GenerationStoppedError, RequestTimeoutError
from tiny_lm.serving.request_handle import SchedulerFailedError
from tiny_lm.serving.scheduler import QueueFull, SchedulerStoppedError
from tiny_lm.serving.template_process import TemplateFailedError

RETRY_SECONDS = 2
"""Value of the retry-after header for clients that are refused temporarily."""

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """The request is refused.

    Attributes:
        status: HTTP status.
        message: one line for the user.
        param: the invalid field.
        code: for programs, such as ``model_not_found``.
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


def describe_error(error: Exception) -> ApiError:
    """Return the error for a client whose request failed, perhaps in the middle of a stream."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestTimeoutError):
        return ApiError(504, "the request took longer than this server allows", code="timeout")
    if isinstance(error, (GenerationStoppedError, SchedulerStoppedError)):
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


def install_error_handlers(app: FastAPI) -> None:
    """Let ``app`` return every error in the format of the API that was called."""

    async def handle_error(request: HttpRequest, error: Exception) -> JSONResponse:
        described = describe_error(error)
        return error_response(
            request.url.path, described.status, described.message, param=described.param, code=described.code
        )

    async def handle_http(request: HttpRequest, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        message = _body_problem(error)
        if error.status_code == 404:
            path = request.url.path
            is_ollama = path.startswith("/api/")
            known = [each for each in app.openapi()["paths"] if each.startswith("/api/") == is_ollama]
            message = f"{path[:100]} not found; there are: {', '.join(known)}"
        return error_response(request.url.path, error.status_code, message, headers=error.headers)

    async def handle_validation(request: HttpRequest, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        message, param = _first_problem(error)
        return error_response(request.url.path, 400, message, param=param)

    async def handle_disconnect(request: HttpRequest, error: Exception) -> Response:
        return Response(status_code=499)  # nginx's status for a client that disconnected

    app.add_exception_handler(ClientDisconnectedError, handle_disconnect)
    for kind in (
        ApiError,
        RequestTimeoutError,
        GenerationStoppedError,
        SchedulerStoppedError,
        SchedulerFailedError,
        QueueFull,
        TemplateFailedError,
        UserError,
        Exception,
    ):
        app.add_exception_handler(kind, handle_error)
    app.add_exception_handler(HTTPException, handle_http)
    app.add_exception_handler(RequestValidationError, handle_validation)


def _body_problem(error: HTTPException) -> str:
    """Return what is wrong with a request or its body in one line."""
    if isinstance(error.__cause__, UnicodeDecodeError):
        return "the body is not JSON: it is not UTF-8"
    if isinstance(error.__cause__, RecursionError):
        return "the body is nested too deeply"
    return str(error.detail)


_FIELD_TYPES = {
    "prompt": "a text, token ids, or a list of texts or of lists of ids",
    "stop": "a text or a list of texts",
    "content": "a text or a list of parts",
}
"""The types of fields that take several."""

_TYPE_NAMES = {"str", "int", "float", "bool"}
"""Names that pydantic inserts between fields in the location of a type error."""


def _first_problem(error: RequestValidationError) -> tuple[str, str | None]:
    """Return what is wrong with a body in one line, and the field at its top level."""
    problems = error.errors()
    problem = problems[0]
    if problem["type"] == "json_invalid":
        return f"the body is not valid JSON ({problem['ctx']['error']}, character {problem['loc'][1]})", None
    path = _field_path(problem)
    if not path:
        return "the body must be a JSON object, and its content type application/json", None
    # A field of several types has a problem for each type; one within a value is more specific than a wrong type.
    same_field = [each for each in problems if each["loc"][: len(path) + 1] == problem["loc"][: len(path) + 1]]
    specific = [each for each in same_field if not each["type"].endswith("_type")]
    if len(same_field) > 1 and not specific and path[-1] in _FIELD_TYPES:
        return f"{'.'.join(path)}: must be {_FIELD_TYPES[path[-1]]}", path[0]
    problem = specific[0] if specific else problem
    path = _field_path(problem)
    if problem.get("ctx", {}).get("max_length") == 0:
        return f"{'.'.join(path)}: is not supported by this server: omit it, or leave it empty", path[0]
    return f"{'.'.join(path)}: {problem['msg'].removeprefix('Value error, ')}", path[0]


def _field_path(problem: Mapping[str, Any]) -> list[str]:
    """Return the fields and indices that lead to a problem, without the names of types between them."""
    parts = problem["loc"][1:]
    return [str(part) for part in parts if isinstance(part, int) or (part.isidentifier() and part not in _TYPE_NAMES)]
