"""The application on Ray Serve, called by OpenAI's own client over HTTP."""

import asyncio
import base64
import io
import json
import os
import re
import runpy
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
from helpers.adapters import random_adapter
from helpers.malformed_requests import check_malformed_requests
from helpers.paths import ROOT
from helpers.tiny import serving_weights
from PIL import Image
from ray import serve
from safetensors import safe_open
from safetensors.torch import save_file

from glide_ray.bench.load_generator import free_port
from glide_ray.config.sampling import SampleOptions
from glide_ray.config.serving import ServeConfig, ServedModel
from glide_ray.errors import ConfigError, UserError
from glide_ray.sampling.cascade import Cascade
from glide_ray.sampling.job import Job
from glide_ray.sampling.recipe import read_recipe
from glide_ray.sampling.reproduction import find_loras, find_models, reproduce_picture
from glide_ray.serving.metrics import Metrics

pytestmark = pytest.mark.usefixtures("ray_session")
PROMPT, STEPS = "a red apple", 3


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return serving_weights(tmp_path_factory.mktemp("serve"))


@pytest.fixture(scope="module")
def adapters(weights, tmp_path_factory):
    """A folder with adapters of the base model, cat and dog, and one of the upsampler, fine."""
    folder, roles = tmp_path_factory.mktemp("loras"), {"cat": "base", "dog": "base"}
    for seed, (name, role) in enumerate((roles | {"fine": "upsampler"}).items()):
        random_adapter(folder / f"{name}.safetensors", weights[role], seed)
    return folder


@pytest.fixture(scope="module")
def url(weights, adapters):
    from glide_ray.serving.deployment import serving

    small = ServedModel(base=weights["base"], upsampler=None)
    config = ServeConfig(
        **weights, port=free_port(), more_models={"small": small}, lora_folder=str(adapters)
    )
    with serving(config) as url:
        yield url


@pytest.fixture(scope="module")
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)


def generate(client, seed, **options):
    answer = client.images.generate(
        prompt=PROMPT, extra_body={"seed": seed, "steps": STEPS}, **options
    )
    return [decoded(item.b64_json) for item in answer.data]


def decoded(b64):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64))))


def test_openais_client_generates(client):
    images = generate(client, 1, n=2, size="256x256")
    assert [image.shape for image in images] == [(256, 256, 3)] * 2 and not np.array_equal(*images)
    assert generate(client, 1, size="64x64")[0].shape == (64, 64, 3)


def test_the_picture_over_http_is_the_one_of_the_cascade_in_this_process(client, weights):
    """Base stage, 8-bit rounding and upsampler stage in replicas, against the same in process."""
    here = (
        Cascade.load(weights["base"], weights["upsampler"])
        .generate([PROMPT], [4], SampleOptions(steps=STEPS))[0]
        .astype(int)
    )
    assert np.abs(generate(client, 4)[0].astype(int) - here).max() <= 1


def test_a_seed_gives_the_same_picture_alone_and_under_load(client):
    alone = generate(client, 7)[0]
    with ThreadPoolExecutor(6) as pool:
        crowd = list(pool.map(lambda seed: generate(client, seed)[0], [7, 1, 2, 7, 3, 7]))
    for n in (0, 3, 5):
        assert np.array_equal(crowd[n], alone)


def test_openais_client_edits_and_what_is_known_is_kept_exactly(client, weights, tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    alpha = np.full((256, 256, 1), 255, np.uint8)
    alpha[60:180, 90:200] = 0
    files = []
    for pixels in (image, np.concatenate([image, alpha], axis=2)):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        files.append(("x.png", buffer.getvalue(), "image/png"))
    answer = client.images.edit(
        image=files[0], mask=files[1], prompt="a dog", extra_body={"seed": 2, "steps": STEPS}
    )
    edited = np.asarray(Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json))))
    known = alpha[:, :, 0] > 0
    assert (
        np.array_equal(edited[known], image[known])
        and (edited[~known] != image[~known]).mean() > 0.5
    )
    assert_reproduced(tmp_path, weights, answer.data[0].b64_json)


def assert_reproduced(folder, weights, b64):
    """Check that the recipe in a PNG answer reproduces the picture from the weights alone."""
    assert differences(folder, weights, b64).max() <= 1


