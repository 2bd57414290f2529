"""The Ray Serve application: ingress (CPU) -> base -> upsampler, with one pair of stages per model.

Every deployment scales by the length of its own queue. Started by `glide serve`, or in a checkout
by `serve deploy serve/config.yaml` or `serve run serve.app:app`.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
import ray
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import AutoscalingConfig
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponse, DeploymentResponseGenerator

from ..config.overrides import validate
from ..config.serving import Scale, ServeConfig, ServedModel
from ..errors import UserError
from ..pretrained import shipped
from ..sampling.checks import TIMESTEPS, RequestError
from ..sampling.job import Job
from ..sampling.order import CascadeImage, CascadeOrder, ScoreCall, StageCall, candidates, run_order
from ..sampling.recipe import Maker
from ..storage import absolute
from .admission import Admission
from .api_keys import Key, read_keys
from .errors import ApiError
from .metrics import Metrics, StageLoad
from .routes import build_api, together
from .schema import GeneratedImage
from .stages import LANES, Base, Stage, StageResult, Upsampler
from .state import ServerState, Show

APP = "glide"
START_SECONDS = 180  # timeout for all replicas to load their weights
# Attempts per stage call; the death of a replica causes the next attempt. The limit stops a request
# that kills every replica that runs it.
TRIES = 10
STATE_SECONDS = 2  # timeout of a query to all replicas
HEALTH_SECONDS = 2  # period of health checks, and of counting the replicas


# -- the deployed models ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Served:
    """A served model: its config, and the metadata of its weights, without their tensors."""

    name: str
    config: ServedModel
    maker: Maker

    @property
    def clip(self) -> bool:
        return self.config.clip is not None

    @property
    def sizes(self) -> tuple[int, ...]:
        return (
            self.maker.base.image_size,
            *((self.maker.upsampler.image_size,) if self.maker.upsampler else ()),
        )

    @classmethod
    def read(cls, config: ServedModel, precision: str, name: str | None = None) -> Served:
        """Read the metadata of the weights.

        Raises UserError if a file is missing, broken or of the wrong kind.
        """
        maker = Maker.read(
            {role: getattr(config, role) for role in ("base", "upsampler", "clip")},
            precision,
            "server",
        )
        return cls(name or maker.base.name, config, maker)


def read_models(config: ServeConfig) -> dict[str, Served]:
    """All models, by the names that clients use. The first serves requests that name no model."""
    first = Served.read(config, config.precision)
    if first.name in config.more_models:
        raise UserError(
            f"more_models has a model named {first.name!r}, as the first one is; "
            f"give it another name."
        )
    return {first.name: first} | {
        name: Served.read(model, config.precision, name)
        for name, model in config.more_models.items()
    }


# -- calling the stages ----------------------------------------------------------------------------


class RayBackend:
    """Calls the stages of one model.

    If a replica dies, its work is repeated on another with the same seed, which gives the same
    image.
    """

    def __init__(
        self,
        served: Served,
        base: DeploymentHandle,
        upsampler: DeploymentHandle | None,
        metrics: Metrics,
    ):
        self.name, self.maker, self.sizes, self.clip = (
            served.name,
            served.maker,
            served.sizes,
            served.clip,
        )
        self.base, self.upsampler, self._metrics = base, upsampler, metrics

    async def make(self, job: Job, show: Show | None = None) -> GeneratedImage:
        """Make the image of a job; `show` receives `job.previews` previews."""
        upsample = self.upsampler is not None and job.size == self.sizes[-1]
        order: CascadeOrder[StageResult] = run_order([candidates(job)], upsample)
        result: Any = None
        while True:
            try:
                call = order.send(result)
            except StopIteration as end:
                return _generated(end.value[0])
            if isinstance(call, ScoreCall):
                result = await self._score(call)
            else:
                result = await self._run(call, show if job.previews else None)

    async def _run(self, call: StageCall[StageResult], show: Show | None) -> list[StageResult]:
        """Run a stage for all jobs of a call at once."""
        inputs: list[tuple[np.ndarray, ...]] = [()] * len(call.jobs)
        if call.stage == "upsampler":
            inputs = [(small.pixels,) for small in call.low_res]
            if show is not None:
                show(call.low_res[0].pixels)  # the finished base image is one of the previews
        return await together(
            [
                self._stage(call.stage, job, show, *given)
                for job, given in zip(call.jobs, inputs, strict=True)
            ]
        )

    async def _score(self, call: ScoreCall[StageResult]) -> list[float]:
        """CLIP scores of base images, by one replica of the base stage."""
        images = [image.pixels for image in call.images]
        return await self._again("base", lambda: self.base.score.remote(images, call.prompt))

    async def _stage(
        self, stage: str, job: Job, show: Show | None, *inputs: np.ndarray
    ) -> StageResult:
        handle: DeploymentHandle = getattr(self, stage)
        if not job.previews:
            return await self._again(stage, lambda: handle.make.remote(job, *inputs))
        shown = 0

        async def watched(items: AsyncIterator[np.ndarray | StageResult]) -> StageResult:
            nonlocal shown
            seen = 0
            async for item in items:
                if isinstance(item, StageResult):
                    return item
                seen += 1
                if seen > shown:  # a retry on another replica repeats the first previews
                    shown = seen
                    show(item)

        return await self._again(
            stage, lambda: handle.options(stream=True).watch.remote(job, *inputs), watched
        )

    async def _again(
        self,
        stage: str,
        ask: Callable[[], DeploymentResponse | DeploymentResponseGenerator],
        read: Callable[[Any], Awaitable[Any]] = lambda response: response,
    ) -> Any:
        for attempt in range(TRIES):
            try:
                response = ask()
                return await read(response)
            except asyncio.CancelledError:
                # The client left. Without an explicit cancel, Serve lets the replica go on.
                with suppress(Exception):  # the response may have failed at the same moment
                    response.cancel()
                raise
            except RequestError as error:
                # Unwrap Ray's error, whose message contains the replica's traceback.
                raise getattr(error, "cause", error) from None
            except (RayActorError, DeploymentUnavailableError):
                self._metrics.retry(self.name, stage)
                await asyncio.sleep(min(2.0, 0.05 * 2**attempt))
        raise ApiError(
            503,
            f"The replica of the {stage} stage was lost {TRIES} times with this request; "
            f"try again later.",
            code="replica_lost",
            headers={"Retry-After": "10"},
        )


def _generated(image: CascadeImage[StageResult]) -> GeneratedImage:
    stages = {"base": image.small} | ({"upsampler": image.large} if image.large else {})
    return GeneratedImage(
        (image.large or image.small).pixels,
        image.seed,
        {name: stage.sha256 for name, stage in stages.items()},
        {name: stage.seconds for name, stage in stages.items()},
    )


class Ingress(ServerState):
    """State of an ingress replica. `build_application` binds it to the API's routes."""

    def __init__(
        self,
        config: ServeConfig,
        served: Mapping[str, Served],
        handles: Mapping[str, tuple[DeploymentHandle, ...]],
        keys: Mapping[str, Key],
    ):
        self._config, metrics = config, Metrics(serve.get_replica_context().replica_tag)
        backends = {
            name: RayBackend(served[name], *(*stages, None)[:2], metrics)
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
            self.admission.shares = len(ingresses) or self.admission.shares
            for name, backend in self.models.items():
                rooms = [
                    sum(
                        self._room(one.load.width)
                        for one in loads
                        if (one.model, one.stage) == (name, stage)
                    )
                    for stage in _roles(backend)
                ]
                if all(rooms):
                    self.admission.capacity[name] = max(1, min(rooms) // self.admission.shares)

    async def stages(self) -> tuple[list[StageLoad], bool]:
        """Loads of all stage replicas that answer, and whether every stage has at least one."""
        asked = await asyncio.gather(
            *[
                _all_replicas(getattr(backend, stage), "state", StageLoad)
                for backend in self.models.values()
                for stage in _roles(backend)
            ]
        )
        return [load for loads in asked for load in loads], all(asked)

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


async def _all_replicas(handle: DeploymentHandle, method: str, kind: type) -> list:
    """Results of a method from all replicas, without those that fail or do not answer in time.

    `kind`: type of a valid result.
    """
    try:
        answers = await handle.broadcast(method).results_async(
            timeout_s=STATE_SECONDS, return_exceptions=True
        )
    except (TimeoutError, DeploymentUnavailableError, RayActorError):
        return []
    return [answer for answer in answers if isinstance(answer, kind)]


# -- deploying -------------------------------------------------------------------------------------


def build_application(
    config: ServeConfig, kinds: tuple[type[Stage], type[Stage]] = (Base, Upsampler)
) -> serve.Application:
    """Build the Ray Serve application. `kinds`: classes of the base and upsampler stages.

    Raises UserError for weights that are missing, broken or of the wrong kind, and for a non-local
    host without API keys.
    """
    served, keys = read_models(config), read_keys(config.keys)
    _check_host(config, keys)
    gpus = ray.cluster_resources().get("GPU", 0) if ray.is_initialized() else 0
    share = _share_of_gpu(gpus, served)
    handles = {
        name: _stages(model, config, kinds, share, prefix="" if n == 0 else f"{name}-")
        for n, (name, model) in enumerate(served.items())
    }
    ingress = serve.deployment(serve.ingress(_routes(config, served))(Ingress))
    return ingress.options(
        name="ingress", **_options(config.ingress_scale, 256, 64, 0, config)
    ).bind(config, served, handles, keys)


def app(args: dict[str, Any]) -> serve.Application:
    """Build the application for `serve run serve.app:app base=... upsampler=...` and config.yaml.

    `args`: fields of ServeConfig. Raises UserError.
    """
    return build_application(validate(ServeConfig, args))


def _routes(config: ServeConfig, served: Mapping[str, Served]) -> FastAPI:
    sizes, makers = (
        {size for model in served.values() for size in model.sizes},
        [model.maker for model in served.values()],
    )
    timesteps = (
        max(maker.base.diffusion.steps for maker in makers),
        max(
            (maker.upsampler.diffusion.steps for maker in makers if maker.upsampler),
            default=TIMESTEPS,
        ),
    )
    return build_api(
        lambda: serve.get_replica_context().servable_object,
        config,
        sorted(sizes),
        any(model.clip for model in served.values()),
        timesteps,
    )


def _stages(
    model: Served,
    config: ServeConfig,
    kinds: tuple[type[Stage], type[Stage]],
    share: float,
    prefix: str,
) -> tuple[serve.Application, ...]:
    own, made, room = model.config, [], config.max_in_flight + config.max_waiting
    for kind, scale, path, clip in zip(
        kinds,
        (own.base_scale, own.upsampler_scale),
        (own.base, own.upsampler),
        (own.clip, None),
        strict=True,
    ):
        if path is not None:
            options = _options(
                scale,
                2 * room,
                target(config, share if scale.gpus is None else scale.gpus),
                share,
                config,
            )
            made.append(
                serve.deployment(kind)
                .options(name=prefix + kind.role, **options)
                .bind(
                    model.name,
                    shipped.absolute(path),
                    config.precision,
                    config.max_in_flight,
                    clip and absolute(clip),
                )
            )
    return tuple(made)


def _options(
    scale: Scale, ongoing: int, target: int, share: float, config: ServeConfig
) -> dict[str, Any]:
    """Ray Serve options of a deployment.

    `ongoing`: maximum number of requests in a replica. `target`: requests per replica above which
    Serve adds a replica. `share`: GPUs of a replica if `scale` sets none.
    """
    options = {
        "max_ongoing_requests": ongoing,
        "max_queued_requests": -1,  # unlimited, because `Admission` limits the requests
        "ray_actor_options": {
            "num_cpus": scale.cpus,
            "num_gpus": share if scale.gpus is None else scale.gpus,
        },
        "health_check_period_s": HEALTH_SECONDS,
        "graceful_shutdown_timeout_s": config.drain_seconds,
        "graceful_shutdown_wait_loop_s": 0.2,
    }
    if scale.min_replicas == scale.max_replicas:
        return options | {"num_replicas": scale.min_replicas}
    return options | {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=scale.min_replicas,
            max_replicas=scale.max_replicas,
            target_ongoing_requests=target,
            upscale_delay_s=scale.up_after,
            downscale_delay_s=scale.down_after,
            metrics_interval_s=1,
            look_back_period_s=3,
        )
    }


def target(config: ServeConfig, gpus: float) -> int:
    """Requests per replica above which another replica is started.

    Lower than what `Admission` admits per replica; otherwise it would never be exceeded.
    """
    return config.max_in_flight if gpus else min(config.max_in_flight, 2 * LANES)


def _share_of_gpu(gpus: float, served: Mapping[str, Served]) -> float:
    """GPUs per replica: 1, an equal fraction if there are too few for `min_replicas`, 0 if none."""
    wanted = sum(
        scale.min_replicas
        for model in served.values()
        for scale in (model.config.base_scale, model.config.upsampler_scale)[: len(model.sizes)]
        if scale.gpus is None
    )
    return 0 if not gpus or not wanted else 1 if gpus >= wanted else int(100 * gpus / wanted) / 100


def cpus(config: ServeConfig) -> int:
    """CPUs of all deployments at their maximum number of replicas."""
    scales = [
        config.ingress_scale,
        *(
            scale
            for model in (config, *config.more_models.values())
            for scale in (model.base_scale, model.upsampler_scale)
        ),
    ]
    return math.ceil(sum(scale.max_replicas * scale.cpus for scale in scales))


def _check_host(config: ServeConfig, keys: Mapping[str, Key]) -> None:
    if not keys and config.host not in ("127.0.0.1", "localhost", "::1"):
        raise UserError(
            f"Without API keys the server answers this machine only, and not on {config.host}; "
            f"make a key with `glide key NAME` and give its file, or leave the host at 127.0.0.1."
        )


@contextmanager
def serving(config: ServeConfig) -> Iterator[str]:
    """Serve on this machine while the context lasts; yields the base URL.

    Needs a connection to Ray. Raises UserError.
    """
    application = build_application(config)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    with listening(config) as url:
        try:
            deploy(application)
            _check_address(url)
            yield url
        finally:
            serve.delete(APP)


@contextmanager
def listening(config: ServeConfig) -> Iterator[str]:
    """Run Serve's HTTP proxy at the config's address while the context lasts; yields its URL.

    At the end Serve is shut down, unless other applications are still deployed.
    """
    serve.start(http_options={"host": config.host, "port": config.port})
    try:
        yield f"http://{config.host}:{config.port}"
    finally:
        if not serve.status().applications:
            serve.shutdown()


def _check_address(url: str) -> None:
    """Raise UserError if nothing answers at `url`: a running Serve keeps its old address."""
    try:
        httpx.get(f"{url}/healthz", timeout=30)
    except httpx.HTTPError:
        raise UserError(
            f"Nothing answers at {url}: this cluster's Serve was started with another address and "
            f"keeps it; give that one, or run `serve shutdown` where its other applications may "
            f"end."
        ) from None


def deploy(application: serve.Application, name: str = APP, route_prefix: str = "/") -> None:
    """Deploy the application, or update the running one replica by replica.

    Raises UserError if it is not running within START_SECONDS.
    """
    serve.run(
        application,
        name=name,
        route_prefix=route_prefix,
        blocking=False,
        logging_config={"log_level": "WARNING"},
    )
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        status = serve.status().applications[name]
        if status.status == "RUNNING":
            return
        if status.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            break
        time.sleep(0.2)
    raise UserError(
        f"The application did not start: {serve.status().applications[name].message[-500:]}"
    )
