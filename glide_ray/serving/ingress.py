"""The ingress deployment: admission by the number of replicas, loads and metrics of all of them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, TypeVar

from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from ..config.serving import ServeConfig
from .admission import Admission
from .api_keys import Key
from .backend import ModelInfo, RayBackend
from .metrics import Metrics, StageLoad
from .state import ServerState

STATE_SECONDS = 2  # timeout of a query to all replicas
Answer = TypeVar("Answer")


class Ingress(ServerState):
    """State of an ingress replica. `build_application` binds it to the API's routes."""

    models: Mapping[str, RayBackend]

    def __init__(
        self,
        config: ServeConfig,
        served: Mapping[str, ModelInfo],
        handles: Mapping[str, tuple[DeploymentHandle[Any], ...]],
        keys: Mapping[str, Key],
    ):
        self._config, metrics = config, Metrics(serve.get_replica_context().replica_tag)
        backends = {
            name: RayBackend(
                served[name], stages[0], stages[1] if len(stages) > 1 else None, metrics
            )
            for name, stages in handles.items()
        }
        super().__init__(
            backends,
            Admission(keys, {name: self._room(config.max_in_flight) for name in backends}),
            metrics,
        )
        # Drop the log line of every internal hop: our own line per request covers it.
        for logger in ("httpx", "ray.serve"):
            logging.getLogger(logger).setLevel(logging.WARNING)
        logging.getLogger("ray.serve.glide").setLevel(logging.INFO)

    def _room(self, width: int) -> int:
        """Images admitted per replica: `width` in progress, plus its queue."""
        return width + self._config.max_waiting

    async def check_health(self) -> None:
        """Called by Serve every HEALTH_SECONDS. Sets the capacity by the replicas that answer."""
        with suppress(Exception):  # faults of other replicas do not make this one unhealthy
            (loads, _), ingresses = await asyncio.gather(self.stages(), self._ask_ingresses("here"))
            self.admission.ingress_replicas = len(ingresses) or self.admission.ingress_replicas
            for name, backend in self.models.items():
                rooms = [
                    sum(
                        self._room(replica.load.width)
                        for replica in loads
                        if (replica.model, replica.stage) == (name, stage)
                    )
                    for stage in _roles(backend)
                ]
                if all(rooms):
                    self.admission.capacity[name] = max(
                        1, min(rooms) // self.admission.ingress_replicas
                    )

    async def stages(self) -> tuple[list[StageLoad], bool]:
        """Loads of all stage replicas that answer, and whether every stage has at least one."""
        replica_loads = await asyncio.gather(
            *[
                _all_replicas(getattr(backend, stage), "state", StageLoad)
                for backend in self.models.values()
                for stage in _roles(backend)
            ]
        )
        return [load for loads in replica_loads for load in loads], all(replica_loads)

    async def release_adapter(self, sha256: str) -> None:
        """Let all stage replicas free the memory of an adapter that is no longer loaded."""
        await asyncio.gather(
            *[
                _all_replicas(getattr(backend, stage), "release_adapter", object, sha256)
                for backend in self.models.values()
                for stage in _roles(backend)
            ]
        )

    async def texts(self) -> list[str]:
        """Metrics of all ingress replicas that answer, or at least of this one."""
        return await self._ask_ingresses("text") or [self.text()]

    def text(self) -> str:
        """Metrics of this replica."""
        return self.metrics.text(self.admission)

    def here(self) -> str:
        """Constant answer, by which other ingress replicas count this one."""
        return "here"

    async def _ask_ingresses(self, method: str) -> list[str]:
        return await _all_replicas(
            serve.get_deployment_handle("ingress", serve.get_replica_context().app_name),
            method,
            str,
        )


def _roles(backend: RayBackend) -> tuple[str, ...]:
    return ("base",) if backend.upsampler is None else ("base", "upsampler")


async def _all_replicas(
    handle: DeploymentHandle[Any], method: str, kind: type[Answer], *arguments: str
) -> list[Answer]:
    """Results of a method from all replicas, without those that fail or do not answer in time.

    `kind`: type of a valid result.
    """
    try:
        answers = await handle.broadcast(method, *arguments).results_async(
            timeout_s=STATE_SECONDS, return_exceptions=True
        )
    except (TimeoutError, DeploymentUnavailableError, RayActorError):
        return []
    return [answer for answer in answers if isinstance(answer, kind)]
