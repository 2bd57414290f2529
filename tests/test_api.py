"""The HTTP interface over the real cascade on tiny models, in this process and without Ray."""

import asyncio
import base64
import io
import json

import httpx
import numpy as np
import pytest
from PIL import Image

from glide_ray.cascade import Cascade, check_options
from glide_ray.config import SampleOptions, ServeConfig
from glide_ray.data.images import encode
from glide_ray.recipe import Maker
from serve.api import build_api

CONFIG = ServeConfig(max_images=3, max_upload_bytes=200_000, max_pixels=1_000_000)
GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"


class CascadeBackend:
    """Both stages in this process."""

    model, sizes, context = "tiny", (64, 256), 128

    def __init__(self, cascade):
        self.cascade, self.jobs, self.maker = cascade, [], Maker.of(cascade)

    async def make(self, job):
        options = SampleOptions(guidance_scale=job.guidance_scale, steps=job.steps or 2, upsampler_steps=2)
        check_options(options, job.seed)
        self.jobs.append(job)
        if job.image is None:
            image = self.cascade.generate([job.prompt], [job.seed], options)[0]
        else:
            small = np.asarray(Image.fromarray(job.image).resize((64, 64), Image.Resampling.BOX))
            known = job.known_mask.reshape(64, 4, 64, 4).all(axis=(1, 3))
            image = self.cascade.edit(small, known, job.prompt, job.seed, options)
        return np.kron(image, np.ones((4, 4, 1), np.uint8)) if job.size == 256 else image


@pytest.fixture(scope="module")
def backend(tiny_weights):
    return CascadeBackend(Cascade.load(tiny_weights["base"], tiny_weights["upsampler"]))


@pytest.fixture(scope="module")
def ask(backend):
    api = build_api(lambda: backend, CONFIG)

    def send(method, path, **content):
        async def once():
            transport = httpx.ASGITransport(api, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://glide") as client:
                return await client.request(method, path, **content)
        return asyncio.run(once())
    return send


def picture(answer, k=0):
    return Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][k]["b64_json"])))


def png(size=(64, 64), colour=(200, 30, 30, 255), hole=None, mode="RGBA"):
    image = Image.new("RGBA", size, colour)
    if hole:
        image.paste((0, 0, 0, 0), hole)
    buffer = io.BytesIO()
    image.convert(mode).save(buffer, "PNG")
    return buffer.getvalue()


def edit_files(image=None, mask=None):
    return {"image": ("i.png", image or png(), "image/png"), "mask": ("m.png", mask or png(hole=(8, 8, 40, 40)), "image/png")}


def refused(answer, status, message, param=...):
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and message in error["message"] and "Traceback" not in answer.text
    if param is not ...:
        assert error["param"] == param


# -- what is answered -------------------------------------------------------------------------------------------------

def test_a_generation_is_answered_as_openai_does(ask):
    answer = ask("POST", GENERATIONS, json={"prompt": "a cat", "n": 2, "seed": 5, "model": "tiny", "user": "u", "response_format": "b64_json"})
    body = answer.json()
    assert answer.status_code == 200 and isinstance(body["created"], int) and [item["seed"] for item in body["data"]] == [5, 6]
    assert picture(answer).size == (256, 256) and "warnings" not in body


def test_a_seed_gives_the_same_bytes_and_n_the_seeds_behind_it(ask):
    two = ask("POST", GENERATIONS, json={"prompt": "a cat", "n": 2, "seed": 5}).json()["data"]
    one = ask("POST", GENERATIONS, json={"prompt": "a cat", "seed": 6}).json()["data"]
    assert two[1]["b64_json"] == one[0]["b64_json"] != two[0]["b64_json"]


@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
def test_the_size_and_format_asked_for_are_given(ask, form):
    answer = ask("POST", GENERATIONS, json={"prompt": "a cat", "size": "64x64", "output_format": form})
    assert picture(answer).size == (64, 64) and picture(answer).format == form.upper()


def test_a_prompt_of_ten_thousand_characters_is_cut_and_its_sender_told(ask):
    answer = ask("POST", GENERATIONS, json={"prompt": "word " * 2000})
    assert answer.status_code == 200 and "longer than 128 tokens" in answer.json()["warnings"][0]


def test_an_edit_paints_what_is_transparent_in_the_mask(ask, backend):
    answer = ask("POST", EDITS, data={"prompt": "a dog", "n": "2", "seed": "3"}, files=edit_files())
    assert answer.status_code == 200 and [item["seed"] for item in answer.json()["data"]] == [3, 4]
    pixels = np.asarray(picture(answer))
    assert (pixels[:32, :32] == [200, 30, 30]).all() and not (pixels[40:150, 40:150] == [200, 30, 30]).all()
    assert backend.jobs[-1].known_mask.mean() == 0.75


def test_an_image_with_its_own_transparency_needs_no_mask(ask, backend):
    answer = ask("POST", EDITS, data={"prompt": "a dog"}, files={"image": ("i.png", png(hole=(0, 0, 64, 32)), "image/png")})
    assert answer.status_code == 200 and backend.jobs[-1].known_mask.mean() == 0.5


def test_a_wide_image_and_its_mask_are_cut_to_the_same_centred_square(ask, backend):
    answer = ask("POST", EDITS, data={"prompt": "x"}, files=edit_files(png((128, 64)), png((128, 64), hole=(0, 0, 64, 64))))
    assert answer.status_code == 200
    assert not backend.jobs[-1].known_mask[:, :128].any() and backend.jobs[-1].known_mask[:, 128:].all()


