"""`glide bench serve`: the server against two others.

One is the same server with whole-request batching, the other answers without computing anything.
"""

from __future__ import annotations

import asyncio
import logging
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import ray
from fastapi import FastAPI
from ray import serve

from ..config import presets
from ..config.sampling import SampleOptions
from ..config.serving import ServeConfig
from ..distributed.cluster import connect
from ..models.weights import save_weights
from ..precision import DTYPES
from ..sampling.job import Job
from ..sampling.request import SampleRequest
from ..serving.deployment import HEALTH_SECONDS, build_application, deploy, listening
from ..serving.stages import Base, Stage, StageResult, Upsampler
from . import load_generator as load
from .speed import random_model, unet_config

log = logging.getLogger(__name__)

STEPS = {10: 0.8, 50: 0.2}  # number of steps -> share of the requests
# Batch size of whole-request batching, and number of closed-loop clients at saturation
CONCURRENT_REQUESTS = 8
ROUNDS, REQUESTS = 5, 40  # rounds of a comparison, requests to each server per round
SATURATED_SECONDS = 15
OVERLOAD_SECONDS = 60


# -- applications to compare with ------------------------------------------------------------------


class _WholeRequestBatching(Stage):
    """A stage that samples a batch of requests from first to last step, then answers them all."""

    @serve.batch(max_batch_size=CONCURRENT_REQUESTS, batch_wait_timeout_s=0.01)
    async def _batch(self, requests: list[SampleRequest]) -> list[Any]:
        futures = [asyncio.wrap_future(self._engine.submit(request)) for request in requests]
        return await asyncio.gather(*futures)

    async def _sampled(self, request: SampleRequest, began: float) -> StageResult:
        return self._made(await self._batch(request), began)


class WholeBase(_WholeRequestBatching, Base):
    """The base stage with whole-request batching."""


class WholeUpsampler(_WholeRequestBatching, Upsampler):
    """The upsampler stage with whole-request batching."""


class NoOpStage:
    """A stage that returns a picture of zeros."""

    def __init__(self, size: int):
        self._pixels = np.zeros((size, size, 3), np.uint8)

    async def make(self, job: Job, *inputs) -> StageResult:
        return StageResult(self._pixels, "", 0.0)


class NothingIngress:
    """Ingress that calls its stages in turn as ours does; the size of its response is fixed."""

    def __init__(self, stages: Sequence):
        self.stages = stages


def _nothing(sizes: Sequence[int], body_bytes: int) -> serve.Application:
    api, answer = FastAPI(), {"data": [{"b64_json": "A" * body_bytes}]}

    @api.post("/v1/images/generations")
    async def generations(body: dict) -> dict:
        result = None
        for stage in serve.get_replica_context().servable_object.stages:
            result = await stage.make.remote(
                Job(body["prompt"], body["seed"], sizes[-1]),
                *([] if result is None else [result.pixels]),
            )
        return answer

    stages = [
        serve.deployment(NoOpStage)
        .options(name=f"nothing{size}", max_ongoing_requests=64)
        .bind(size)
        for size in sizes
    ]
    return (
        serve.deployment(serve.ingress(api)(NothingIngress))
        .options(name="ingress", max_ongoing_requests=256)
        .bind(stages)
    )


class BareEngine(Base):
    """The base stage's engine without Serve or HTTP, as full as closed-loop clients keep it."""

    def fill(self, jobs: Sequence[Job], seconds: float) -> float:
        """Steps per second, summed over all samples, during `seconds` of full load."""
        waiting, began, before = deque(jobs), time.monotonic(), self._engine.load.sample_steps
        futures = [
            self._engine.submit(self._request(waiting.popleft()))
            for _ in range(CONCURRENT_REQUESTS)
        ]
        while time.monotonic() - began < seconds:
            done, rest = wait(futures, 0.5, FIRST_COMPLETED)
            futures = [
                *rest,
                *(self._engine.submit(self._request(waiting.popleft())) for _ in done),
            ]
        steps, spent = self._engine.load.sample_steps - before, time.monotonic() - began
        for future in futures:
            future.cancel()
        return steps / spent


# -- measurements ----------------------------------------------------------------------------------


