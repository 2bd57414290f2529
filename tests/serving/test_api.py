"""The HTTP API with a real cascade of tiny models, in this process and without Ray."""

import asyncio
import base64
import io
import json
import logging
import re
from dataclasses import replace
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from helpers.api import CONFIG, CascadeBackend, asking
from helpers.colours import display_p3_to_srgb, p3_profile
from helpers.tiny import tiny, with_nan_for
from PIL import Image, ImageFilter

from glide_ray.config.sampling import SampleOptions
from glide_ray.config.serving import ServeConfig
from glide_ray.data.images import encode
from glide_ray.errors import UserError
from glide_ray.models.adapter_cache import AdapterCache
from glide_ray.models.unet import GlideUNet
from glide_ray.sampling.cascade import Cascade
from glide_ray.sampling.checks import RequestError
from glide_ray.sampling.engine import Engine, Load
from glide_ray.sampling.job import Job, Source
from glide_ray.sampling.stepper import Stepper
from glide_ray.serving.admission import Admission
from glide_ray.serving.api_keys import Key, key_sha256, new_key, read_keys
from glide_ray.serving.errors import ApiError
from glide_ray.serving.metrics import Metrics, StageLoad
from glide_ray.serving.routes import build_api
from glide_ray.serving.schema import GeneratedImage

GENERATIONS, EDITS, VARIATIONS = (
    f"/v1/images/{kind}" for kind in ("generations", "edits", "variations")
)


@pytest.fixture(scope="module")
def backend(tiny_weights):
    return CascadeBackend(
        Cascade.load(tiny_weights["base"], tiny_weights["upsampler"], clip=tiny_weights["clip"])
    )


@pytest.fixture(scope="module")
def ask(backend):
    return asking(backend)


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
    return {
        "image": ("i.png", image or png(), "image/png"),
        "mask": ("m.png", mask or png(hole=(8, 8, 40, 40)), "image/png"),
    }


def refused(answer, status, message, param=...):
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert (
        set(error) == {"message", "type", "param", "code"}
        and message in error["message"]
        and "Traceback" not in answer.text
    )
    if param is not ...:
        assert error["param"] == param


# -- responses -------------------------------------------------------------------------------------


def test_a_generation_is_answered_as_openai_does(ask):
    answer = ask(
        "POST",
        GENERATIONS,
        json={
            "prompt": "a cat",
            "n": 2,
            "seed": 5,
            "model": "tiny",
            "user": "u",
            "response_format": "b64_json",
            "quality": "auto",
            "background": "opaque",
            "moderation": "low",
            "style": "vivid",
        },
    )
    body = answer.json()
    assert (
        answer.status_code == 200
        and isinstance(body["created"], int)
        and [item["seed"] for item in body["data"]] == [5, 6]
    )
    assert picture(answer).size == (64, 64) and "warnings" not in body and body["size"] == "64x64"
    assert body["usage"] == {
        "input_tokens": 2,
        "output_tokens": 0,
        "total_tokens": 2,
        "input_tokens_details": {"text_tokens": 2, "image_tokens": 0},
    }


def test_what_is_left_out_or_null_takes_its_default(ask, backend):
    plain = dict.fromkeys(
        (
            "n",
            "size",
            "response_format",
            "output_format",
            "stream",
            "partial_images",
            "seed",
            "steps",
            "sampler",
            "guidance_scale",
            "model",
            "quality",
            "best_of",
            "clip_scale",
        )
    )
    assert ask("POST", GENERATIONS, json={"prompt": "a cat", **plain}).status_code == 200
    given, left_out = (
        backend.jobs[-1],
        ask("POST", GENERATIONS, json={"prompt": "a cat"}) and backend.jobs[-1],
    )
    assert (given.options, given.size, given.best_of, given.previews) == (
        left_out.options,
        left_out.size,
        left_out.best_of,
        left_out.previews,
    )
    assert given.options == SampleOptions()


def test_a_seed_gives_the_same_bytes_and_n_the_seeds_behind_it(ask):
    two = ask("POST", GENERATIONS, json={"prompt": "a cat", "n": 2, "seed": 5}).json()["data"]
    one = ask("POST", GENERATIONS, json={"prompt": "a cat", "seed": 6}).json()["data"]
    assert two[1]["b64_json"] == one[0]["b64_json"] != two[0]["b64_json"]


def test_every_way_of_sampling_reaches_the_model(ask, backend):
    wanted = {
        "steps": 3,
        "upsampler_steps": 4,
        "sampler": "dpm++",
        "upsampler_sampler": "unipc",
        "guidance_scale": 2.5,
        "upsampler_guidance_scale": 1.5,
        "negative_prompt": "blue",
        "clip_scale": 1,
    }
    assert ask("POST", GENERATIONS, json={"prompt": "a cat", **wanted}).status_code == 200
    assert backend.jobs[-1].options == SampleOptions(**wanted)


@pytest.mark.parametrize("stream", [False, True])
def test_a_weight_out_of_range_is_refused_before_the_response_begins(ask, backend, stream):
    made = len(backend.jobs)
    answer = ask("POST", GENERATIONS, json={"prompt": "a (dog:9)", "stream": stream})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "prompt"
    assert len(backend.jobs) == made


