"""The OpenAPI description: responses of the routes, multipart request bodies, exact bounds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from .errors import ErrorBody
from .forms import JSON_FIELDS
from .schema import ImageFields, ImagesResponse

Responses = dict[int | str, dict[str, Any]]

# Error responses by HTTP status.
ERRORS: Responses = {
    status: {"model": ErrorBody, "description": description}
    for status, description in (
        (400, "Invalid request; error.param names the field"),
        (401, "Missing or unknown API key"),
        (403, "The server has no API keys, and the client is on another machine"),
        (404, "Unknown model or adapter"),
        (408, "The request body did not arrive in time"),
        (413, "The request body or an image is too large"),
        (429, "The server or the key is at its limit; retry after Retry-After seconds"),
        (500, "Internal error"),
        (503, "No replica is available"),
    )
}
TAKEN = {"model": ErrorBody, "description": "The name is taken, or too many adapters are loaded"}
# Error responses of the routes of adapters.
LORA_ERRORS: Responses = {status: ERRORS[status] for status in (401, 403, 404, 500)}
LORA_BODY_ERRORS: Responses = {
    **{status: ERRORS[status] for status in (400, 408, 413)},
    **LORA_ERRORS,
    409: TAKEN,
}
# Error responses of routes without a body that need an API key.
KEY_ERRORS: Responses = {status: ERRORS[status] for status in (401, 403, 500)}
EVENT = {
    "type": "object",
    "required": ["event", "data"],
    "properties": {"event": {"type": "string"}, "data": {"type": "string", "description": "JSON"}},
}
IMAGES: Responses = {
    200: {
        "model": ImagesResponse,
        "description": "The images; with stream, server-sent events with the same images",
        "content": {"text/event-stream": {"schema": EVENT}},
    }
}
BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")


class ImagesApi(FastAPI):
    """A FastAPI application with exact integer bounds and no 422 in its OpenAPI schema."""

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI schema, without FastAPI's 422: this API has its own error format."""
        if self.openapi_schema is None:
            schema = get_openapi(
                title=self.title, version="1", description=self.description, routes=self.routes
            )
            for methods in schema["paths"].values():
                for operation in methods.values():
                    operation["responses"].pop("422", None)
            for name in ("HTTPValidationError", "ValidationError"):
                schema["components"]["schemas"].pop(name, None)
            self.openapi_schema = _with_integer_bounds(schema)
        return self.openapi_schema


def multipart_body(form: type[ImageFields], files: Sequence[str]) -> dict[str, Any]:
    """OpenAPI request body of a multipart form with these files. Only the first is required.

    Fields in JSON_FIELDS are JSON text.
    """
    schema = _inlined(form.model_json_schema())
    schema["properties"] = {
        **{name: {"type": "string", "format": "binary"} for name in files},
        **schema["properties"],
    }
    schema["required"] = [files[0], *schema.get("required", [])]
    encoding = {name: {"contentType": "application/json"} for name in JSON_FIELDS}
    body = {"multipart/form-data": {"schema": schema, "encoding": encoding}}
    return {"requestBody": {"required": True, "content": body}}


def _inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """A JSON schema without references to its own `$defs`, which an OpenAPI file has elsewhere."""
    schema = dict(schema)
    kinds = schema.pop("$defs", {})

    def resolved(part: Any) -> Any:
        if isinstance(part, list):
            return [resolved(one) for one in part]
        if not isinstance(part, dict):
            return part
        if "$ref" in part:
            return resolved(kinds[part["$ref"].rpartition("/")[2]])
        return {key: resolved(one) for key, one in part.items()}

    inlined: dict[str, Any] = resolved(schema)
    return inlined


def _with_integer_bounds(schema: Any) -> Any:
    """The same schema with integers as the bounds of integers.

    FastAPI turns every bound into a float. Above 2**53 a client that compares with floats then
    accepts seeds that the server refuses.
    """
    if isinstance(schema, list):
        return [_with_integer_bounds(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    bounds = BOUNDS if schema.get("type") == "integer" else ()
    return {
        key: int(part) if key in bounds else _with_integer_bounds(part)
        for key, part in schema.items()
    }
