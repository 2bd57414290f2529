"""The page /docs, whose script and style come from the server: many networks have no internet."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import fastapi_offline  # carries Swagger UI
from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import FileResponse, HTMLResponse, RedirectResponse

SCRIPT, STYLE, ICON = "swagger-ui-bundle.js", "swagger-ui.css", "favicon.png"
FOLDER = Path(fastapi_offline.__file__).parent / "static"
PATHS = ("/", "/docs", *(f"/docs/{name}" for name in (SCRIPT, STYLE, ICON)))


def add_docs(api: FastAPI) -> None:
    """Add the page and its files to an application. Their addresses are relative to the page.

    The root redirects to the page.
    """

    @api.get("/", include_in_schema=False)
    async def root() -> RedirectResponse:
        return RedirectResponse("docs")

    @api.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return get_swagger_ui_html(
            openapi_url="openapi.json",
            title=api.title,
            swagger_js_url=f"docs/{SCRIPT}",
            swagger_css_url=f"docs/{STYLE}",
            swagger_favicon_url=f"docs/{ICON}",
        )

    for name in (SCRIPT, STYLE, ICON):
        api.get(f"/docs/{name}", include_in_schema=False)(_sender(name))


def _sender(name: str) -> Callable[[], Awaitable[FileResponse]]:
    async def send() -> FileResponse:
        return FileResponse(FOLDER / name)

    return send