def test_usage_counts_what_the_model_reads(ask):
    tokens = [
        ask("POST", GENERATIONS, json={"prompt": prompt}).json()["usage"]["input_tokens"]
        for prompt in ("a red cat", "a (red:1.5) cat")
    ]
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
def test_the_size_and_format_asked_for_are_given(ask, form):
    answer = ask(
        "POST", GENERATIONS, json={"prompt": "a cat", "size": "16x16", "output_format": form}
    )
    assert picture(answer).size == (16, 16) and picture(answer).format == form.upper()


def test_a_lower_quality_of_jpeg_takes_fewer_bytes(ask):
    sizes = [
        len(
            ask(
                "POST",
                GENERATIONS,
                json={
                    "prompt": "a cat",
                    "seed": 1,
                    "output_format": "jpeg",
                    "output_compression": quality,
                },
            ).json()["data"][0]["b64_json"]
        )
        for quality in (100, 10)
    ]
    assert sizes[1] < sizes[0] / 2


def test_whole_numbers_may_be_written_as_json_does(ask):
    answer = ask(
        "POST",
        GENERATIONS,
        content=b'{"prompt": "x", "n": 2.0, "seed": 7.0, "guidance_scale": 3}',
        headers={"content-type": "application/json"},
    )
    assert [item["seed"] for item in answer.json()["data"]] == [7, 8]


def test_a_url_is_the_image_itself(ask):
    item = ask(
        "POST",
        GENERATIONS,
        json={"prompt": "a cat", "response_format": "url", "output_format": "webp"},
    ).json()["data"][0]
    kind, _, data = item["url"].partition(";base64,")
    assert (
        kind == "data:image/webp"
        and Image.open(io.BytesIO(base64.b64decode(data))).size == (64, 64)
        and "b64_json" not in item
    )


def test_a_prompt_of_ten_thousand_characters_is_cut_and_its_sender_told(ask):
    answer = ask("POST", GENERATIONS, json={"prompt": "word " * 2000})
    assert answer.status_code == 200 and "longer than 128 tokens" in answer.json()["warnings"][0]


def test_the_best_of_several_is_the_one_that_clip_scores_highest(ask, backend):
    answer = ask(
        "POST", GENERATIONS, json={"prompt": "a cat", "n": 2, "seed": 10, "best_of": 3, "steps": 2}
    )
    assert [job.seed for job in backend.jobs[-2:]] == [10, 13]  # disjoint sets of candidates
    best = backend.cascade.best_of("a cat", [10, 11, 12], SampleOptions(steps=2, upsampler_steps=2))
    assert answer.json()["data"][0]["seed"] == best.seed and np.array_equal(
        np.asarray(picture(answer)), best.image
    )


def test_an_edit_paints_what_is_transparent_in_the_mask(ask, backend):
    answer = ask("POST", EDITS, data={"prompt": "a dog", "n": "2", "seed": "3"}, files=edit_files())
    assert answer.status_code == 200 and [item["seed"] for item in answer.json()["data"]] == [3, 4]
    pixels = np.asarray(picture(answer))
    assert (pixels[:8, :8] == [200, 30, 30]).all() and not (
        pixels[10:38, 10:38] == [200, 30, 30]
    ).all()
    assert backend.jobs[-1].source.known_mask.mean() == 0.75 and backend.jobs[-1].task == "edit"


def test_an_edit_with_a_strength_begins_from_the_image(ask, backend):
    answer = ask(
        "POST", EDITS, data={"prompt": "a dog", "strength": "0.3", "seed": "1"}, files=edit_files()
    )
    assert answer.status_code == 200 and (backend.jobs[-1].task, backend.jobs[-1].strength) == (
        "vary",
        0.3,
    )
    assert (np.asarray(picture(answer))[:8, :8] == [200, 30, 30]).all()


def test_an_image_with_its_own_transparency_needs_no_mask(ask, backend):
    answer = ask(
        "POST",
        EDITS,
        data={"prompt": "a dog"},
        files={"image": ("i.png", png(hole=(0, 0, 64, 32)), "image/png")},
    )
    assert answer.status_code == 200 and backend.jobs[-1].source.known_mask.mean() == 0.5


def test_soft_transparency_of_an_image_is_painted_and_its_colours_are_not_blended(ask, backend):
    alpha = Image.new("L", (64, 64), 255)
    alpha.paste(0, (24, 24, 40, 40))
    alpha = alpha.filter(ImageFilter.GaussianBlur(3))
    soft = Image.new("RGBA", (64, 64), (20, 40, 60, 255))
    soft.putalpha(alpha)
    buffer = io.BytesIO()
    soft.save(buffer, "PNG")
    files = {"image": ("i.png", buffer.getvalue(), "image/png")}
    answer = ask("POST", EDITS, data={"prompt": "a dog"}, files=files)
    assert answer.status_code == 200
    source, opaque = backend.jobs[-1].source, np.asarray(alpha) == 255
    assert np.array_equal(source.known_mask, opaque) and 0.3 < opaque.mean() < 0.9
    assert (source.image[np.asarray(alpha) > 0] == (20, 40, 60)).all()
    assert (np.asarray(picture(answer))[opaque] == (20, 40, 60)).all()


def test_the_white_part_of_a_black_and_white_mask_is_painted(ask, backend):
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (0, 0, 16, 64))
    buffer = io.BytesIO()
    mask.save(buffer, "PNG")
    answer = ask("POST", EDITS, data={"prompt": "x"}, files=edit_files(mask=buffer.getvalue()))
    assert answer.status_code == 200
    known = backend.jobs[-1].source.known_mask
    assert not known[:, :16].any() and known[:, 16:].all()


