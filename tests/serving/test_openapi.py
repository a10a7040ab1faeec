"""The OpenAPI document, and requests made up from it: whatever they hold, the server answers as it says."""

import re
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import schemathesis
from served import Served, start, stop

from tiny_lm.serving.app import create_app

EXAMPLES = 60

# A body may be too large before anything else is wrong with it.
REFUSALS = [400, 404, 405, 413, 429]
config = schemathesis.Config.from_dict({"checks": {"negative_data_rejection": {"expected-statuses": REFUSALS}}})
schema = schemathesis.openapi.from_dict(create_app([]).openapi(), config=config)


# A parameter, since pytest 9.2 makes ids of parameters alone: without one, schemathesis' tests of all routes have the
# same id, and pytest-xdist runs one test for each id.
@pytest.fixture(scope="module", params=["12"])
def brief(run_folder: Path, request: pytest.FixtureRequest) -> Iterator[Served]:
    """A server that tells short texts only."""
    served = start(run_folder, "--max-tokens", request.param)
    yield served
    told = stop(served)
    assert "Traceback" not in told, told


@schema.hook
def map_body(context: schemathesis.HookContext, body: object) -> object:
    """Name the model that is served, and let prompts fit, so that what stands behind these checks is reached."""
    if isinstance(body, dict):
        name, prompt = body.get("model"), body.get("prompt")
        body = {**body, "model": "fox"} if isinstance(name, str) and 1 < len(name) <= 1024 else body
        body = {**body, "prompt": fitting(prompt)} if "prompt" in body else body
        if isinstance(prompt, list) and len(prompt) > 4 and body.get("n") in range(1, 17):
            body = {**body, "n": 1}  # 64 texts at most, which a schema cannot say
    return body


def fitting(prompt: object) -> object:
    if isinstance(prompt, str):
        return prompt[:10] if len(prompt) < 1000 else prompt
    if isinstance(prompt, list):
        return [fitting(each) for each in prompt]
    if isinstance(prompt, int | float) and not isinstance(prompt, bool) and 0 <= prompt < 2**31:
        return prompt % 512
    return prompt


@schema.parametrize()
@hypothesis.settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
def test_requests_of_every_shape_are_answered_as_documented(case: schemathesis.Case, brief: Served) -> None:
    case.call_and_validate(base_url=brief.url)


def test_the_page_shows_every_route_and_loads_nothing(brief: Served) -> None:
    response = brief.client.get("/docs")
    assert response.headers["content-security-policy"].startswith("default-src 'none'")
    for path, operations in brief.client.get("/openapi.json").json()["paths"].items():
        for method in operations:
            assert f"<h2>{method.upper()} {path}</h2>" in response.text
    assert "<td>repetition_penalty</td><td>number ≥ 0.01 ≤ 100</td>" in response.text
    assert not re.search(r"src=|<script|<link|//", response.text.replace("<!doctype", ""))
