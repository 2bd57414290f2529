"""Concurrent work of one request."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from typing import TypeVar

Result = TypeVar("Result")


async def gather_or_cancel(makings: Sequence[Awaitable[Result]]) -> list[Result]:
    """Await all concurrently; if one fails or the client leaves, cancel the others."""
    tasks = [asyncio.ensure_future(making) for making in makings]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