def differences(folder, weights, b64, loras=()):
    """A PNG answer against the picture that its recipe makes: (S, S, 3), in levels of 255."""
    (folder / "answer.png").write_bytes(base64.b64decode(b64))
    recipe, inputs, served = read_recipe(folder / "answer.png")
    models = find_models(recipe, {role: Path(path) for role, path in weights.items()})
    here = reproduce_picture(
        Cascade.load(
            models["base"],
            models.get("upsampler"),
            recipe.precision,
            loras=find_loras(recipe, [str(path) for path in loras]),
        ),
        recipe,
        inputs,
    )
    assert here.shape == served.shape
    return np.abs(here.astype(int) - served)


@pytest.mark.parametrize("size", ["64x64", "256x256"])
def test_a_png_answer_carries_the_recipe_that_makes_it_again(client, weights, tmp_path, size):
    answer = client.images.generate(
        prompt=PROMPT, size=size, extra_body={"seed": 5, "steps": STEPS, "guidance_scale": 4.0}
    )
    assert_reproduced(tmp_path, weights, answer.data[0].b64_json)
    assert str(weights["base"]).encode() not in base64.b64decode(answer.data[0].b64_json)


def test_openais_client_makes_a_variation(client, weights, tmp_path):
    image = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)).save(
        image, "PNG"
    )
    answer = client.images.create_variation(
        image=("x.png", image.getvalue(), "image/png"),
        size="256x256",
        extra_body={"seed": 2, "steps": STEPS, "strength": 0.5, "prompt": "a dog"},
    )
    assert_reproduced(tmp_path, weights, answer.data[0].b64_json)


def test_the_client_example_generates_and_edits(url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["a red apple", "a yellow star", "--url", f"{url}/v1", "--steps", str(STEPS)]
    monkeypatch.setattr(sys, "argv", ["client.py", *arguments])
    runpy.run_path(os.path.join(ROOT, "examples", "client.py"), run_name="__main__")
    generated, edited = (
        np.asarray(Image.open(tmp_path / f"from_server_{name}.png"))
        for name in ("generated", "edited")
    )
    changed = (generated != edited).any(-1)
    assert generated.shape == (256, 256, 3)
    assert not changed[:, :128].any() and changed[:, 128:].mean() > 0.5


def test_openais_client_watches_a_picture_come(client):
    seen = list(
        client.images.generate(
            prompt=PROMPT, stream=True, partial_images=3, extra_body={"seed": 1, "steps": 6}
        )
    )
    assert [event.type for event in seen] == ["image_generation.partial_image"] * 3 + [
        "image_generation.completed"
    ]
    assert [event.partial_image_index for event in seen[:3]] == [0, 1, 2]
    whole = client.images.generate(prompt=PROMPT, extra_body={"seed": 1, "steps": 6})
    assert seen[-1].b64_json == whole.data[0].b64_json


def named(*loras):
    """Fields of a request with these adapters, as (name, scale)."""
    uses = [{"name": name, "scale": scale} for name, scale in loras]
    return {"seed": 3, "steps": STEPS, "loras": uses}


def test_adapters_are_loaded_used_together_and_unloaded(client, url, weights, adapters, tmp_path):
    for name in ("cat", "dog", "fine"):
        file = {"name": name, "path": f"{name}.safetensors"}
        assert httpx.post(f"{url}/v1/loras", json=file).json()["name"] == name
    listed = httpx.get(f"{url}/v1/loras").json()["data"]
    assert [one["name"] for one in listed] == ["cat", "dog", "fine"]
    uses = [[], [("cat", 1.0)], [("dog", 0.5)], [("cat", -0.3), ("fine", 1.0)], [], [("cat", 1.0)]]

    def ask(use):
        return client.images.generate(prompt=PROMPT, extra_body=named(*use)).data[0].b64_json

    alone = [ask(use) for use in uses[:4]]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(ask, uses)) == [*alone, alone[0], alone[1]]
    pixels = [decoded(picture) for picture in alone]
    for one, other in combinations(pixels, 2):
        assert np.abs(one.astype(int) - other).mean() > 1
    files = [adapters / f"{name}.safetensors" for name in ("cat", "dog", "fine")]
    for picture in alone:
        # Random weights amplify rounding at single pixels: merged weights round otherwise.
        assert differences(tmp_path, weights, picture, files).mean() < 0.01
    assert loads(url)["base", "lora_bytes"] and loads(url)["upsampler", "lora_bytes"]
    for name in ("cat", "dog", "fine"):
        assert httpx.delete(f"{url}/v1/loras/{name}").json()["deleted"]
    assert not loads(url)["base", "lora_bytes"] + loads(url)["upsampler", "lora_bytes"]
    with pytest.raises(openai.NotFoundError, match="no adapter 'cat'; none is loaded"):
        ask([("cat", 1.0)])


def test_a_request_under_way_keeps_an_adapter_that_is_unloaded(client, url):
    file = {"name": "fine", "path": "fine.safetensors"}
    assert httpx.post(f"{url}/v1/loras", json=file).status_code == 200
    body = {"prompt": PROMPT, "extra_body": named(("fine", 1.0)) | {"steps": 50}}
    whole = client.images.generate(**body).data[0].b64_json
    seen = iter(client.images.generate(**body, stream=True, partial_images=3))
    assert next(seen).type == "image_generation.partial_image"  # of the base model
    assert httpx.delete(f"{url}/v1/loras/fine").status_code == 200
    assert [*seen][-1].b64_json == whole
    assert httpx.get(f"{url}/v1/loras").json()["data"] == []


def test_a_file_that_has_changed_since_it_was_loaded_is_refused(client, url, weights, adapters):
    """The replica reads the file at its first use, and knows it by its SHA-256."""
    random_adapter(adapters / "new.safetensors", weights["base"], 8)
    file = {"name": "new", "path": "new.safetensors"}
    assert httpx.post(f"{url}/v1/loras", json=file).status_code == 200
    random_adapter(adapters / "new.safetensors", weights["base"], 9)
    with pytest.raises(openai.BadRequestError, match="'new' has changed.*unload it") as refusal:
        client.images.generate(prompt=PROMPT, extra_body=named(("new", 1.0)))
    assert refusal.value.param == "loras"
    assert httpx.delete(f"{url}/v1/loras/new").status_code == 200


def test_a_picture_with_nan_is_a_500_with_a_code_and_its_neighbours_are_made(client, url, adapters):
    path = adapters / "nan.safetensors"
    with safe_open(adapters / "cat.safetensors", "pt") as cat:
        tensors = {name: cat.get_tensor(name) for name in cat.keys()}
        tensors["out.lora.up.weight"][:] = float("nan")
        save_file(tensors, path, cat.metadata())
    file = {"name": "nan", "path": path.name}
    assert httpx.post(f"{url}/v1/loras", json=file).status_code == 200
    before = loads(url)["base", "not_finite"]

    def ask(*loras):
        body = {"prompt": PROMPT, **named(*loras)}
        return httpx.post(f"{url}/v1/images/generations", json=body, timeout=120)

    with ThreadPoolExecutor(3) as pool:
        good, bad, also_good = pool.map(lambda loras: ask(*loras), [[], [("nan", 1.0)], []])
    assert good.status_code == 200 and good.json()["data"] == also_good.json()["data"]
    error = bad.json()["error"]
    assert (bad.status_code, error["code"]) == (500, "picture_not_finite")
    assert error["type"] == "server_error" and "adapter" in error["message"]
    assert loads(url)["base", "not_finite"] == before + 1
    assert httpx.delete(f"{url}/v1/loras/nan").status_code == 200


def test_openais_client_lists_the_models_and_the_server_is_healthy(client, url):
    assert {model.id for model in client.models.list()} == {"nano-base", "small"}
    assert httpx.get(f"{url}/healthz").json() == {"status": "ok"} and httpx.get(
        f"{url}/readyz"
    ).json() == {"status": "ready"}


def test_a_second_model_has_its_own_sizes(url):
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


def test_malformed_requests_are_refused_and_cost_neither_a_crash_nor_memory(url):
    check_malformed_requests(url, 200, seed=0)


def test_a_client_that_leaves_a_stream_frees_its_place(url):
    with httpx.stream(
        "POST",
        f"{url}/v1/images/generations",
        timeout=300,
        json={"prompt": "x", "model": "small", "steps": 400, "stream": True, "partial_images": 3},
    ) as answer:
        assert (
            json.loads(
                next(
                    line for line in answer.iter_lines() if line.startswith("data: ")
                ).removeprefix("data: ")
            )["partial_image_index"]
            == 0
        )
    deadline = time.monotonic() + 300
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


def test_openais_client_understands_a_refusal(client):
    with pytest.raises(openai.BadRequestError) as refusal:
        client.images.generate(prompt="x", n=99)
    assert refusal.value.param == "n" and "less than or equal to 4" in refusal.value.message
    with pytest.raises(openai.NotFoundError):
        client.images.generate(prompt="x", model="dall-e-3")


def test_every_answer_has_one_request_id(url):
    answer = httpx.get(f"{url}/healthz", headers={"x-request-id": "mine-1"})
    assert answer.headers.get_list("x-request-id") == ["mine-1"]


