"""Responses with `stream`: server-sent events with partial and finished images."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractContextManager
from itertools import count
from typing import Any

import numpy as np

from ..data.images import encode
from ..sampling.job import Job
from .errors import answer_of
from .image_response import ImageMaker
from .tasks import gather_or_cancel

Event = dict[str, Any]


async def stream_events(
    maker: ImageMaker, jobs: Sequence[Job], admitted: AbstractContextManager[Any]
) -> AsyncIterator[str]:
    """Make all images; yields server-sent events with OpenAI's names as soon as each is ready.

    `admitted` is left at the end. A fault is an event too, because status 200 is already sent.
    """
    common = {"created_at": int(time.time()), **maker.format_fields(jobs[0])}
    ready: asyncio.Queue[Event | None] = asyncio.Queue()  # None: all images done, or one failed
    with admitted:
        making = asyncio.ensure_future(
            gather_or_cancel(
                [
                    _make_image(maker, job, {"image_index": n, **common}, ready.put_nowait)
                    for n, job in enumerate(jobs)
                ]
            )
        )
        making.add_done_callback(lambda _: ready.put_nowait(None))
        try:
            while (event := await ready.get()) is not None:
                yield _text(event["type"], event)
            making.result()
        except Exception as error:
            answer = answer_of(maker.log_fields["id"], error)
            maker.log_fields["error"] = answer.status
            yield _text("error", {"type": "error", **answer.body})
        finally:
            making.cancel()


async def _make_image(
    maker: ImageMaker, job: Job, common: Event, send: Callable[[Event], None]
) -> None:
    """Make one image; sends an event for each preview and one for the finished image."""
    kind = "image_generation" if job.task == "generate" else "image_edit"
    numbers = count()

    def on_preview(pixels: np.ndarray) -> None:
        encoded = encode(_enlarged(pixels, job.size), maker.output_format, fast=True)
        send(
            {
                "type": f"{kind}.partial_image",
                "b64_json": base64.b64encode(encoded).decode(),
                "partial_image_index": next(numbers),
                **common,
            }
        )

    image = await maker.make(job, on_preview if job.previews else None)
    send(
        {
            "type": f"{kind}.completed",
            **await asyncio.to_thread(maker.item, job, image),
            **common,
            "usage": maker.usage,
            **maker.warnings,
        }
    )


def _text(kind: str, event: Event) -> str:
    """An event in the format of server-sent events."""
    return f"event: {kind}\ndata: {json.dumps(event)}\n\n"


def _enlarged(pixels: np.ndarray, size: int) -> np.ndarray:
    """Enlarge a preview from the base stage to the requested size, by repeating pixels."""
    factor = size // len(pixels)
    return pixels if factor <= 1 else np.kron(pixels, np.ones((factor, factor, 1), np.uint8))
