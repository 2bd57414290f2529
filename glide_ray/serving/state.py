"""State shared by the routes and the middleware: models, admission and metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..sampling.job import Job
from ..sampling.recipe import ModelSet
from .admission import Admission
from .metrics import Metrics, StageLoad
from .schema import GeneratedImage

PreviewCallback = Callable[[np.ndarray], None]  # receives a preview (S, S, 3) uint8


class Backend(Protocol):
    """Makes the images of one model. `sizes`: possible image sides in pixels, largest last."""

    model_set: ModelSet
    sizes: tuple[int, ...]
    clip: bool

    async def make(self, job: Job, on_preview: PreviewCallback | None = None) -> GeneratedImage:
        """Make the image of a job. `on_preview` receives `job.previews` previews."""


@dataclass
class ServerState:
    """State of the server. The first model serves requests that name no model."""

    models: Mapping[str, Backend]
    admission: Admission
    metrics: Metrics

    async def stages(self) -> tuple[list[StageLoad], bool]:
        """Loads of all stage replicas that answer, and whether every stage has at least one."""
        return [], True

    async def release_adapter(self, sha256: str) -> None:
        """Let all stage replicas free the memory of an adapter that is no longer loaded."""

    async def texts(self) -> list[str]:
        """Metrics of all ingress replicas, one text per replica."""
        return [self.metrics.text(self.admission)]