def test_an_image_in_display_p3_is_converted_to_srgb(ask, backend):
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), (200, 60, 60)).save(buffer, "PNG", icc_profile=p3_profile())
    answer = ask("POST", EDITS, data={"prompt": "x"}, files=edit_files(buffer.getvalue()))
    assert answer.status_code == 200
    shown = backend.jobs[-1].source.image[0, 0]
    assert np.abs(shown - display_p3_to_srgb((200, 60, 60))).max() <= 1


def test_a_wide_image_and_its_mask_are_cut_to_the_same_centred_square(ask, backend):
    answer = ask(
        "POST",
        EDITS,
        data={"prompt": "x"},
        files=edit_files(png((128, 64)), png((128, 64), hole=(0, 0, 64, 64))),
    )
    assert answer.status_code == 200
    known = backend.jobs[-1].source.known_mask
    assert not known[:, :32].any() and known[:, 32:].all()


def test_a_variation_needs_no_prompt_and_changes_more_with_more_strength(ask, backend):
    made = [
        np.asarray(
            picture(
                ask(
                    "POST",
                    VARIATIONS,
                    data={"seed": "1", "steps": "20", **strength},
                    files={"image": ("i.png", png(mode="RGB"), "image/png")},
                )
            )
        ).astype(int)
        for strength in ({"strength": "0.1"}, {}, {"strength": "1"})
    ]
    assert [job.strength for job in backend.jobs[-3:]] == [0.1, 0.6, 1.0] and backend.jobs[
        -1
    ].prompt == ""
    away = [np.abs(image - [200, 30, 30]).mean() for image in made]
    assert away[0] < min(away[1:])


def events(answer):
    """The server-sent events of an answer: (name, data)."""
    parts = [part.split("\n") for part in answer.text.strip().split("\n\n")]
    return [
        (name.removeprefix("event: "), json.loads(data.removeprefix("data: ")))
        for name, data in parts
    ]


def test_a_stream_shows_images_on_the_way_and_then_the_one_that_is_answered_whole(ask):
    body = {"prompt": "a cat", "seed": 5, "steps": 2}
    answer = ask("POST", GENERATIONS, json={**body, "stream": True, "partial_images": 2})
    assert answer.status_code == 200 and answer.headers["content-type"].startswith(
        "text/event-stream"
    )
    seen = events(answer)
    assert [name for name, _ in seen] == ["image_generation.partial_image"] * 2 + [
        "image_generation.completed"
    ]
    assert [data["partial_image_index"] for _, data in seen[:2]] == [0, 1] and all(
        name == data["type"] for name, data in seen
    )
    # A preview is a small prediction, enlarged to the requested size.
    assert Image.open(io.BytesIO(base64.b64decode(seen[0][1]["b64_json"]))).size == (64, 64)
    assert (
        seen[-1][1]["b64_json"] == ask("POST", GENERATIONS, json=body).json()["data"][0]["b64_json"]
    )
    edited = events(
        ask("POST", EDITS, data={"prompt": "x", "stream": "true", "n": "2"}, files=edit_files())
    )
    assert sorted(data["image_index"] for _, data in edited) == [0, 1] and {
        name for name, _ in edited
    } == {"image_edit.completed"}


def test_a_failure_within_a_stream_is_an_event(backend):
    class Failing(CascadeBackend):
        async def make(self, job, on_preview=None):
            on_preview(np.zeros((16, 16, 3), np.uint8))
            raise ApiError(503, "lost")

    seen = events(
        asking(Failing(backend.cascade))(
            "POST", GENERATIONS, json={"prompt": "x", "stream": True, "partial_images": 1}
        )
    )
    assert [name for name, _ in seen] == ["image_generation.partial_image", "error"] and seen[-1][
        1
    ]["error"]["message"] == "lost"


def test_a_fault_within_a_stream_is_an_event_that_says_nothing_of_its_inside(backend, caplog):
    caplog.set_level(logging.INFO, "ray.serve.glide")

    class Failing(CascadeBackend):
        async def make(self, job, on_preview=None):
            raise RuntimeError("secret path /etc")

    answer = asking(Failing(backend.cascade))(
        "POST", GENERATIONS, json={"prompt": "x", "stream": True}
    )
    ((name, data),) = events(answer)
    assert name == data["type"] == "error" and data["error"]["type"] == "server_error"
    assert (
        answer.headers["x-request-id"] in data["error"]["message"]
        and "secret" not in answer.text
        and "secret path" in caplog.text
    )
    # The status 200 was sent before the failure, so only the log has 500.
    assert json.loads(caplog.records[-1].message)["error"] == 500


class InProcess:
    """A stage in this process, called as a deployment's handle is."""

    def __init__(self, kind, stepper):
        self.stage = kind.__new__(kind)  # without warming up and without `os.nice`
        self.stage.config, self.stage.critic, self.stage.device = (
            stepper.config,
            stepper.critic,
            stepper.device,
        )
        self.stage._engine, self.stage._sha256 = Engine(stepper), kind.role
        self.stage._adapters = AdapterCache(stepper.model, kind.role, 2**20)
        self.make, self.make_with_previews = (
            SimpleNamespace(remote=self.stage.make),
            SimpleNamespace(remote=self.stage.make_with_previews),
        )
        if kind.role == "base":
            self.score = SimpleNamespace(remote=self.stage.score)

    def options(self, stream):
        return self


