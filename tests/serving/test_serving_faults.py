"""The server under faults: replicas killed, replaced, added and removed, and malformed requests.

Uses real processes over HTTP.
"""

import base64
import io
import json
import os
import random
import threading
import time
from contextlib import suppress

import httpx
import numpy as np
import psutil
import pytest
from helpers.tiny import serving_weights
from PIL import Image
from ray import serve

from glide_ray import storage
from glide_ray.bench.load_generator import free_port
from glide_ray.config.serving import Scale, ServeConfig, ServedModel

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session")]
REQUESTS = int(os.environ.get("GLIDE_TEST_REQUESTS", 40))  # sent while replicas are killed
KILL_EVERY = 6.0  # seconds
BROKEN = int(os.environ.get("GLIDE_TEST_BROKEN", 1000))  # malformed requests
TWO = Scale(min_replicas=2, max_replicas=2, cpus=0.5)
ONE_TO_TWO = Scale(max_replicas=2, cpus=0.5, up_after=1, down_after=3)


@pytest.fixture(scope="module")
def weights(tmp_path_factory, s3):
    """Two versions of a cascade, the first on S3; the second's base is also served by itself."""
    folder = tmp_path_factory.mktemp("serve")
    first, second = serving_weights(folder / "first"), serving_weights(folder / "second", seed=1)
    for role, path in first.items():
        storage.put(path, f"{s3}/weights/{role}.safetensors")
    return {role: f"{s3}/weights/{role}.safetensors" for role in first}, second


@pytest.fixture(scope="module")
def config(weights):
    return ServeConfig(
        **weights[0],
        base_scale=TWO,
        upsampler_scale=TWO,
        ingress_scale=Scale(cpus=0.5, gpus=0),
        port=free_port(),
        max_waiting=1000,
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


def processes(deployment):
    """Processes of a deployment's replicas, found by the name that Ray sets."""
    name, found = f"ServeReplica:glide:{deployment}", []
    for process in psutil.Process().children(recursive=True):  # of this Ray and no other
        with suppress(psutil.NoSuchProcess):
            if name in "".join(process.cmdline()[:1]):
                found.append(process)
    return found


@pytest.mark.chaos
def test_every_request_is_answered_with_its_picture_while_replicas_are_killed(url):
    from glide_ray.bench import load_generator as load

    wanted = pictures(load.Clients(url, asked(REQUESTS), clients=4, keep_images=True).answers())
    going = load.Clients(url, asked(REQUESTS), clients=4, keep_images=True)
    killed, draw, deadline = 0, random.Random(0), time.monotonic() + 20 * REQUESTS
    while going.going() and time.monotonic() < deadline:
        stage = ("base", "upsampler")[killed % 2]
        if there := processes(stage):
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


def test_a_model_beside_has_its_own_name_and_replicas(url):
    assert {model["id"] for model in httpx.get(f"{url}/v1/models").json()["data"]} == {
        "nano-base",
        "small",
    }
    answer = httpx.post(
        f"{url}/v1/images/generations",
        json={"prompt": "x", "model": "small", "steps": 2},
        timeout=60,
    )
    assert answer.json()["size"] == "64x64"
    refused = httpx.post(
        f"{url}/v1/images/generations",
        json={"prompt": "x", "model": "small", "size": "256x256"},
        timeout=60,
    )
    assert refused.status_code == 400
    assert "small does not make size" in refused.json()["error"]["message"]


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


def broken_request(draw):
    """(path, keyword arguments for httpx) of a request that is almost certainly invalid."""
    junk = [
        None,
        True,
        -1,
        0,
        1e308,
        "x" * draw.randrange(1, 5000),
        [],
        {},
        [1, 2],
        "NaN",
        "\u0000",
        "\U0001f600",
        2**70,
        -2.5,
        "../../etc/passwd",
        "10",
    ]
    names = [
        "prompt",
        "n",
        "size",
        "seed",
        "steps",
        "guidance_scale",
        "sampler",
        "output_format",
        "model",
        "stream",
        "best_of",
        "strength",
        draw.choice("abc") * 9,
    ]
    kind = draw.randrange(6)
    if kind == 0:
        return "generations", {
            "json": {"n": 0}
            | {draw.choice(names): draw.choice(junk) for _ in range(draw.randrange(1, 6))}
        }
    if kind == 1:
        return "generations", {
            "content": draw.randbytes(draw.randrange(0, 3000)),
            "headers": {"content-type": "application/json"},
        }
    if kind == 2:
        return "generations", {
            "content": b'{"prompt": ' + b"[" * draw.randrange(1, 100_000),
            "headers": {"content-type": "application/json"},
        }
    if kind == 3:
        return draw.choice(["edits", "variations"]), {
            "files": {"image": ("i.png", broken_image(draw), "image/png")},
            "data": {"prompt": "x", "steps": "1", "size": "64x64"},
        }
    if kind == 4:
        return "edits", {
            "files": {
                draw.choice(["image", "image[]", "mask", "picture"]): (
                    "i.png",
                    draw.randbytes(50),
                    "image/png",
                )
            },
            "data": {draw.choice(names): str(draw.choice(junk))[:2000] for _ in range(3)}
            | {"n": "0"},
        }
    return "edits", {
        "content": draw.randbytes(draw.randrange(0, 3000)),
        "headers": {
            "content-type": "multipart/form-data; boundary=" + draw.choice(["x", "", "y" * 300])
        },
    }


def broken_image(draw):
    """A truncated or corrupted image, or a bomb: few bytes but very many pixels."""
    buffer = io.BytesIO()
    kind = draw.choice(["PNG", "JPEG", "WEBP", "GIF", "BMP", "bomb"])
    if kind == "bomb":
        Image.new("1", (draw.randrange(5000, 20_000), 20_000)).save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()
    Image.new("RGB", (64, 64), "red").save(buffer, kind)
    data = bytearray(buffer.getvalue())
    for _ in range(draw.randrange(1, 20)):
        data[draw.randrange(len(data))] = draw.randrange(256)
    return bytes(data[: draw.randrange(1, len(data))])


def test_rubbish_is_refused_and_costs_neither_a_crash_nor_memory(url):
    draw, statuses, sizes = random.Random(0), {}, []
    with httpx.Client(base_url=url, timeout=60) as client:
        for n in range(BROKEN):
            path, content = broken_request(draw)
            status = client.post(f"/v1/images/{path}", **content).status_code
            statuses[status] = statuses.get(status, 0) + 1
            if n % 100 == 99:
                sizes.append(sum(process.memory_info().rss for process in processes("ingress")))
    print(statuses, [size // 2**20 for size in sizes])
    # A few corrupted images are still readable.
    assert set(statuses) <= {200, 400, 404, 413} and statuses[400] > 0.8 * BROKEN
    assert sizes[-1] < sizes[len(sizes) // 2] + 32 * 2**20
    assert httpx.get(f"{url}/readyz").status_code == 200


def test_a_client_that_leaves_a_stream_frees_its_place(url):
    with httpx.stream(
        "POST",
        f"{url}/v1/images/generations",
        timeout=60,
        json={"prompt": "x", "model": "small", "steps": 1000, "stream": True, "partial_images": 3},
    ) as answer:
        assert (
            json.loads(
                next(
                    line for line in answer.iter_lines() if line.startswith("data: ")
                ).removeprefix("data: ")
            )["partial_image_index"]
            == 0
        )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        going = [
            line
            for line in httpx.get(f"{url}/metrics").text.splitlines()
            if line.startswith("glide_stage_in_flight{") and not line.endswith(" 0.0")
        ]
        if not going:
            break
        time.sleep(0.1)
    assert not going


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
