"""Error responses in OpenAI's format: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from pydantic_core import ErrorDetails
from starlette.exceptions import HTTPException

from ..errors import nearest
from ..sampling import finite
from ..sampling.checks import RequestError

TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
# Fields that only some servers or routes accept, with the error message of the others.
UNAVAILABLE = {
    "best_of": "best_of needs a CLIP model, and this server has none.",
    "clip_scale": "clip_scale needs a CLIP model, and this server has none.",
    "strength": "strength is for edits and variations: a generation starts from noise.",
}
log = logging.getLogger("ray.serve.glide")


class ErrorDetail(BaseModel):
    """Cause of an error. `param`: the invalid field, if it is one."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Body of an error response."""

    error: ErrorDetail


class ApiError(HTTPException):
    """An error response: HTTP status, OpenAI error body and headers."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(status, message, headers)
        kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    @property
    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, headers=self.headers)


def handle_errors(api: FastAPI, fields: Mapping[str, Sequence[str]]) -> None:
    """Register exception handlers that answer in OpenAI's format.

    `fields`: valid fields of the JSON body of each path; the message about an unknown field
    suggests the nearest.
    """

    @api.exception_handler(ApiError)
    @api.exception_handler(RequestError)
    @api.exception_handler(finite.NonFiniteError)
    async def refused(request: Request, error: Exception) -> Response:
        return answer_of(request.scope["glide"]["id"], error).response

    @api.exception_handler(RequestValidationError)
    async def validation_error(request: Request, error: RequestValidationError) -> Response:
        known = fields.get(getattr(request.scope.get("route"), "path", ""), ())
        return refusal(error.errors(), known).response

    @api.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        message = {
            404: f"There is nothing at {request.url.path}; see /docs.",
            405: f"{request.url.path} does not support {request.method}; see /docs.",
        }.get(error.status_code, str(error.detail))
        return ApiError(error.status_code, message, headers=error.headers).response


def answer_of(request_id: str, error: Exception) -> ApiError:
    """The error response to any exception of a request."""
    if isinstance(error, RequestError):
        return ApiError(400, str(error), error.param)
    if isinstance(error, finite.NonFiniteError):
        log.error(json.dumps({"event": "failure", "id": request_id, "error": str(error)}))
        return ApiError(500, str(error), code=finite.CODE)
    return error if isinstance(error, ApiError) else failure(request_id, error)


def failure(request_id: str, error: Exception) -> ApiError:
    """Log an internal error. The response, status 500, names only the request id."""
    log.error(
        json.dumps({"event": "failure", "id": request_id, "error": type(error).__name__}),
        exc_info=error,
    )
    return ApiError(
        500, f"The server failed; the cause is in its log under the request id {request_id}."
    )


def refusal(errors: Sequence[ErrorDetails], known: Sequence[str]) -> ApiError:
    """Response 400 with pydantic's first error in one sentence. `known`: names of valid fields."""
    first = errors[0]
    path = [str(part) for part in first["loc"]]
    if path[:1] in (["body"], ["query"]):  # where the field was, which is not part of its name
        path = path[1:]
    param, where = (path[0], ".".join(path)) if path else (None, "The body")
    if first["type"] == "json_invalid":
        return ApiError(400, "The body is not valid JSON.", None, "invalid_json")
    if first["type"] == "extra_forbidden":
        hint = f"There is no field {where!r}"
        if len(path) == 1:
            hint = UNAVAILABLE.get(where) or f"{hint}; {nearest(where, known)}"
        else:
            hint += "; /docs describes those that there are."
        return ApiError(400, hint, param, "unknown_parameter")
    if first["type"] == "missing":
        return ApiError(400, f"{where} is missing.", param, "missing_required_parameter")
    value = repr(first["input"])
    shown = (
        f" (given: {value[:40]}{'...' if len(value) > 40 else ''})"
        if not isinstance(first["input"], dict)
        else ""
    )
    return ApiError(400, f"{where}: {first['msg']}{shown}.", param, "invalid_value")