@pytest.fixture
def stages(backend):
    """A model's two stages behind a RayBackend, in this process."""
    from glide_ray.serving.backend import ModelInfo, RayBackend
    from glide_ray.serving.stages import Base, Upsampler

    cascade = backend.cascade
    base, upsampler = InProcess(Base, cascade.base), InProcess(Upsampler, cascade.upsampler)
    yield RayBackend(
        ModelInfo("tiny", ServeConfig(clip="c"), backend.model_set), base, upsampler, Metrics()
    )
    base.stage._engine.close()
    upsampler.stage._engine.close()


FEW = SampleOptions(steps=4, upsampler_steps=3)


def test_the_server_chooses_and_enlarges_the_picture_that_the_cascade_does(stages, backend):
    shown = []
    made = asyncio.run(stages.make(Job("a cat", 7, 64, FEW, best_of=3, previews=3), shown.append))
    best = backend.cascade.best_of("a cat", [7, 8, 9], FEW)
    assert made.seed == best.seed and np.array_equal(made.pixels, best.image)
    assert made.models == {"base": "base", "upsampler": "upsampler"}
    # Candidates show nothing: the previews are the chosen base image and the upsampler's one.
    assert [len(pixels) for pixels in shown] == [16, 64]


def test_previews_are_shared_by_the_stages_and_one_is_the_base_image(stages, backend):
    shown = []
    made = asyncio.run(stages.make(Job("a cat", 7, 64, FEW, previews=3), shown.append))
    assert [len(pixels) for pixels in shown] == [16, 16, 64]
    small = Cascade(backend.cascade.base).generate(["a cat"], [7], FEW)[0]
    assert np.array_equal(shown[1], small)
    assert np.array_equal(made.pixels, backend.cascade.generate(["a cat"], [7], FEW)[0])


def test_the_small_size_is_the_base_model_alone(stages, backend):
    made = asyncio.run(stages.make(Job("a cat", 7, 16, FEW)))
    small = Cascade(backend.cascade.base).generate(["a cat"], [7], FEW)[0]
    assert np.array_equal(made.pixels, small) and list(made.seconds) == ["base"]


@pytest.mark.parametrize("strength", [None, 0.5])
def test_the_server_paints_the_edit_and_the_variation_that_the_cascade_does(
    stages, backend, strength
):
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    known = np.zeros((64, 64), bool)
    known[:32] = True
    made = asyncio.run(stages.make(Job("a cat", 7, 64, FEW, Source(image, known), strength)))
    wanted = (
        backend.cascade.edit(image, known, "a cat", 7, FEW)
        if strength is None
        else backend.cascade.vary(image, "a cat", 7, strength, known, options=FEW)
    )
    assert np.array_equal(made.pixels, wanted)


def test_when_one_candidate_of_the_best_fails_the_replicas_give_up_the_others(backend):
    from glide_ray.serving.backend import ModelInfo, RayBackend

    class Response:
        def __init__(self, fails):
            self.fails, self.given_up = fails, False

        def __await__(self):
            yield from asyncio.sleep(0 if self.fails else 60).__await__()
            raise RuntimeError("out of memory")

        def cancel(self):
            self.given_up = True

    class Handle:
        def __init__(self):
            self.make, self.responses = self, []

        def remote(self, job):
            self.responses.append(Response(job.seed == 2))
            return self.responses[-1]

    async def fail():
        base = Handle()
        stages = RayBackend(
            ModelInfo("tiny", ServeConfig(clip="c"), replace(backend.model_set, upsampler=None)),
            base,
            None,
            Metrics(),
        )
        with pytest.raises(RuntimeError, match="out of memory"):
            await stages.make(Job("x", 0, 16, best_of=4))
        await asyncio.sleep(0.01)
        return [response.given_up for response in base.responses]

    assert asyncio.run(fail()) == [True, True, False, True]


def test_what_a_stage_refuses_is_told_without_its_traceback(backend):
    from ray.exceptions import RayTaskError

    from glide_ray.serving.backend import ModelInfo, RayBackend

    async def refuse():
        raise RayTaskError(
            "make",
            "secret traceback",
            RequestError("steps are too many.", "steps"),
            "replica",
            1,
            "127.0.0.1",
        ).as_instanceof_cause()

    base = SimpleNamespace(make=SimpleNamespace(remote=lambda job: refuse()))
    send = asking(
        RayBackend(
            ModelInfo("tiny", ServeConfig(), replace(backend.model_set, upsampler=None)),
            base,
            None,
            Metrics(),
        )
    )
    answer = send("POST", GENERATIONS, json={"prompt": "x"})
    refused(answer, 400, "steps are too many.", "steps")
    ((_, data),) = events(send("POST", GENERATIONS, json={"prompt": "x", "stream": True}))
    assert data["error"] == answer.json()["error"] and "secret" not in answer.text


def test_a_stage_whose_engine_has_ended_tells_serve_that_it_is_not_well(backend):
    from glide_ray.serving.stages import Base

    stage = Base.__new__(Base)
    stage._engine = Engine(backend.cascade.base)
    stage.check_health()
    stage._engine.close()
    with pytest.raises(RuntimeError, match="thread has ended"):
        stage.check_health()


