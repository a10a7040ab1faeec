"""The OpenAPI document as a page that loads nothing from other hosts: no scripts, fonts or images."""

from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import HTMLResponse

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'"


def add_api_page(app: FastAPI) -> None:
    """Add a page at ``/docs`` that documents the routes of ``app``."""
    from jinja2 import Environment

    source = Path(__file__).with_name("api_page.html").read_text(encoding="utf-8")
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(source)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        """Show all routes with their fields."""
        document = app.openapi()
        page = template.render(info=document["info"], routes=_routes(document))
        return HTMLResponse(page, headers={"content-security-policy": _POLICY})


def _routes(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Return method, path, description and fields of each route."""
    schemas = document["components"]["schemas"]
    return [
        {
            "method": method.upper(),
            "path": path,
            "description": operation.get("description", ""),
            "fields": _fields(operation, schemas),
        }
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    ]


def _fields(operation: dict[str, Any], schemas: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return name, type and description of each field of a route's body."""
    content = operation.get("requestBody", {}).get("content", {})
    reference = content.get("application/json", {}).get("schema", {}).get("$ref", "")
    schema = schemas.get(reference.rpartition("/")[2], {})
    required = schema.get("required", [])
    return [
        (name + (" *" if name in required else ""), _type_name(value), value.get("description", ""))
        for name, value in schema.get("properties", {}).items()
    ]


def _type_name(value: dict[str, Any]) -> str:
    """Describe the type of a field."""
    if "anyOf" in value:
        types = [_type_name(choice) for choice in value["anyOf"] if choice.get("type") != "null"]
        return " or ".join(dict.fromkeys(types))
    if "$ref" in value:
        return str(value["$ref"]).rpartition("/")[2]
    if value.get("type") == "array":
        return f"list of {_type_name(value.get('items', {}))}"
    bounds = [f"{sign} {value[key]:g}" for key, sign in _BOUNDS.items() if key in value]
    return " ".join([str(value.get("type", "anything")), *bounds])


_BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