def bench_serve(
    family: str = "nano",
    size: int = 64,
    seconds: float = 120,
) -> dict[str, Any]:
    """Cost, latency and overload of the server with random weights of the family's models.

    Random weights take as much computation as trained ones. `size`: 64 for the base model only, 256
    for both stages. Saturation is the answers per second to CONCURRENT_REQUESTS closed-loop
    clients, one per sample in flight; the open-loop load is Poisson.
    """
    upsampler = f"{family}-upsampler" if size == 256 else None
    fields = {"size": f"{size}x{size}"} | ({"upsampler_steps": 4} if upsampler else {})
    with tempfile.TemporaryDirectory() as folder:
        config = ServeConfig(
            base=_weights(f"{family}-base", folder),
            upsampler=upsampler and _weights(upsampler, folder),
            port=load.free_port(),
            max_in_flight=CONCURRENT_REQUESTS,
        )
        # No request is refused while the two servers are compared
        all_in = config.model_copy(update={"max_waiting": 10_000})
        connect(16)
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        with listening(config) as url:
            try:
                deploy(build_application(all_in), "step", "/step")
                figures = _costs(config, url, fields)
                deploy(build_application(all_in, (WholeBase, WholeUpsampler)), "whole", "/whole")
                figures |= _latencies(url, fields, seconds)
                deploy(build_application(config), "step", "/step")
                time.sleep(2 * HEALTH_SECONDS)  # until the ingress has counted its replicas
                figures |= _overload(
                    url, fields, 3 * figures["saturation_per_s"], figures["step_p95_s"]
                )
                return {
                    "models": family,
                    "size": size,
                    "steps": STEPS,
                    "cores": psutil.cpu_count(),
                    **figures,
                }
            finally:
                for name in ("step", "whole", "nothing"):
                    serve.delete(name)