def test_a_stage_that_does_not_answer_hides_no_other(backend):
    from glide_ray.serving.ingress import Ingress

    class Handle:
        def __init__(self, *answers):
            self.answers = answers

        def broadcast(self, method):
            return self

        async def results_async(self, **_):
            if not self.answers:
                raise TimeoutError
            return self.answers

    def replica(stage, n):
        return StageLoad("tiny", stage, f"{stage}-{n}", Load(1, 0, 8, 7, 7, 0.5, 0, 0, 0))

    async def two_ingresses(method):
        return [method] * 2

    ingress, send = Ingress.__new__(Ingress), asking(backend)
    ingress._config, ingress._ask_ingresses, ingress.admission, ingress.models = (
        CONFIG,
        two_ingresses,
        send.state.admission,
        {
            "tiny": SimpleNamespace(
                base=Handle(replica("base", 0), replica("base", 1)),
                upsampler=Handle(replica("upsampler", 0)),
            ),
            "other": SimpleNamespace(base=Handle(), upsampler=None),
        },
    )
    send.state.stages = ingress.stages
    assert (
        'glide_stage_steps_total{model="tiny",replica="base-1",stage="base"} 7.0'
        in send("GET", "/metrics").text
    )
    refused(send("GET", "/readyz"), 503, "no ready replica")
    asyncio.run(ingress.check_health())
    assert (
        ingress.admission.ingress_replicas == 2
        and ingress.admission.capacity["tiny"] == (8 + CONFIG.max_waiting) // 2
    )


def test_models_health_and_readiness_are_told(ask):
    assert ask("GET", "/v1/models").json()["data"][0]["id"] == "tiny"
    assert ask("GET", "/healthz").json() == {"status": "ok"} and ask("GET", "/readyz").json() == {
        "status": "ready"
    }


# -- authentication and rate limits ----------------------------------------------------------------


def test_without_keys_only_this_machine_is_answered(backend):
    assert asking(backend, client="::1")("GET", "/v1/models").status_code == 200
    stranger = asking(backend, client="10.0.0.7")
    refused(stranger("POST", GENERATIONS, json={"prompt": "x"}), 403, "no API keys")
    assert stranger("GET", "/healthz").status_code == 200


def test_with_keys_everyone_needs_one(backend):
    with_keys = asking(
        backend, keys={"ann": Key(sha256=key_sha256("secret-of-ann-01"))}, client="10.0.0.7"
    )
    for header in (
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": "Basic secret-of-ann-01"},
        {"authorization": "Bearer "},
    ):
        answer = with_keys("GET", "/v1/models", headers=header)
        refused(answer, 401, "key")
        assert (
            answer.json()["error"]["type"] == "authentication_error"
            and answer.headers["www-authenticate"] == "Bearer"
        )
    assert (
        with_keys(
            "GET", "/v1/models", headers={"authorization": "Bearer secret-of-ann-01"}
        ).status_code
        == 200
    )
    assert (
        with_keys("GET", "/metrics").status_code == 401
        and with_keys("GET", "/readyz").status_code == 200
    )


def test_keys_are_kept_as_hashes_and_found_again(tmp_path):
    path = tmp_path / "keys.json"
    key = new_key("ann", path, per_minute=5)
    new_key("bob", path)
    assert key not in path.read_text() and read_keys(str(path), {})["ann"] == Key(
        sha256=key_sha256(key), per_minute=5
    )
    assert set(read_keys(str(path), {"GLIDE_API_KEYS": "eve:0123456789abcdef"})) == {
        "ann",
        "bob",
        "eve",
    }
    with pytest.raises(UserError, match="has a key named 'ann'"):
        new_key("ann", path)
    for spoiled in ("[]", "{", '{"ann": {"sha256": "x"}}', '{"ann": 1}'):
        path.write_text(spoiled)
        with pytest.raises(UserError, match="is not an API key file"):
            read_keys(str(path), {})
    with pytest.raises(UserError, match="There is no API key file"):
        read_keys(str(tmp_path / "none"), {})
    with pytest.raises(UserError, match="GLIDE_API_KEYS is malformed") as refusal:
        read_keys(None, {"GLIDE_API_KEYS": "short:abc"})
    assert "abc" not in str(refusal.value)


class Slow(CascadeBackend):
    """Finishes images only after `go` is set; counts started and cancelled ones."""

    def __init__(self, cascade):
        super().__init__(cascade)
        self.go, self.began, self.left = asyncio.Event(), 0, 0

    async def make(self, job, on_preview=None):
        self.began += 1
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.left += 1
            raise
        return GeneratedImage(np.zeros((job.size, job.size, 3), np.uint8), job.seed)


def test_what_exceeds_the_places_is_answered_429_at_once_and_the_rest_is_served(backend):
    async def crowd():
        slow = Slow(backend.cascade)
        send = asking(slow, capacity=4)
        waiting = [
            asyncio.ensure_future(send.once("POST", GENERATIONS, json={"prompt": "x", "n": n}))
            for n in (3, 1)
        ]
        while slow.began < 4:
            await asyncio.sleep(0.01)
        busy = await asyncio.wait_for(send.once("POST", GENERATIONS, json={"prompt": "x"}), 5)
        told = (await send.once("GET", "/metrics")).text
        slow.go.set()
        return busy, [await one for one in waiting], told, send.state.admission.in_progress["tiny"]

    busy, served, told, inside = asyncio.run(crowd())
    refused(busy, 429, "no capacity left")
    assert (
        int(busy.headers["retry-after"]) >= 1
        and [answer.status_code for answer in served] == [200, 200]
        and inside == 0
    )
    assert (
        'glide_images_inside{model="tiny",replica="0"} 4.0' in told
        and 'glide_images_capacity{model="tiny",replica="0"} 4.0' in told
    )


