"""Admission control: API keys, and limits on images in progress and per minute.

A request beyond a limit is refused at once and costs no computation.
"""

from __future__ import annotations

import hmac
import ipaddress
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from .api_keys import Key, key_sha256
from .errors import ApiError

ANONYMOUS = "-"  # name of every client when no API keys are configured
PACE_DECAY = 0.9  # weight of the old value in the moving average of seconds per image


class Admission:
    """Limits the admitted images of each model to its `capacity`, and those of each key to its own.

    Not thread-safe: all calls come from one event loop.
    """

    def __init__(
        self,
        keys: Mapping[str, Key],
        capacity: Mapping[str, int],
        clock: Callable[[], float] = time.monotonic,
    ):
        self.keys, self.capacity = dict(keys), dict(capacity)
        # Each replica counts its own requests: it enforces an equal share of a key's limits, as it
        # has an equal share of the capacity.
        self.ingress_replicas = 1
        self.in_progress: Counter[str] = Counter()  # images admitted and not answered yet, by model
        self._by_key: Counter[str] = Counter()
        self._recent: dict[str, deque[tuple[float, int]]] = {}
        self._seconds_per_image: dict[str, float] = {}  # 1 / throughput, by model
        self._clock = clock

    def authenticate(self, authorization: str | None, client: str | None) -> str:
        """Name of the client's API key.

        Raises ApiError 401 for a missing or unknown key; if no keys are configured, 403 for a
        client on another machine.
        """
        if not self.keys:
            if client is not None and not _is_loopback(client):
                raise ApiError(
                    403,
                    "This server has no API keys and serves its own machine only; "
                    "make a key with `glide key`.",
                    code="no_keys",
                )
            return ANONYMOUS
        kind, _, key = (authorization or "").partition(" ")
        if kind.lower() != "bearer" or not key:
            raise ApiError(
                401,
                "An API key is required; send it in the header `Authorization: Bearer KEY`.",
                code="missing_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        digest = key_sha256(key.strip())
        name = None
        for candidate, known in self.keys.items():  # no early exit: timing must not reveal a match
            if hmac.compare_digest(digest, known.sha256):
                name = candidate
        if name is None:
            raise ApiError(
                401,
                "Unknown API key; check the header `Authorization`.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return name

    @contextmanager
    def admit(self, key_name: str, model: str, images: int) -> Iterator[None]:
        """Admit a request's images, and count them as admitted while the context lasts.

        Raises ApiError 429 with Retry-After in seconds, and 400 for more images than the key's
        limits ever allow.
        """
        self._check(key_name, model, images)
        began = self._clock()
        self.in_progress[model] += images
        self._by_key[key_name] += images
        if key_name in self.keys and self.keys[key_name].per_minute:
            self._recent.setdefault(key_name, deque()).append((began, images))
        try:
            yield
            # Little's law: seconds per image = latency / images in progress.
            measured = (self._clock() - began) / self.in_progress[model]
            self._seconds_per_image[model] = (
                PACE_DECAY * self._seconds_per_image.get(model, measured)
                + (1 - PACE_DECAY) * measured
            )
        finally:
            self.in_progress[model] -= images
            self._by_key[key_name] -= images

    def _check(self, key_name: str, model: str, images: int) -> None:
        key = self.keys.get(key_name)
        if key is not None:
            for limit, unit in ((key.at_once, "in progress"), (key.per_minute, "a minute")):
                if limit and images > limit:
                    raise ApiError(
                        400,
                        f"This key is limited to {limit} images {unit}, and this request asks for "
                        f"{images} (n x best_of); ask for fewer.",
                        "n",
                    )
        in_progress, seconds_per_image = (
            self.in_progress[model],
            self._seconds_per_image.get(model, 1.0),
        )
        if in_progress and in_progress + images > self.capacity[model]:
            raise _busy(
                "The server has no capacity left; try again later.",
                (in_progress + images - self.capacity[model]) * seconds_per_image,
            )
        if key is None:
            return
        # As for the capacity, always admit the only request of a key: it is within the key's limit,
        # even if it exceeds this replica's share of it.
        of_key = self._by_key[key_name]
        if key.at_once and of_key and of_key + images > self._per_replica(key.at_once):
            raise _busy(
                f"This key is limited to {key.at_once} images in progress; wait for the others.",
                images * seconds_per_image,
            )
        if key.per_minute:
            recent, now = self._recent.setdefault(key_name, deque()), self._clock()
            while recent and recent[0][0] <= now - 60:
                recent.popleft()
            if recent and sum(count for _, count in recent) + images > self._per_replica(
                key.per_minute
            ):
                raise _busy(
                    f"This key is limited to {key.per_minute} images a minute; try again later.",
                    recent[0][0] + 60 - now,
                )

    def _per_replica(self, limit: int) -> int:
        return max(1, limit // self.ingress_replicas)


def _busy(message: str, seconds: float) -> ApiError:
    return ApiError(
        429,
        message,
        code="rate_limit_exceeded",
        headers={"Retry-After": str(max(1, math.ceil(seconds)))},
    )


def _is_loopback(client: str) -> bool:
    try:
        address = ipaddress.ip_address(client)
    except ValueError:  # a Unix socket's path or a test client's name: not another machine
        return True
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback
