"""HTTP clients for load tests, in their own process: `python -m glide_ray.bench.load_generator`.

Reads a plan from standard input and writes the results to standard output, both as JSON.
Open loop: each request is sent at its own time, whether or not earlier ones have been answered.
Closed loop: a fixed number of clients; each waits for its answer before its next request.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from typing import Any

import httpx

TIMEOUT_SECONDS = 600.0  # client timeout in seconds


@dataclass(frozen=True)
class RequestResult:
    """Outcome of one request.

    `at`: scheduled send time, seconds from the start; `seconds`: response time; `status`: HTTP
    status, 0 if the request failed without one; `images`: base64; `retry_after`: response header.
    """

    number: int
    at: float
    seconds: float
    status: int
    images: tuple[str, ...] = ()
    retry_after: str | None = None


def free_port() -> int:
    """A port that is free on every address of this machine.

    Some of the servers that use it listen on all addresses.
    """
    with socket.socket() as probe:
        probe.bind(("", 0))  # never listens
        return probe.getsockname()[1]


def poisson(rate: float, seconds: float, seed: int) -> list[float]:
    """Arrival times in seconds, up to `seconds`, of a Poisson process of `rate` per second."""
    draw, times, now = random.Random(seed), [], 0.0
    while (now := now + draw.expovariate(rate)) < seconds:
        times.append(now)
    return times


def bodies(
    count: int, steps: Mapping[int, float], seed: int, **fields: Any
) -> list[dict[str, Any]]:
    """`count` bodies of generation requests.

    `steps`: number of steps -> weight, to draw from; `fields`: added to every body.
    """
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
    """A process of clients that runs beside this one.

    With `at`, it sends each request at its time (open loop). Otherwise a number of `clients` send
    the requests in a closed loop: each request once, or repeatedly for `seconds`.
    """

    def __init__(
        self,
        url: str,
        requests: Sequence[dict[str, Any]],
        at: Sequence[float] | None = None,
        clients: int = 0,
        seconds: float | None = None,
        keep_images: bool = False,
    ):
        # A file, because a full pipe would block the clients until answers() reads it
        self._answers = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "glide_ray.bench.load_generator"],
            stdin=subprocess.PIPE,
            stdout=self._answers,
            text=True,
        )
        assert self._process.stdin is not None  # a pipe
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
        """Whether answers are still outstanding."""
        return self._process.poll() is None

    def answers(self) -> list[RequestResult]:
        """Wait for the process and return all results, in the order of the requests.

        Raises RuntimeError if the process failed.
        """
        if self._process.wait() != 0:
            raise RuntimeError("the process of the clients failed; it says why above")
        with self._answers:
            self._answers.seek(0)
            answers = json.load(self._answers)
        return sorted(
            (RequestResult(**{**answer, "images": tuple(answer["images"])}) for answer in answers),
            key=lambda answer: answer.number,
        )


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
    began, answers = time.monotonic(), []
    # With a time limit the requests repeat until it; without one each is sent once.
    waiting = enumerate(plan["requests"] if plan["seconds"] is None else cycle(plan["requests"]))

    async def one() -> None:
        for number, body in waiting:
            now = time.monotonic() - began
            if plan["seconds"] is not None and now >= plan["seconds"]:
                return
            answers.append(await _send(client, plan, number, body, now, began))

    await asyncio.gather(*[one() for _ in range(plan["clients"])])
    return answers


async def _main() -> None:
    plan = json.loads(sys.stdin.read())
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    async with httpx.AsyncClient(
        base_url=plan["url"], timeout=TIMEOUT_SECONDS, limits=limits
    ) as client:
        answers = await (_open if plan["at"] is not None else _closed)(client, plan)
    json.dump([asdict(answer) for answer in answers], sys.stdout)


if __name__ == "__main__":
    asyncio.run(_main())