def test_a_key_has_limits_of_its_own(backend):
    keys = {
        "ann": Key(sha256=key_sha256("a" * 16), per_minute=3),
        "bob": Key(sha256=key_sha256("b" * 16), at_once=1),
    }
    send = asking(backend, keys=keys)
    ann, bob = ({"authorization": f"Bearer {letter * 16}"} for letter in "ab")
    assert [
        send("POST", GENERATIONS, json={"prompt": "x", "n": n}, headers=ann).status_code
        for n in (2, 2, 1, 1)
    ] == [200, 429, 200, 429]
    assert (
        1
        <= int(send("POST", GENERATIONS, json={"prompt": "x"}, headers=ann).headers["retry-after"])
        <= 60
    )
    refused(send("POST", GENERATIONS, json={"prompt": "x"}, headers=ann), 429, "3 images a minute")
    assert send("POST", GENERATIONS, json={"prompt": "x"}, headers=bob).status_code == 200


def test_a_request_for_more_than_a_key_may_ever_have_is_not_told_to_try_again(backend):
    keys = {
        "ann": Key(sha256=key_sha256("a" * 16), per_minute=3),
        "bob": Key(sha256=key_sha256("b" * 16), at_once=1),
    }
    send = asking(backend, keys=keys)
    ann, bob = ({"authorization": f"Bearer {letter * 16}"} for letter in "ab")
    for key, body, message in (
        (bob, {"n": 2}, "1 images in progress, and this request asks for 2"),
        (ann, {"n": 2, "best_of": 2}, "3 images a minute, and this request asks for 4"),
    ):
        answer = send("POST", GENERATIONS, json={"prompt": "x", **body}, headers=key)
        refused(answer, 400, message, "n")
        assert "ask for fewer" in answer.text and "retry-after" not in answer.headers


def test_ingress_replicas_share_a_keys_limits_and_no_request_within_them_is_impossible():
    admission = Admission(
        {"ann": Key(sha256="0" * 64, at_once=4), "bob": Key(sha256="1" * 64, per_minute=4)},
        {"m": 99},
    )
    admission.ingress_replicas = 2
    for who in ("ann", "bob"):
        with (
            admission.admit(who, "m", 1),
            admission.admit(who, "m", 1),
            pytest.raises(ApiError) as refusal,
            admission.admit(who, "m", 1),
        ):
            pass
        assert refusal.value.status == 429
    with admission.admit("ann", "m", 4):
        pass


def test_a_minute_later_a_key_may_ask_again():
    now = [0.0]
    admission = Admission({"ann": Key(sha256="0" * 64, per_minute=2)}, {"m": 9}, lambda: now[0])
    for _ in range(2):
        with admission.admit("ann", "m", 1):
            now[0] += 10
    with pytest.raises(ApiError) as refusal, admission.admit("ann", "m", 1):
        pass
    assert refusal.value.headers == {"Retry-After": "40"}
    now[0] = 60.5
    with admission.admit("ann", "m", 1):
        pass


def test_retry_after_follows_the_pace_at_which_images_are_made():
    now = [0.0]
    admission = Admission({}, {"m": 2}, lambda: now[0])
    with admission.admit("-", "m", 2):
        now[0] += 20.0  # two images in 20 s, so 10 s per image
    with (
        admission.admit("-", "m", 2),
        pytest.raises(ApiError) as refusal,
        admission.admit("-", "m", 1),
    ):
        pass
    assert refusal.value.headers == {"Retry-After": "10"}
    # Admitted although it exceeds the capacity, because nothing else is in progress.
    with admission.admit("-", "m", 5):
        pass


def test_a_client_that_leaves_gives_its_places_back(backend):
    async def leave():
        slow = Slow(backend.cascade)
        send = asking(slow)
        waiting = asyncio.ensure_future(
            send.once("POST", GENERATIONS, json={"prompt": "x", "n": 3})
        )
        while slow.began < 3:
            await asyncio.sleep(0.01)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        return slow.left, send.state.admission.in_progress["tiny"]

    assert asyncio.run(leave()) == (3, 0)


# -- observations ----------------------------------------------------------------------------------


def logged(caplog):
    return [
        json.loads(record.message) for record in caplog.records if record.name == "ray.serve.glide"
    ]


def test_the_log_has_a_line_for_each_request_and_no_prompt(ask, backend, caplog):
    caplog.set_level(logging.INFO, "ray.serve.glide")
    answer = ask("POST", GENERATIONS, json={"prompt": "a secret garden", "n": 2, "seed": 9})
    ask("POST", GENERATIONS, json={"prompt": "a secret garden", "n": 99})
    first, second = logged(caplog)
    assert first["id"] == answer.headers["x-request-id"] and (
        first["status"],
        first["images"],
        first["seed"],
        first["model"],
    ) == (200, 2, 9, "tiny")
    assert (
        first["stages"] == {"base": 0.1}
        and first["seconds"] > 0
        and second["status"] == 400
        and "secret" not in caplog.text
    )
    caplog.clear()
    asking(backend, ServeConfig(log_prompts=True))(
        "POST", GENERATIONS, json={"prompt": "a secret garden"}
    )
    assert logged(caplog)[0]["prompt"] == "a secret garden"


def test_an_id_that_the_client_gives_is_kept(ask, caplog):
    caplog.set_level(logging.INFO, "ray.serve.glide")
    ask("GET", "/healthz", headers={"x-request-id": "mine"})
    assert logged(caplog)[0]["id"] == "mine"


