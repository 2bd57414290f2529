"""Clients of the server in a process of their own: `python -m glide_ray.bench.load_generator`, a plan on standard input, what came of it on standard output.

Open-loop: each request is sent at its own time, whether or not those before it have been answered. Closed: so many clients that
each send the next one when they have their answer.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import httpx

PATIENCE = 600.0  # seconds that a client waits for its answer


@dataclass(frozen=True)
class RequestResult:
    """What came of one request: when it was to be sent (seconds from the beginning), how long it took, its status, and the images (base64)."""

    number: int
    at: float
    seconds: float
    status: int
    images: tuple[str, ...] = ()
    retry_after: str | None = None


def free_port() -> int:
    """A port that nobody has at any address of this machine: some of those who are told of it listen at them all."""
    with socket.socket() as probe:
        probe.bind(("", 0))  # and never listens
        return probe.getsockname()[1]


def poisson(rate: float, seconds: float, seed: int) -> list[float]:
    """Times of arrivals at `rate` a second."""
    draw, times, now = random.Random(seed), [], 0.0
    while (now := now + draw.expovariate(rate)) < seconds:
        times.append(now)
    return times


def bodies(
    count: int, steps: Mapping[int, float], seed: int, **fields: Any
) -> list[dict[str, Any]]:
    """Generations whose steps are drawn with these weights."""
    draw = random.Random(seed)
    return [
        {
            "prompt": f"a red apple, number {n % 16}",
            "seed": n,
            "steps": draw.choices(list(steps), list(steps.values()))[0],
            **fields,
        }
        for n in range(count)
    ]


class Clients:
    """A process of clients, which goes on beside this one. It sends the requests at the times `at`, or by so many `clients`: each request once,
    or again and again for some `seconds`."""

    def __init__(
        self,
        url: str,
        requests: Sequence[dict[str, Any]],
        at: Sequence[float] | None = None,
        clients: int = 0,
        seconds: float | None = None,
        keep_images: bool = False,
    ):
        self._came = tempfile.TemporaryFile("w+")  # a pipe that nobody reads yet would stop them
        self._process = subprocess.Popen(
            [sys.executable, "-m", "glide_ray.bench.load_generator"],
            stdin=subprocess.PIPE,
            stdout=self._came,
            text=True,
            env=_environment(),
        )
        with self._process.stdin as plan:
            json.dump(
                {
                    "url": url,
                    "requests": list(requests),
                    "at": at and list(at),
                    "clients": clients,
                    "seconds": seconds,
                    "keep_images": keep_images,
                },
                plan,
            )

    def going(self) -> bool:
        """Whether there are still answers to come."""
        return self._process.poll() is None

    def answers(self) -> list[RequestResult]:
        """What came of all requests, in the order of the requests. Raises RuntimeError where the process failed."""
        if self._process.wait() != 0:
            raise RuntimeError("the process of the clients failed; it says why above")
        with self._came:
            self._came.seek(0)
            came = json.load(self._came)
        return sorted(
            (RequestResult(**{**answer, "images": tuple(answer["images"])}) for answer in came),
            key=lambda answer: answer.number,
        )


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}


async def _send(
    client: httpx.AsyncClient,
    plan: dict[str, Any],
    number: int,
    body: dict[str, Any],
    at: float,
    began: float,
) -> RequestResult:
    await asyncio.sleep(max(0.0, began + at - time.monotonic()))
    sent = time.monotonic()
    try:
        answer = await client.post("/v1/images/generations", json=body)
    except httpx.HTTPError as error:
        print(f"request {number}: {error!r}", file=sys.stderr)
        return RequestResult(number, at, time.monotonic() - sent, 0)
    images = (
        tuple(item["b64_json"] for item in answer.json()["data"])
        if plan["keep_images"] and answer.status_code == 200
        else ()
    )
    return RequestResult(
        number,
        at,
        time.monotonic() - sent,
        answer.status_code,
        images,
        answer.headers.get("retry-after"),
    )


async def _open(client: httpx.AsyncClient, plan: dict[str, Any]) -> list[RequestResult]:
    began = time.monotonic()
    return await asyncio.gather(
        *[
            _send(client, plan, number, body, at, began)
            for number, (body, at) in enumerate(zip(plan["requests"], plan["at"], strict=True))
        ]
    )


async def _closed(client: httpx.AsyncClient, plan: dict[str, Any]) -> list[RequestResult]:
    began, came = time.monotonic(), []
    # For some seconds the requests go round; without an end to the time each is sent once.
    waiting = enumerate(plan["requests"] if plan["seconds"] is None else cycle(plan["requests"]))

    async def one() -> None:
        for number, body in waiting:
            now = time.monotonic() - began
            if plan["seconds"] is not None and now >= plan["seconds"]:
                return
            came.append(await _send(client, plan, number, body, now, began))

    await asyncio.gather(*[one() for _ in range(plan["clients"])])
    return came


async def _main() -> None:
    plan = json.loads(sys.stdin.read())
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    async with httpx.AsyncClient(base_url=plan["url"], timeout=PATIENCE, limits=limits) as client:
        came = await (_open if plan["at"] is not None else _closed)(client, plan)
    json.dump([asdict(answer) for answer in came], sys.stdout)


if __name__ == "__main__":
    asyncio.run(_main())