def test_models_and_health_are_told(ask):
    assert ask("GET", "/v1/models").json()["data"][0]["id"] == "tiny"
    assert ask("GET", "/healthz").json() == {"status": "ok"}


# -- what is refused --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("change, message, param", [
    ({"prompt": None}, "prompt", "prompt"), ({"prompt": 7}, "prompt", "prompt"), ({"n": 0}, "n", "n"), ({"n": 4}, "between 1 and 3", "n"),
    ({"n": "two"}, "n", "n"), ({"size": "512x512"}, "64x64", "size"), ({"steps": 0}, "steps", "steps"), ({"steps": 1001}, "steps", "steps"),
    ({"steps": 2.5}, "steps", "steps"), ({"guidance_scale": -1}, "between 0 and 100", "guidance_scale"), ({"seed": -1}, "seed", "seed"),
    ({"seed": 2**64}, "seed", "seed"), ({"guidance_scale": 1e9}, "between 0 and 100", "guidance_scale"),
    ({"response_format": "url"}, "b64_json", "response_format"), ({"output_format": "gif"}, "png", "output_format"),
    ({"guidence_scale": 3}, "did you mean 'guidance_scale'", "guidence_scale")])
def test_a_field_that_makes_no_sense_is_named(ask, change, message, param):
    refused(ask("POST", GENERATIONS, json={"prompt": "a cat"} | change), 400, message, param)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"prompt"', b"\xff\xfe", b'{"guidance_scale": NaN, "prompt": "x"}'])
def test_a_body_that_is_no_json_object_is_refused(ask, body):
    answer = ask("POST", GENERATIONS, content=body, headers={"content-type": "application/json"})
    refused(answer, 400, "")


def test_a_body_that_is_too_long_is_refused_unread(ask):
    refused(ask("POST", GENERATIONS, json={"prompt": "x" * 2**21}), 413, "larger than 1 MiB")


def test_an_unknown_model_path_or_method_is_said_in_openais_form(ask):
    refused(ask("POST", GENERATIONS, json={"prompt": "x", "model": "dall-e-3"}), 404, "no model 'dall-e-3'", "model")
    refused(ask("GET", "/v1/nothing"), 404, "nothing at /v1/nothing")
    refused(ask("GET", GENERATIONS), 405, "GET is not answered")


def test_an_image_that_is_none_a_broken_one_and_a_huge_one_are_refused(ask):
    refused(ask("POST", EDITS, data={"prompt": "x"}, files=edit_files(b"hello")), 400, "not an image", "image")
    refused(ask("POST", EDITS, data={"prompt": "x"}, files=edit_files(encode(np.random.default_rng(0).integers(
        0, 256, (64, 64, 3), dtype=np.uint8))[:2000])), 400, "broken", "image")
    refused(ask("POST", EDITS, data={"prompt": "x"}, files=edit_files(png((1200, 1200)))), 400, "more than the 1,000,000", "image")
    refused(ask("POST", EDITS, data={"prompt": "x"}, files=edit_files(b"x" * 300_000)), 413, "larger than", "image")


def test_masks_that_do_not_fit_are_refused(ask):
    refused(ask("POST", EDITS, data={"prompt": "x"}, files=edit_files(mask=png((32, 32), hole=(0, 0, 9, 9)))), 400,
            "32x32 pixels and the image 64x64", "mask")
    refused(ask("POST", EDITS, data={"prompt": "x"}, files=edit_files(mask=png())), 400, "nothing to paint", "mask")
    refused(ask("POST", EDITS, data={"prompt": "x"}, files=edit_files(mask=png(mode="RGB"))), 400, "no transparency", "mask")
    refused(ask("POST", EDITS, data={"prompt": "x"}, files={"image": ("i.png", png(), "image/png")}), 400, "nothing to paint", "image")


def test_edit_forms_that_make_no_sense_are_refused(ask):
    refused(ask("POST", EDITS, json={"prompt": "x"}), 400, "multipart/form-data")
    refused(ask("POST", EDITS, files=edit_files()), 400, "prompt is missing", "prompt")
    refused(ask("POST", EDITS, data={"prompt": "x"}, files={"mask": ("m.png", png(), "image/png")}), 400, "image is missing", "image")
    refused(ask("POST", EDITS, data={"prompt": "x", "n": "many"}, files=edit_files()), 400, "n", "n")
    refused(ask("POST", EDITS, data={"prompt": "x", "step": "3"}, files=edit_files()), 400, "did you mean 'steps'", "step")
    refused(ask("POST", EDITS, data={"prompt": "x", "image": "text"}, files={"mask": ("m.png", png(), "image/png")}), 400, "must be a file", "image")
    several = [("image[]", ("a.png", png(), "image/png")), ("image[]", ("b.png", png(), "image/png"))]
    refused(ask("POST", EDITS, data={"prompt": "x"}, files=several), 400, "Only one image", "image")
    refused(ask("POST", EDITS, content=b"--x\r\nrubbish", headers={"content-type": "multipart/form-data; boundary=x"}), 400, "")


def test_a_failure_of_the_backend_is_a_500_that_says_nothing_of_its_inside():
    class Failing(CascadeBackend):
        async def make(self, job):
            raise RuntimeError("secret path /etc")
    api = build_api(lambda: Failing(None), CONFIG)

    async def once():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(api, raise_app_exceptions=False), base_url="http://glide") as client:
            return await client.post(GENERATIONS, json={"prompt": "x"})
    answer = asyncio.run(once())
    refused(answer, 500, "server failed")
    assert "secret" not in answer.text and json.loads(answer.text)["error"]["type"] == "server_error"
