"""The web page on which raters compare pictures, and its server.

Nothing that it sends reveals which model made a picture.
"""

from __future__ import annotations

import re
import secrets
import socket
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import uvicorn
from fastapi import Cookie, Depends, FastAPI, HTTPException, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, RedirectResponse
from jinja2 import Environment
from pydantic import BaseModel, Field

from ..errors import UserError
from .pairing import QUESTIONS
from .votes import Votes, VotesError

NAME = re.compile(r"[\w.@-]{1,60}", re.ASCII)  # a rater's name, if the link has one
YEAR = 365 * 24 * 3600
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
POLICY = (
    "default-src 'none'; img-src 'self' data:; connect-src 'self'; style-src 'nonce-{0}'; "
    "script-src 'nonce-{0}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class RaterAnswer(BaseModel):
    """An answer from the page, resent until it is acknowledged.

    `again`: the rater went back and changed the answer.
    """

    token: str = Field(max_length=32)
    answer: Literal["left", "right", "tie"]
    seconds: float | None = Field(None, ge=0, le=1e6, allow_inf_nan=False)
    again: bool = False


def build_app(votes: Votes, pictures: Path, needed: int, link_key: str) -> FastAPI:
    """The FastAPI application.

    `needed`: number of votes for each comparison and question.
    `link_key`: key that a link must contain, even for requests from this machine, because they may
    come from a proxy.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    def admitted(glide_key: Annotated[str, Cookie()] = "") -> None:
        if not secrets.compare_digest(glide_key.encode(), link_key.encode()):
            raise HTTPException(403, "Open the link that you received: it contains a key.")

    def known(glide_rater: Annotated[str, Cookie()] = "", _: None = Depends(admitted)) -> str:
        if not NAME.fullmatch(glide_rater):
            raise HTTPException(
                403, "Open this page again: your browser has no name yet, or takes no cookies."
            )
        return glide_rater

    _add_page(app, admitted)
    _add_votes(app, votes, needed, known)

    @app.get("/pictures/{name}.png", dependencies=[Depends(admitted)])
    def picture(name: str) -> Response:
        return _picture(pictures, name)

    @app.exception_handler(VotesError)
    def unavailable(_: Request, error: VotesError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 503, HEADERS)

    return app


def _add_page(app: FastAPI, admitted: Callable[[str], None]) -> None:
    """Add the page itself, which also takes the key and the name from a link."""
    page = Environment(autoescape=True).from_string(
        (Path(__file__).with_name("rater.html")).read_text(encoding="utf-8")
    )

    @app.get("/")
    def start(
        rater: str | None = None,
        key: str | None = None,
        glide_rater: Annotated[str, Cookie()] = "",
        glide_key: Annotated[str, Cookie()] = "",
    ) -> Response:
        try:
            admitted(glide_key if key is None else key)
        except HTTPException as error:
            return PlainTextResponse(error.detail, 403, HEADERS)
        if rater is not None and not NAME.fullmatch(rater):
            return PlainTextResponse(
                "A rater's name in the link has at most 60 letters, digits, and signs of . @ - _",
                422,
                HEADERS,
            )
        # Redirect, to move name and key from the address and the browser history into cookies.
        if rater is not None or key is not None:
            response: Response = RedirectResponse("./", 303, HEADERS)
        else:
            nonce = secrets.token_urlsafe(16)
            response = HTMLResponse(
                page.render(nonce=nonce, questions=QUESTIONS),
                headers={**HEADERS, "Content-Security-Policy": POLICY.format(nonce)},
            )
        if key is not None:
            _set_cookie(response, "glide_key", key)
        if rater is not None or not NAME.fullmatch(glide_rater):
            _set_cookie(response, "glide_rater", rater or secrets.token_urlsafe(16))
        return response


def _set_cookie(response: Response, name: str, value: str) -> None:
    response.set_cookie(name, value, YEAR, httponly=True, samesite="lax")


def _add_votes(app: FastAPI, votes: Votes, needed: int, known: Callable[..., str]) -> None:
    """Add the routes for the next comparisons and for the votes."""

    def turns(rater: str) -> JSONResponse:
        shown, done, rest = votes.turns(rater, needed)
        return JSONResponse(
            {"turns": [asdict(turn) for turn in shown], "done": done, "rest": rest}, headers=HEADERS
        )

    @app.get("/turns")
    def next_turns(rater: str = Depends(known)) -> JSONResponse:
        return turns(rater)

    @app.post("/votes")
    def vote(body: RaterAnswer, rater: str = Depends(known)) -> JSONResponse:
        if not votes.answer(rater, body.token, body.answer, body.seconds, body.again):
            raise HTTPException(404, "You have no comparison of this number.")
        return turns(rater)


def _picture(folder: Path, name: str) -> Response:
    path = folder / f"{name}.png"
    if not re.fullmatch("[0-9a-f]{16}", name) or not path.exists():
        raise HTTPException(404, "There is no such picture.")
    # Send bytes, not the file: its modification time would reveal which pictures were written
    # together.
    return Response(
        path.read_bytes(),
        media_type="image/png",
        headers={**HEADERS, "Cache-Control": "private, max-age=86400, immutable"},
    )


def serve(
    app: FastAPI, host: str, port: int, link_key: str, show_link: Callable[[str], None]
) -> None:
    """Serve until interrupted; show the link as soon as it can be opened.

    Raises UserError if the address is not available.
    """
    try:
        listening = socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET
        )
    except (OSError, OverflowError) as error:
        raise UserError(
            f"{host}:{port} is not available ({getattr(error, 'strerror', None) or error}); "
            f"give another --port or --host."
        ) from None
    with listening:
        name = (
            socket.gethostname()
            if host in ("0.0.0.0", "::")
            else f"[{host}]"
            if ":" in host
            else host
        )
        show_link(f"http://{name}:{listening.getsockname()[1]}/?key={link_key}")
        uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False)).run(
            sockets=[listening]
        )
