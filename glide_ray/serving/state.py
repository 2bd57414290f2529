"""What the routes and the middleware work on: the models and their backends, admission, metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..sampling.recipe import Maker
from .admission import Admission
from .metrics import Metrics, StageLoad
from .schema import GeneratedImage, Job

Show = Callable[[np.ndarray], None]


class Backend(Protocol):
    """One model: what makes its images. `sizes` are the pixels it can answer with, the largest last."""

    maker: Maker
    sizes: tuple[int, ...]
    clip: bool

    async def make(self, job: Job, show: Show | None = None) -> GeneratedImage:
        """The picture of a job; `show` is given what is predicted on the way, as often as the job says."""


@dataclass
class ServerState:
    """What the routes stand on. The first model is the one of requests that name none."""

    models: Mapping[str, Backend]
    admission: Admission
    metrics: Metrics

    async def stages(self) -> tuple[list[StageLoad], bool]:
        """The loads of all replicas that answer, and whether every stage has one."""
        return [], True

    async def texts(self) -> list[str]:
        """The figures of all ingress replicas."""
        return [self.metrics.text(self.admission)]