def loads(url):
    """Metrics of the stages' replicas: {(stage, name): sum over the replicas}."""
    found = Counter()
    for name, stage, value in re.findall(
        r'^glide_stage_(\w+?)(?:_total)?\{.*stage="(\w+)"\} (\S+)$',
        httpx.get(f"{url}/metrics").text,
        re.M,
    ):
        found[stage, name] += float(value)
    return found


def test_a_client_that_leaves_frees_its_place_within_two_steps(client, url):

    async def leave():
        body = {"prompt": "x", "steps": 1000, "size": "64x64"}
        async with httpx.AsyncClient(timeout=120) as asker:
            asking = asyncio.ensure_future(asker.post(f"{url}/v1/images/generations", json=body))
            while not await asyncio.to_thread(lambda: loads(url)["base", "steps"] > before):
                assert not asking.done()
            asking.cancel()

    before = loads(url)["base", "steps"]
    asyncio.run(leave())
    deadline = time.monotonic() + 60
    while loads(url)["base", "in_flight"] and time.monotonic() < deadline:
        time.sleep(0.05)
    left = loads(url)
    assert left["base", "in_flight"] == 0 and left["base", "cancelled"] >= 1
    time.sleep(0.5)
    # No steps are computed for the client that left.
    assert loads(url)["base", "steps"] == left["base", "steps"]
    assert "glide_clients_left_total" in httpx.get(f"{url}/metrics").text


@pytest.mark.parametrize("previews", [0, 3])
def test_a_picture_that_is_given_up_frees_its_place_though_its_client_stays(url, weights, previews):
    """This happens to the other pictures of a request when one of them fails."""
    from glide_ray.serving.backend import ModelInfo, RayBackend

    served, before = ModelInfo.read(ServeConfig(**weights), "auto"), loads(url)["base", "cancelled"]

    async def give_up():
        backend = RayBackend(served, serve.get_deployment_handle("base", "glide"), None, Metrics())
        making = asyncio.ensure_future(
            backend.make(
                Job("x", 0, 64, SampleOptions(steps=1000), previews=previews), lambda pixels: None
            )
        )
        while not loads(url)["base", "in_flight"]:
            await asyncio.sleep(0.05)
        making.cancel()
        await asyncio.wait([making])

    asyncio.run(give_up())
    deadline = time.monotonic() + 60
    while loads(url)["base", "in_flight"] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert (loads(url)["base", "in_flight"], loads(url)["base", "cancelled"]) == (0, before + 1)


def test_another_address_than_the_one_that_serve_has_is_refused(url, weights):
    from glide_ray.serving.deployment import _check_address, listening

    with (
        listening(ServeConfig(**weights, port=free_port())) as other,
        pytest.raises(UserError, match="was started with another address and keeps it"),
    ):
        _check_address(other)
    # The running application is not affected.
    assert httpx.get(f"{url}/healthz").status_code == 200


def test_the_server_listens_on_loopback_only(url):
    import subprocess

    port = url.rsplit(":", 1)[1]
    listening = subprocess.run(["ss", "-ltnH"], capture_output=True, text=True, check=False).stdout
    addresses = {
        line.split()[3] for line in listening.splitlines() if line.split()[3].endswith(f":{port}")
    }
    assert addresses in ({f"127.0.0.1:{port}"}, set())  # empty without the `ss` program


@pytest.mark.parametrize("gpus, width", [(0, 2), (1, 8)])
def test_a_stage_gets_another_replica_before_the_gate_refuses(gpus, width):
    """`width`: how many of the 8 samples in flight one step advances on this device."""
    from glide_ray.serving.deployment import target

    config = ServeConfig(max_in_flight=8)
    assert target(config, gpus) < width + config.max_waiting


def test_weights_that_do_not_belong_together_are_refused_before_anything_starts(
    weights, tiny_weights, tmp_path
):
    from glide_ray.serving.deployment import app, build_application

    with pytest.raises(UserError, match="There is no file .*none.safetensors"):
        build_application(
            ServeConfig(base=str(tmp_path / "none.safetensors"), upsampler=weights["upsampler"])
        )
    with pytest.raises(UserError, match="were the two exchanged"):
        build_application(ServeConfig(base=weights["upsampler"], upsampler=weights["base"]))
    with pytest.raises(UserError, match="enlarges 16 pixels and .* makes 64"):
        build_application(
            ServeConfig(base=weights["base"], upsampler=str(tiny_weights["upsampler"]))
        )
    with pytest.raises(ConfigError, match="no setting 'bas'; did you mean 'base'"):
        app({"bas": "x"})
