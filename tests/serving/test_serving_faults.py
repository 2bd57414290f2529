"""The server while its replicas are killed, replaced, added and removed.

Uses real processes over HTTP.
"""

import base64
import io
import os
import random
import threading
import time

import httpx
import numpy as np
import pytest
from helpers.adapters import random_adapter
from helpers.malformed_requests import check_malformed_requests
from helpers.processes import replica_processes
from helpers.tiny import serving_weights
from PIL import Image
from ray import serve

from glide_ray import storage
from glide_ray.bench.load_generator import free_port
from glide_ray.config.serving import Scale, ServeConfig, ServedModel

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session")]
REQUESTS = int(os.environ.get("GLIDE_TEST_REQUESTS", 40))  # sent while replicas are killed
KILL_EVERY = 6.0  # seconds
TWO = Scale(min_replicas=2, max_replicas=2, cpus=0.5)
ONE_TO_TWO = Scale(max_replicas=2, cpus=0.5, up_after=1, down_after=3)


@pytest.fixture(scope="module")
def weights(tmp_path_factory, s3):
    """Two versions of a cascade, the first on S3; the second's base is also served by itself."""
    folder = tmp_path_factory.mktemp("serve")
    first, second = serving_weights(folder / "first"), serving_weights(folder / "second", seed=1)
    for role, path in first.items():
        storage.put(path, f"{s3}/weights/{role}.safetensors")
        adapter = random_adapter(folder / f"{role}-adapter.safetensors", path)
        storage.put(adapter, f"{s3}/loras/{role}.safetensors")
    return {role: f"{s3}/weights/{role}.safetensors" for role in first}, second


@pytest.fixture(scope="module")
def config(weights, s3):
    return ServeConfig(
        **weights[0],
        base_scale=TWO,
        upsampler_scale=TWO,
        ingress_scale=Scale(cpus=0.5, gpus=0),
        port=free_port(),
        max_waiting=1000,
        lora_folder=f"{s3}/loras",
        more_models={
            "small": ServedModel(base=weights[1]["base"], upsampler=None, base_scale=ONE_TO_TWO)
        },
    )


@pytest.fixture(scope="module")
def url(config):
    from glide_ray.serving.deployment import serving

    with serving(config) as url:
        yield url


def asked(count, **fields):
    return [
        {"prompt": f"a red apple {n % 5}", "seed": n, "steps": 3 + n % 4, **fields}
        for n in range(count)
    ]


def pictures(answers):
    """Pixels of each answer. PNG bytes may differ, because they also name the weights."""
    assert [answer.status for answer in answers] == [200] * len(answers)
    return [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(answer.images[0])))) for answer in answers
    ]


def test_every_request_is_answered_with_its_picture_while_replicas_are_killed(url):
    """Every second request has adapters, which a new replica reads at their first use."""
    from glide_ray.bench import load_generator as load

    for role in ("base", "upsampler"):
        file = {"name": role, "path": f"{role}.safetensors"}
        assert httpx.post(f"{url}/v1/loras", json=file, timeout=60).status_code == 200
    requests = asked(REQUESTS)
    for request in requests[::2]:
        request["loras"] = [{"name": "base", "scale": 0.5}, {"name": "upsampler"}]
    wanted = pictures(load.Clients(url, requests, clients=4, keep_images=True).answers())
    going = load.Clients(url, requests, clients=4, keep_images=True)
    killed, draw, deadline = 0, random.Random(0), time.monotonic() + 20 * REQUESTS
    while going.going() and time.monotonic() < deadline:
        stage = ("base", "upsampler")[killed % 2]
        if there := replica_processes(stage):
            draw.choice(there).kill()
            killed += 1
        time.sleep(KILL_EVERY)
    again = pictures(going.answers())
    assert killed >= 2 and all(
        np.array_equal(one, other) for one, other in zip(wanted, again, strict=True)
    )
    retries = [
        float(line.rsplit(" ", 1)[1])
        for line in httpx.get(f"{url}/metrics").text.splitlines()
        if line.startswith("glide_retries_total{")
    ]
    print(f"{killed} replicas killed, {sum(retries):.0f} retries")
    assert sum(retries) > 0


def test_load_brings_a_second_replica_and_quiet_takes_it_away_and_no_request_fails(url):
    from glide_ray.bench import load_generator as load

    counts, over = [], threading.Event()

    def watch():
        while not over.wait(0.5):
            counts.append(
                serve.status()
                .applications["glide"]
                .deployments["small-base"]
                .replica_states.get("RUNNING", 0)
            )

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        deadline = time.monotonic() + 180
        while 2 not in counts:
            assert time.monotonic() < deadline
            came = load.Clients(
                url, asked(50, model="small", size="64x64"), clients=24, seconds=8
            ).answers()
            assert {answer.status for answer in came} == {200}
        deadline = time.monotonic() + 180
        while counts[-1] != 1 and time.monotonic() < deadline:
            assert (
                httpx.post(
                    f"{url}/v1/images/generations",
                    json={"prompt": "x", "model": "small", "steps": 2},
                    timeout=60,
                ).status_code
                == 200
            )
            time.sleep(1)
        assert counts[-1] == 1
    finally:
        over.set()
        watcher.join()


def test_malformed_requests_are_refused_and_cost_neither_a_crash_nor_memory(url):
    check_malformed_requests(url, 1000, seed=1)


def test_new_weights_take_the_place_of_the_old_ones_and_no_request_fails(url, config, weights):
    """Must be the last test of this file, because it leaves other weights deployed."""
    from glide_ray.bench import load_generator as load
    from glide_ray.serving.deployment import build_application, deploy

    old = pictures(load.Clients(url, asked(6), clients=4, keep_images=True).answers())
    # Still running when the old replicas are told to stop.
    slow = {"prompt": "x", "seed": 1, "steps": 150, "size": "64x64"}
    long = load.Clients(url, [slow], clients=1, keep_images=True)
    came, deployed = [], threading.Event()

    def ask_on():
        last = False
        while not last:
            last = deployed.is_set()
            came.extend(load.Clients(url, asked(6), clients=4, keep_images=True).answers())

    asking = threading.Thread(target=ask_on)
    asking.start()
    while not came:
        time.sleep(0.1)
    try:
        deploy(build_application(config.model_copy(update=weights[1])))
    finally:
        deployed.set()
        asking.join()
    new = pictures(load.Clients(url, asked(6), clients=4, keep_images=True).answers())
    assert not any(np.array_equal(one, other) for one, other in zip(old, new, strict=True))
    kinds = [
        next(
            (
                kind
                for kind, known in (("old", old), ("new", new))
                if np.array_equal(picture, known[answer.number])
            ),
            "mixed",
        )
        for answer, picture in zip(came, pictures(came), strict=True)
    ]
    print({kind: kinds.count(kind) for kind in set(kinds)})
    assert (kinds[0], kinds[-1]) == ("old", "new") and pictures(long.answers())[0].shape == (
        64,
        64,
        3,
    )