def test_metrics_count_requests_images_and_seconds(backend):
    send = asking(backend)
    send("POST", GENERATIONS, json={"prompt": "x", "n": 2})
    send("POST", GENERATIONS, json={"prompt": "x", "n": 77})
    text = send("GET", "/metrics").text
    for line in (
        'glide_requests_total{path="/v1/images/generations",replica="0",status="200"} 1.0',
        'glide_requests_total{path="/v1/images/generations",replica="0",status="400"} 1.0',
        'glide_images_total{model="tiny",replica="0",task="generate"} 2.0',
        'glide_stage_seconds_count{model="tiny",replica="0",stage="base"} 2.0',
    ):
        assert line in text, line
    assert len(re.findall("^# TYPE glide_requests_total counter", text, re.M)) == 1


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message, param",
    [
        ({"prompt": None}, "prompt", "prompt"),
        ({"prompt": 7}, "prompt", "prompt"),
        ({"n": 0}, "n", "n"),
        ({"n": 4}, "less than or equal to 3", "n"),
        ({"n": "two"}, "n", "n"),
        ({"size": "512x512"}, "64x64", "size"),
        ({"size": "16x"}, "64x64", "size"),
        ({"steps": 0}, "steps", "steps"),
        ({"steps": 1001}, "steps", "steps"),
        ({"steps": 2.5}, "steps", "steps"),
        ({"guidance_scale": -1}, "guidance_scale", "guidance_scale"),
        ({"seed": -1}, "seed", "seed"),
        ({"seed": 2**64}, "seed", "seed"),
        ({"guidance_scale": 1e9}, "guidance_scale", "guidance_scale"),
        ({"response_format": "link"}, "b64_json", "response_format"),
        ({"output_format": "gif"}, "png", "output_format"),
        ({"guidence_scale": 3}, "did you mean 'guidance_scale'", "guidence_scale"),
        ({"strength": 0.5}, "edits and variations", "strength"),
        ({"n": True}, "n", "n"),
        ({"seed": "1"}, "seed", "seed"),
        ({"partial_images": 4}, "partial_images", "partial_images"),
        ({"sampler": "euler"}, "dpm++", "sampler"),
        ({"best_of": 65}, "best_of", "best_of"),
        ({"background": "transparent"}, "opaque", "background"),
    ],
)
def test_a_field_that_makes_no_sense_is_named(ask, change, message, param):
    refused(ask("POST", GENERATIONS, json={"prompt": "a cat"} | change), 400, message, param)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'"prompt"', b"\xff\xfe", b'{"guidance_scale": NaN, "prompt": "x"}']
)
def test_a_body_that_is_no_json_object_is_refused(ask, body):
    answer = ask("POST", GENERATIONS, content=body, headers={"content-type": "application/json"})
    refused(answer, 400, "")


def test_a_body_that_is_too_long_is_refused_unread(ask):
    refused(ask("POST", GENERATIONS, json={"prompt": "x" * 2**21}), 413, "larger than 1 MiB")


def test_an_unknown_model_path_or_method_is_said_in_openais_form(ask):
    refused(
        ask("POST", GENERATIONS, json={"prompt": "x", "model": "dall-e-3"}),
        404,
        "no model 'dall-e-3'",
        "model",
    )
    refused(ask("GET", "/v1/nothing"), 404, "nothing at /v1/nothing")
    refused(ask("GET", GENERATIONS), 405, "does not support GET")


def test_an_image_that_is_none_a_broken_one_and_a_huge_one_are_refused(ask):
    refused(
        ask("POST", EDITS, data={"prompt": "x"}, files=edit_files(b"hello")),
        400,
        "not an image",
        "image",
    )
    refused(
        ask(
            "POST",
            EDITS,
            data={"prompt": "x"},
            files=edit_files(
                encode(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))[
                    :2000
                ]
            ),
        ),
        400,
        "broken",
        "image",
    )
    refused(
        ask("POST", EDITS, data={"prompt": "x"}, files=edit_files(png((1200, 1200)))),
        400,
        "more than the 1,000,000",
        "image",
    )
    refused(
        ask("POST", EDITS, data={"prompt": "x"}, files=edit_files(b"x" * 300_000)),
        413,
        "larger than",
        "image",
    )


def test_masks_that_do_not_fit_are_refused(ask):
    refused(
        ask(
            "POST",
            EDITS,
            data={"prompt": "x"},
            files=edit_files(mask=png((32, 32), hole=(0, 0, 9, 9))),
        ),
        400,
        "32x32 pixels and the image 64x64",
        "mask",
    )
    refused(
        ask("POST", EDITS, data={"prompt": "x"}, files=edit_files(mask=png())),
        400,
        "nothing to paint",
        "mask",
    )
    refused(
        ask("POST", EDITS, data={"prompt": "x"}, files=edit_files(mask=png(mode="RGB"))),
        400,
        "no transparent pixel and is not black and white",
        "mask",
    )
    wide = png((160, 64), hole=(0, 0, 20, 64))
    for files, param in (
        (edit_files(png((160, 64)), wide), "mask"),
        ({"image": ("i.png", wide, "image/png")}, "image"),
    ):
        refused(
            ask("POST", EDITS, data={"prompt": "x"}, files=files),
            400,
            "outside of the centred square that is used; crop the image and its mask",
            param,
        )
    refused(
        ask("POST", EDITS, data={"prompt": "x"}, files={"image": ("i.png", png(), "image/png")}),
        400,
        "nothing to paint",
        "image",
    )