def _costs(config: ServeConfig, url: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Time of a request beyond the engine's work, as a ratio to a request to the no-op server.

    For the base model alone also the steps per second at saturation, as a share of the bare
    engine's.
    """
    sizes = [64, 256] if config.upsampler else [64]
    with httpx.Client(timeout=600) as client:
        body = {"prompt": "a red apple", "seed": 0, "steps": 1, **fields} | (
            {"upsampler_steps": 1} if config.upsampler else {}
        )
        answer = client.post(f"{url}/step/v1/images/generations", json=body).json()
        deploy(_nothing(sizes, len(answer["data"][0]["b64_json"])), "nothing", "/nothing")
        pairs = []
        for _ in range(ROUNDS):
            busy, times = -_busy(client, url), {"step": 0.0, "nothing": 0.0}
            for seed in range(REQUESTS):
                for name in times:  # alternate: other load falls on both
                    began = time.monotonic()
                    client.post(
                        f"{url}/{name}/v1/images/generations", json=body | {"seed": seed}
                    ).raise_for_status()
                    times[name] += (time.monotonic() - began) / REQUESTS
            pairs.append((times["step"] - (busy + _busy(client, url)) / REQUESTS, times["nothing"]))
        serve.delete("nothing")
    ratios = [ours / nothing for ours, nothing in pairs]
    figures = {
        "own_cost_ms": _ms(ours for ours, _ in pairs),
        "nothing_ms": _ms(nothing for _, nothing in pairs),
        "cost_ratio": round(statistics.median(ratios), 2),
        "cost_ratio_min": round(min(ratios), 2),
        "cost_ratio_max": round(max(ratios), 2),
    }
    log.info(
        f"a request costs {figures['own_cost_ms']} ms beside the engine's work; one that does "
        f"nothing {figures['nothing_ms']} ms"
    )
    return figures if config.upsampler else figures | _saturation(config, url, fields)


def _saturation(config: ServeConfig, url: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Steps per second of the saturated server, and of the engine alone, measured alternately."""
    bare = (
        ray.remote(BareEngine)
        .options(num_cpus=1)
        .remote("bare", config.base, config.precision, config.max_in_flight)
    )
    bodies = load.bodies(10_000, STEPS, 1)
    jobs = [
        Job(body["prompt"], body["seed"], 64, SampleOptions(steps=body["steps"])) for body in bodies
    ]
    rates = []
    for _ in range(ROUNDS - 2):
        engine = ray.get(bare.fill.remote(jobs, SATURATED_SECONDS))
        clients = load.Clients(
            f"{url}/step",
            load.bodies(1000, STEPS, 2, **fields),
            clients=CONCURRENT_REQUESTS,
            seconds=SATURATED_SECONDS + 4,
        )
        time.sleep(4)
        before, began = _steps(url), time.monotonic()
        time.sleep(SATURATED_SECONDS - 2)
        rates.append(((_steps(url) - before) / (time.monotonic() - began), engine))
        clients.answers()
    ray.kill(bare)
    shares = [ours / engine for ours, engine in rates]
    figures = {
        "steps_per_s": round(statistics.median(a for a, _ in rates), 2),
        "bare_steps_per_s": round(statistics.median(b for _, b in rates), 2),
        "of_bare": round(statistics.median(shares), 3),
        "of_bare_min": round(min(shares), 3),
        "of_bare_max": round(max(shares), 3),
    }
    log.info(
        f"at saturation {figures['steps_per_s']} steps/s of all samples; the engine alone "
        f"{figures['bare_steps_per_s']}"
    )
    return figures


def _latencies(url: str, fields: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Saturation of both servers, and latencies of both at 70% of the saturation of each.

    Both servers receive the same requests at the same times.
    """
    rates = {}
    for name in ("step", "whole"):
        answers = load.Clients(
            f"{url}/{name}",
            load.bodies(1000, STEPS, 3, **fields),
            clients=CONCURRENT_REQUESTS,
            seconds=seconds / 2,
        ).answers()
        rates[name] = sum(answer.status == 200 for answer in answers) / max(
            answer.at + answer.seconds for answer in answers
        )
        log.info(f"{name}: {rates[name]:.3f} requests/s at saturation")
    figures: dict[str, Any] = {
        "saturation_per_s": round(rates["step"], 3),
        "whole_saturation_per_s": round(rates["whole"], 3),
        "throughput_ratio": round(rates["step"] / rates["whole"], 2),
    }
    for prefix, rate in (("", rates["step"]), ("at_wholes_", rates["whole"])):
        times = load.poisson(0.7 * rate, seconds, 4)
        bodies, latencies = load.bodies(len(times), STEPS, 5, **fields), {}
        for name in ("step", "whole"):
            answers = load.Clients(f"{url}/{name}", bodies, times).answers()
            latencies[name] = [answer.seconds for answer in answers if answer.status == 200]
            figures[f"{prefix}{name}_answered"] = f"{len(latencies[name])} of {len(answers)}"
            for part in (50, 95):
                figures[f"{prefix}{name}_p{part}_s"] = round(
                    _quantile(latencies[name], part / 100), 2
                )
            log.info(
                f"{0.7 * rate:.3f} requests/s, {name}: {figures[f'{prefix}{name}_answered']} "
                f"answered, p50 {figures[f'{prefix}{name}_p50_s']} s, p95 "
                f"{figures[f'{prefix}{name}_p95_s']} s"
            )
        figures[f"{prefix}p95_ratio"] = round(
            _quantile(latencies["step"], 0.95) / _quantile(latencies["whole"], 0.95), 2
        )
    return figures


def _overload(url: str, fields: dict[str, Any], rate: float, p95: float) -> dict[str, Any]:
    """Refusals, latency and memory at `rate` requests per second, three times the saturation.

    `p95`: 95th percentile of the latency in seconds at 70% load, for the ratio.
    """
    times = load.poisson(rate, OVERLOAD_SECONDS, 6)
    before = _memory()
    answers = load.Clients(
        f"{url}/step", load.bodies(len(times), STEPS, 7, **fields), times
    ).answers()
    after, admitted = _memory(), [answer.seconds for answer in answers if answer.status == 200]
    refused = [answer for answer in answers if answer.status == 429]
    figures = {
        "overload_requests": len(answers),
        "overload_admitted": len(admitted),
        "overload_429": len(refused),
        "overload_other": len(answers) - len(admitted) - len(refused),
        "overload_p95_s": round(_quantile(admitted, 0.95), 2),
        "overload_p95_ratio": round(_quantile(admitted, 0.95) / p95, 2),
        "refused_p95_ms": _ms([_quantile([answer.seconds for answer in refused], 0.95)]),
        "memory_mib": [round(before / 2**20), round(after / 2**20)],
    }
    log.info(f"overload: {figures}")
    return figures


def _metric(text: str, name: str) -> float:
    return sum(
        float(line.rsplit(" ", 1)[1])
        for line in text.splitlines()
        if line.startswith(f"glide_stage_{name}_total{{")
    )


def _busy(client: httpx.Client, url: str) -> float:
    return _metric(client.get(f"{url}/step/metrics").text, "busy_seconds")


def _steps(url: str) -> float:
    return _metric(httpx.get(f"{url}/step/metrics", timeout=60).text, "sample_steps")


def _memory() -> int:
    """Resident bytes of the replicas, proxy and controller, found by Ray's names for processes."""
    return sum(
        process.memory_info().rss
        for process in psutil.Process().children(recursive=True)
        if any(
            word in (process.cmdline() or [""])[0]
            for word in ("ServeReplica", "ProxyActor", "ServeController")
        )
    )


def _weights(preset: str, folder: str) -> str:
    config = unet_config(presets.get(preset))
    path = Path(folder) / f"{preset}.safetensors"
    save_weights(path, random_model(config, DTYPES["fp32"]).state_dict(), config)
    return str(path)


def _quantile(values: Sequence[float], part: float) -> float:
    return float(np.quantile(values, part)) if values else float("nan")


def _ms(seconds) -> float:
    return round(1000 * statistics.median(seconds), 1)
