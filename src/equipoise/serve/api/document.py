"""The OpenAPI document, made of the table of endpoints and of the records that they take and give."""

from __future__ import annotations

from functools import cache
from http import HTTPStatus
from importlib.metadata import version
from typing import Any

from equipoise.serve.api.endpoints import ENDPOINTS, Endpoint
from equipoise.serve.api.errors import ErrorBody
from equipoise.serve.api.health import HealthBody

_MEANING = {
    400: "a field is wrong, and named",
    401: "there is no API key, or another",
    404: "there is no such model",
    408: "the body came too slowly",
    413: "the body is too large",
    415: "the body is not JSON",
    429: "too many wait; retry-after says when to try again",
    500: "something went wrong here",
    503: "not now",
}


@cache
def document() -> dict[str, Any]:
    """OpenAPI 3.1."""
    from pydantic import TypeAdapter

    kinds = [kind for each in ENDPOINTS for kind in (each.body, each.answer, each.chunk) if kind is not None]
    adapters = [(kind, "validation", TypeAdapter(kind)) for kind in dict.fromkeys([*kinds, ErrorBody])]
    schemas, shared = TypeAdapter.json_schemas(adapters, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    paths: dict[str, Any] = {}
    for endpoint in ENDPOINTS:
        operation = _operation(endpoint, {kind: schema for (kind, _), schema in schemas.items()})
        paths.setdefault(endpoint.path, {})[endpoint.method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "equipoise",
            "version": version("equipoise"),
            "description": "OpenAI's completions, and experts.",
        },
        "paths": paths,
        "components": {
            "schemas": shared.get("$defs", {}),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(endpoint: Endpoint, schemas: dict[Any, Any]) -> dict[str, Any]:
    answers: dict[str, Any] = {"application/json": {"schema": schemas[endpoint.answer]}}
    if endpoint.chunk is not None:
        answers["text/event-stream"] = {"itemSchema": _event(schemas[endpoint.chunk], schemas[ErrorBody])}
    responses: dict[str, Any] = {"200": {"description": "as asked", "content": answers}}
    for status in sorted(endpoint.statuses):
        error = schemas[HealthBody] if endpoint.answer is HealthBody and status == 503 else schemas[ErrorBody]
        responses[str(status)] = {
            "description": f"{HTTPStatus(status).phrase}: {_MEANING[status]}",
            "content": {"application/json": {"schema": error}},
        }
    operation: dict[str, Any] = {"summary": endpoint.summary, "responses": responses}
    if not endpoint.open:
        operation["security"] = [{}, {"key": []}]
    if endpoint.body is not None:
        content = {"application/json": {"schema": schemas[endpoint.body]}}
        operation["requestBody"] = {"required": True, "content": content}
    if "{model}" in endpoint.path:
        operation["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]
    return operation


def _event(*schemas: Any) -> dict[str, Any]:
    """One server-sent event: an object as JSON, or the last one."""
    objects = [{"type": "string", "contentMediaType": "application/json", "contentSchema": each} for each in schemas]
    data = {"anyOf": [{"const": "[DONE]"}, *objects]}
    return {"type": "object", "properties": {"data": data, "event": {"type": "string"}}, "required": ["data"]}
