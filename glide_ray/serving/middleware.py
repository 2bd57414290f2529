"""Middleware of every request: request id, API key and body limit; then log line and metrics."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..config.serving import ServeConfig
from . import docs_page
from .errors import ApiError, failure
from .state import ServerState

OPEN = ("/healthz", "/readyz", "/openapi.json", *docs_page.PATHS)  # paths that need no API key
MAX_JSON_BYTES = 2**20
FORM_BYTES = 2**16  # maximum size of a form without its files
BODY_SECONDS = 60  # timeout for receiving a whole body
log = logging.getLogger("ray.serve.glide")


class RequestMiddleware:
    """ASGI middleware. Routes add fields to the request's log line in `scope["glide"]`."""

    def __init__(self, app: ASGIApp, state: Callable[[], ServerState], config: ServeConfig):
        self.app, self.state, self.config = app, state, config

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        serve_id = headers.get(
            "x-request-id"
        )  # set by Ray Serve, which also returns it to the client
        request_id = serve_id or secrets.token_hex(8)
        log_fields = scope["glide"] = {"id": request_id}
        began, status, state = time.monotonic(), 0, self.state()

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if serve_id is None:
                    id_header = (b"x-request-id", request_id.encode())
                    message = {**message, "headers": [*message["headers"], id_header]}
            await send(message)

        try:
            try:
                if scope["path"].removeprefix(scope.get("root_path", "")) not in OPEN:
                    log_fields["key"] = state.admission.authenticate(
                        headers.get("authorization"), (scope.get("client") or (None,))[0]
                    )
                await self.app(scope, self._bounded(headers, receive), answer)
            except ApiError as error:
                await error.response(scope, receive, answer)
            except Exception as error:
                if status:  # the response has started; the client sees it end early
                    raise
                await failure(request_id, error).response(scope, receive, answer)
        except asyncio.CancelledError:
            status = 499  # the client left
            state.metrics.client_left()
            raise
        finally:
            _record(state, scope, status, time.monotonic() - began)

    def _bounded(self, headers: dict[str, str], receive: Receive) -> Receive:
        """Wrap `receive` to refuse a body that is too large or takes more than BODY_SECONDS.

        Checks the Content-Length at once, and the received bytes as they arrive. Raises ApiError.
        """
        form = headers.get("content-type", "").startswith("multipart/")
        limit = 2 * self.config.max_upload_bytes + FORM_BYTES if form else MAX_JSON_BYTES
        error = ApiError(
            413,
            f"The body is larger than {limit / 2**20:.3g} MiB; make it smaller.",
            code="too_large",
        )
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > limit:
            raise error
        read, complete, deadline = 0, False, time.monotonic() + BODY_SECONDS

        async def bounded() -> Message:
            nonlocal read, complete
            if complete:
                return await receive()  # the next message is the client's disconnect
            try:
                message = await asyncio.wait_for(receive(), max(0.0, deadline - time.monotonic()))
            except asyncio.TimeoutError:
                raise ApiError(
                    408,
                    f"The body did not arrive within {BODY_SECONDS} seconds; send it faster.",
                    code="too_slow",
                ) from None
            read += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if read > limit:
                raise error
            return message

        return bounded


def _record(state: ServerState, scope: Scope, status: int, seconds: float) -> None:
    """Count a finished request and write its log line."""
    state.metrics.request(getattr(scope.get("route"), "path", "other"), status, seconds)
    line = {
        "event": "request",
        **scope["glide"],
        "method": scope["method"],
        "path": scope["path"][:200],
        "status": status,
        "seconds": round(seconds, 4),
    }
    log.info(json.dumps(line))
