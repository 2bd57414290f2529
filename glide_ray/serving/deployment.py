"""The Ray Serve application: ingress (CPU) -> base -> upsampler, with one pair of stages per model.

Every deployment scales by the length of its own queue. Started by `glide serve`, or in a checkout
by `serve deploy serve/config.yaml` or `serve run serve.app:app`.
"""

from __future__ import annotations

import logging
import math
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import httpx
import ray
from fastapi import FastAPI
from ray import serve
from ray.serve.config import AutoscalingConfig

from ..config.overrides import validate
from ..config.serving import Scale, ServeConfig
from ..errors import UserError
from ..models.adapters import loras_of
from ..pretrained import shipped
from ..sampling.checks import TIMESTEPS
from ..storage import absolute, check_writable
from .api_keys import Key, read_keys
from .backend import ModelInfo, read_models
from .ingress import Ingress
from .loras import LOADED
from .routes import build_api
from .stages import LANES, Base, Stage, Upsampler
from .state import ServerState

APP = "glide"
START_SECONDS = 180  # timeout for all replicas to load their weights
HEALTH_SECONDS = 2  # period of health checks, and of counting the replicas


def build_application(
    config: ServeConfig, kinds: tuple[type[Stage], type[Stage]] = (Base, Upsampler)
) -> serve.Application:
    """Build the Ray Serve application. `kinds`: classes of the base and upsampler stages.

    Raises UserError for weights that are missing, broken or of the wrong kind, for a non-local host
    without API keys, and for a folder of adapters that cannot be written.
    """
    if config.lora_folder:  # replicas have other working directories
        folder = absolute(config.lora_folder)
        check_writable(f"{folder}/{LOADED}")
        config = config.model_copy(update={"lora_folder": folder})
    served, keys = read_models(config), read_keys(config.keys)
    _check_host(config, keys)
    gpus = ray.cluster_resources().get("GPU", 0) if ray.is_initialized() else 0
    share = _share_of_gpu(gpus, served)
    handles = {
        name: _stages(model, config, kinds, share, prefix="" if n == 0 else f"{name}-")
        for n, (name, model) in enumerate(served.items())
    }
    ingress = serve.deployment(
        name="ingress", **_options(config.ingress_scale, 256, 64, 0, config)
    )(serve.ingress(_routes(config, served))(Ingress))
    return ingress.bind(config, served, handles, keys)


def app(args: dict[str, Any]) -> serve.Application:
    """Build the application for `serve run serve.app:app base=... upsampler=...` and config.yaml.

    `args`: fields of ServeConfig. Raises UserError.
    """
    return build_application(validate(ServeConfig, args))


def _routes(config: ServeConfig, served: Mapping[str, ModelInfo]) -> FastAPI:
    """The API with the sizes and limits of the served models."""
    sizes = {size for model in served.values() for size in model.sizes}
    bases = [model.model_set.base for model in served.values()]
    upsamplers = [
        model.model_set.upsampler for model in served.values() if model.model_set.upsampler
    ]
    timesteps = (
        max(base.diffusion.steps for base in bases),
        max((upsampler.diffusion.steps for upsampler in upsamplers), default=TIMESTEPS),
    )
    clip = any(model.clip for model in served.values())
    return build_api(_replica_state, config, sorted(sizes), clip, timesteps)


def _replica_state() -> ServerState:
    """State of the ingress replica in which this is called."""
    state = serve.get_replica_context().servable_object
    assert isinstance(state, ServerState)
    return state


def _stages(
    model: ModelInfo,
    config: ServeConfig,
    kinds: tuple[type[Stage], type[Stage]],
    share: float,
    prefix: str,
) -> tuple[serve.Application, ...]:
    """Deployments of a model's base stage and, if it has one, its upsampler stage."""
    settings = model.config
    base, upsampler = kinds
    loras = tuple(
        lora.model_copy(update={"path": absolute(lora.path)}) for lora in loras_of(settings.loras)
    )
    stages = [(base, settings.base_scale, settings.base, settings.clip)]
    if settings.upsampler is not None:
        stages.append((upsampler, settings.upsampler_scale, settings.upsampler, None))
    return tuple(
        serve.deployment(name=prefix + kind.role, **_stage_options(scale, share, config))(
            kind
        ).bind(
            model.name,
            shipped.absolute(path),
            config.precision,
            config.max_in_flight,
            clip and absolute(clip),
            loras,
            config.lora_bytes,
        )
        for kind, scale, path, clip in stages
    )


def _stage_options(scale: Scale, share: float, config: ServeConfig) -> dict[str, Any]:
    ongoing = 2 * (config.max_in_flight + config.max_waiting)
    gpus = share if scale.gpus is None else scale.gpus
    return _options(scale, ongoing, target(config, gpus), share, config)


def _options(
    scale: Scale, ongoing: int, target: int, share: float, config: ServeConfig
) -> dict[str, Any]:
    """Ray Serve options of a deployment.

    `ongoing`: maximum number of requests in a replica. `target`: requests per replica above which
    Serve adds a replica. `share`: GPUs of a replica if `scale` sets none.
    """
    options: dict[str, Any] = {
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


def _share_of_gpu(gpus: float, served: Mapping[str, ModelInfo]) -> float:
    """GPUs per replica: 1, an equal fraction if there are too few for `min_replicas`, 0 if none."""
    gpu_replicas = sum(
        scale.min_replicas
        for model in served.values()
        for scale in (model.config.base_scale, model.config.upsampler_scale)[: len(model.sizes)]
        if scale.gpus is None
    )
    if not gpus or not gpu_replicas:
        return 0
    return 1 if gpus >= gpu_replicas else int(100 * gpus / gpu_replicas) / 100


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
            f"Without API keys the server listens on 127.0.0.1 only, not on {config.host}; "
            f"make a key with `glide key NAME` and set keys to its file, or set host to 127.0.0.1."
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


def check_port(config: ServeConfig) -> None:
    """Raise UserError if another program listens at the config's address.

    Two proxies of Serve would share the port, and each answer a part of the requests.
    """
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        socket.create_server((config.host, config.port), family=family).close()
    except OSError as error:
        raise UserError(
            f"{config.host}:{config.port} cannot be listened on ({error.strerror or error}); end "
            f"the program that has the port (`glide doctor` names it), or give another --port."
        ) from None


def _check_address(url: str) -> None:
    """Raise UserError if nothing answers at `url`: a running Serve keeps its old address."""
    try:
        httpx.get(f"{url}/healthz", timeout=30)
    except httpx.HTTPError:
        raise UserError(
            f"Nothing answers at {url}: this cluster's Serve was started with another address and "
            f"keeps it; use that address, or run `serve shutdown`, which ends all its applications."
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