def test_steps_are_bounded_by_those_that_each_model_was_trained_with(backend):
    short = CascadeBackend(backend.cascade)
    diffusion = short.model_set.base.diffusion.model_copy(update={"steps": 100})
    short.model_set = replace(
        short.model_set, base=short.model_set.base.model_copy(update={"diffusion": diffusion})
    )
    refused(
        asking(short)("POST", GENERATIONS, json={"prompt": "x", "steps": 500}),
        400,
        "a number from 1 to 100",
        "steps",
    )
    fields = build_api(lambda: None, CONFIG, timesteps=(100, 2000)).openapi()["components"][
        "schemas"
    ]["Generation"]["properties"]
    assert [fields[name]["anyOf"][0]["maximum"] for name in ("steps", "upsampler_steps")] == [
        100,
        2000,
    ]


def test_edit_forms_that_make_no_sense_are_refused(ask):
    refused(ask("POST", EDITS, json={"prompt": "x"}), 400, "multipart/form-data")
    refused(ask("POST", EDITS, files=edit_files()), 400, "prompt is missing", "prompt")
    refused(
        ask("POST", EDITS, data={"prompt": "x"}, files={"mask": ("m.png", png(), "image/png")}),
        400,
        "image is missing",
        "image",
    )
    refused(
        ask("POST", EDITS, data={"prompt": "x", "n": "many"}, files=edit_files()), 400, "n", "n"
    )
    refused(
        ask("POST", EDITS, data={"prompt": "x", "step": "3"}, files=edit_files()),
        400,
        "did you mean 'steps'",
        "step",
    )
    refused(
        ask(
            "POST",
            EDITS,
            data={"prompt": "x", "image": "text"},
            files={"mask": ("m.png", png(), "image/png")},
        ),
        400,
        "must be a file",
        "image",
    )
    several = [
        ("image[]", ("a.png", png(), "image/png")),
        ("image[]", ("b.png", png(), "image/png")),
    ]
    refused(ask("POST", EDITS, data={"prompt": "x"}, files=several), 400, "Only one image", "image")
    refused(
        ask(
            "POST",
            EDITS,
            content=b"--x\r\nrubbish",
            headers={"content-type": "multipart/form-data; boundary=x"},
        ),
        400,
        "",
    )


def test_a_failure_of_the_backend_is_a_500_that_says_nothing_of_its_inside(backend, caplog):
    class Failing(CascadeBackend):
        async def make(self, job, on_preview=None):
            raise RuntimeError("secret path /etc")

    answer = asking(Failing(backend.cascade))("POST", GENERATIONS, json={"prompt": "x"})
    refused(answer, 500, "The server failed")
    assert "secret" not in answer.text and answer.json()["error"]["type"] == "server_error"
    # The client receives the request's ID; the log has the error for the operator.
    assert answer.headers["x-request-id"] in answer.text and "secret path" in caplog.text


def test_a_picture_that_is_not_finite_is_a_500_with_a_code_and_no_black_picture(backend, caplog):
    config = tiny().model
    model = GlideUNet(config.unet)
    model.load_state_dict(with_nan_for("apple", config))
    send = asking(CascadeBackend(Cascade(Stepper(model, config), backend.cascade.upsampler)))
    answer = send("POST", GENERATIONS, json={"prompt": "apple"})
    refused(answer, 500, "its weights hold NaN", None)
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("server_error", "picture_not_finite")
    assert "weights hold NaN" in caplog.text
    ((_, data),) = events(send("POST", GENERATIONS, json={"prompt": "apple", "stream": True}))
    assert data["error"]["code"] == "picture_not_finite"
    assert send("POST", GENERATIONS, json={"prompt": "a dog"}).status_code == 200
    assert 'path="/v1/images/generations",replica="0",status="500"} 1.0' in (
        send("GET", "/metrics").text
    )


def test_a_server_without_clip_says_so(backend):
    plain = asking(
        CascadeBackend(Cascade(backend.cascade.base, backend.cascade.upsampler)), ServeConfig()
    )
    plain.state.models["tiny"].clip = False
    bare = build_api(lambda: plain.state, ServeConfig(), (16, 64), clip=False)

    async def once():
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(bare), base_url="http://glide"
        ) as asker:
            return await asker.post(GENERATIONS, json={"prompt": "x", "best_of": 2})

    refused(asyncio.run(once()), 400, "needs a CLIP model, and this server has none", "best_of")
    refused(
        plain("POST", GENERATIONS, json={"prompt": "x", "clip_scale": 2.0}),
        400,
        "needs a CLIP model",
        "clip_scale",
    )


def test_a_body_that_says_less_than_it_sends_or_nothing_is_bounded_too(ask):
    async def endless(first):
        yield first
        for _ in range(40):
            yield b"x" * 2**16

    form = b'--b\r\nContent-Disposition: form-data; name="image"; filename="i.png"\r\n\r\n'
    for path, kind, first in (
        (GENERATIONS, "application/json", b'{"prompt": "'),
        (EDITS, "multipart/form-data; boundary=b", form),
    ):
        refused(
            ask("POST", path, content=endless(first), headers={"content-type": kind}),
            413,
            "larger than",
        )


def test_a_body_that_does_not_come_to_its_end_is_given_up(backend, monkeypatch):
    monkeypatch.setattr("glide_ray.serving.middleware.BODY_SECONDS", 0.2)

    async def stalled():
        yield b'{"prompt"'
        await asyncio.sleep(30)

    refused(
        asking(backend)(
            "POST", GENERATIONS, content=stalled(), headers={"content-type": "application/json"}
        ),
        408,
        "did not arrive within",
    )
