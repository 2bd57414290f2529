"""Samples in flight: results are independent of the others, which join and leave between steps."""

import itertools
import pickle
import threading
import time
from concurrent.futures import CancelledError
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.tiny import overflowing, random_model, tiny, with_nan_for

from glide_ray.config.sampling import SampleOptions
from glide_ray.diffusion.schedule import grid, make_schedule
from glide_ray.errors import UserError
from glide_ray.models.unet import GlideUNet
from glide_ray.sampling.checks import RequestError, check_options
from glide_ray.sampling.engine import Engine
from glide_ray.sampling.finite import NonFiniteError
from glide_ray.sampling.inversion import invert
from glide_ray.sampling.job import base_request, upsampler_request
from glide_ray.sampling.noise import noise_source
from glide_ray.sampling.stepper import Stepper


def stepper(kind="base", **options):
    config = tiny(kind).model
    return Stepper(random_model(config.unet), config, **options)


def request(kind="base", seed=7, prompt="a red apple", **options):
    config = tiny(kind).model
    if kind == "base":
        edit = {name: options.pop(name) for name in ("known", "known_mask") if name in options}
        return base_request(config, prompt, seed, SampleOptions(**options), **edit)
    low_res = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return upsampler_request(
        config, prompt, seed, low_res, SampleOptions(upsampler_steps=options.get("steps"))
    )


def image_among_others(kind, shared_stepper):
    """The image of a sample in flight with four others; two of them finish before it."""
    for seed, steps in ((1, 3), (2, 5), (3, "fast27")):
        shared_stepper.submit(request(kind, seed, f"other {seed}", steps=steps))
    shared_stepper.step()
    ticket = shared_stepper.submit(request(kind, steps=8))
    shared_stepper.submit(request(kind, 9, "late", steps=12))
    images = {}
    while ticket not in images:
        images.update(shared_stepper.step())
    assert shared_stepper.scheduler.in_flight >= 1
    return images[ticket]


@pytest.mark.parametrize("lanes", [1, 2])
@pytest.mark.parametrize("kind", ["base", "upsampler"])
def test_a_sample_is_bitwise_identical_alone_and_among_four_others(kind, lanes):
    alone = stepper(kind, lanes=lanes).run([request(kind, steps=8)])[0]
    assert torch.equal(image_among_others(kind, stepper(kind, lanes=lanes)), alone)


@pytest.mark.parametrize("kind", ["base", "upsampler"])
def test_in_a_batched_network_call_a_sample_differs_only_by_rounding(kind):
    alone = stepper(kind).run([request(kind, steps=8)])[0]
    together = image_among_others(kind, stepper(kind, batched=True))
    assert (together - alone).abs().max() < 2e-3


def test_samples_in_a_batch_keep_their_own_guidance_sampler_steps_and_caption():
    requests = [
        request(steps=4),
        request(steps=6, guidance_scale=1.0),
        request(steps=5, guidance_scale=5.0, sampler="ddim"),
        request(steps=4, prompt="a dog"),
    ]
    together = stepper(batched=True).run(requests)
    for image, single_request in zip(together, requests, strict=True):
        assert torch.allclose(image, stepper().run([single_request])[0], atol=2e-3)
    assert len({image.sum().item() for image in together}) == 4


def test_every_sampler_gives_the_same_picture_in_any_batch():
    requests = [
        request(steps=5, sampler=sampler)
        for sampler in ("ancestral", "ddim", "plms", "dpm++", "unipc")
    ]
    together = stepper().run([*requests, request(seed=3, steps=9, sampler="plms")])
    for image, single_request in zip(together, requests, strict=False):
        assert torch.equal(image, stepper().run([single_request])[0])
    assert len({image.sum().item() for image in together}) == 6


def test_a_negative_prompt_takes_the_place_of_the_empty_caption():
    """At scale s: eps(negative) + s (eps(caption) - eps(negative))."""
    plain = request(steps=3, guidance_scale=3.0)
    empty, other, same = stepper().run(
        [
            plain,
            request(steps=3, guidance_scale=3.0, negative_prompt="a green pear"),
            request(steps=3, guidance_scale=3.0, negative_prompt="a red apple"),
        ]
    )
    unguided = stepper().run([request(steps=3, guidance_scale=1.0)])[0]
    assert not torch.equal(empty, other)
    assert torch.allclose(same, unguided, atol=1e-5)  # caption and negative cancel
    with_empty = replace(plain, negative=request(prompt="").conditioning)
    assert torch.equal(stepper().run([with_empty])[0], empty)


def test_a_negative_prompt_changes_no_other_picture_of_the_batch():
    requests = [
        request(steps=4, guidance_scale=2.0, negative_prompt=text) for text in ("", "blue", "green")
    ]
    together = stepper(batched=False).run(requests)
    for image, alone in zip(together, requests, strict=True):
        assert torch.equal(image, stepper(batched=False).run([alone])[0])
    assert len({image.sum().item() for image in together}) == 3


def test_a_negative_prompt_without_guidance_is_refused():
    with pytest.raises(RequestError, match="guidance scale other than 1") as refusal:
        request(guidance_scale=1.0, negative_prompt="blue")
    assert refusal.value.param == "negative_prompt"


def test_the_upsampler_has_its_own_sampler_guidance_and_negative_prompt():
    config = tiny("upsampler").model
    low_res = torch.zeros(3, 16, 16)

    def made(**options):
        options = SampleOptions(upsampler_steps=4, **options)
        asked = upsampler_request(config, "a red apple", 7, low_res, options)
        return stepper("upsampler").run([asked])[0]

    pictures = [
        made(),
        made(sampler="ddim"),  # the base model's: no effect here
        made(upsampler_sampler="ddim"),
        made(upsampler_guidance_scale=3.0),
        made(upsampler_guidance_scale=3.0, negative_prompt="blue"),
    ]
    assert torch.equal(pictures[0], pictures[1])
    assert len({picture.sum().item() for picture in pictures}) == 4


def test_seeds_tasks_and_stages_draw_different_noise():
    """All bits of the seed count; no two streams are correlated."""
    streams = [
        noise_source(2, seed, task, stage).normal((20_000,))
        for seed in (7, 7 + 2**32, 2**63 - 1)
        for task in ("generate", "edit", "vary")
        for stage in ("base", "upsampler")
    ]
    correlations = torch.corrcoef(torch.stack(streams))
    off_diagonal = correlations - torch.eye(len(streams))
    assert off_diagonal.abs().max() < 5 / 20_000**0.5
    assert torch.stack(streams).std(1).sub(1).abs().max() < 0.03


def test_the_noise_of_old_recipes_is_unchanged():
    expected = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(5))
    for task in ("generate", "vary"):
        assert torch.equal(noise_source(1, 5, task, "base").normal((2, 3, 4, 4)), expected)


@pytest.mark.parametrize("respacing", ["10", "50", "10,10,3,2,2", "mixed20", "lambda12"])
def test_the_strength_of_a_variation_is_a_share_of_the_noise_in_every_respacing(respacing):
    """It begins at that share of the process and goes on with the kept timesteps below."""
    kept, start = grid(make_schedule("cosine"), respacing), torch.zeros(3, 16, 16)
    for strength in (0.001, 0.3, 0.6, 1.0):
        asked = replace(request(steps=respacing), start=start, strength=strength)
        shared = stepper()
        sample = shared.prepare(asked)
        first = round(strength * 999)
        below = [timestep for timestep in kept if timestep < first]
        assert shared.schedules.timesteps(sample.respacing) == [*below, first]
        assert sample.steps == len(below) + 1


def test_guidance_is_off_outside_its_interval():
    plain, whole, none, part = stepper().run(
        [
            request(steps=6, guidance_scale=1.0),
            request(steps=6, guidance_scale=4.0),
            replace(request(steps=6, guidance_scale=4.0), guidance_interval=(0.0, 0.0)),
            replace(request(steps=6, guidance_scale=4.0), guidance_interval=(0.3, 0.7)),
        ]
    )
    assert torch.allclose(plain, none, atol=1e-3) and not torch.allclose(plain, whole, atol=1e-2)
    assert not torch.allclose(part, whole, atol=1e-3) and not torch.allclose(part, plain, atol=1e-3)


def test_a_small_strength_stays_near_the_starting_image():
    start = torch.rand(3, 16, 16) * 2 - 1
    near, far = (
        stepper().run([replace(request(steps=20, sampler="ddim"), start=start, strength=strength)])[
            0
        ]
        for strength in (0.1, 1.0)
    )
    assert (near - start).abs().mean() < 0.5 * (far - start).abs().mean()
    for strength in (0.0, 1.5, float("nan")):
        with pytest.raises(UserError, match="strength must lie above 0"):
            stepper().submit(replace(request(), start=start, strength=strength))


def test_sampling_from_inverted_noise_reproduces_the_image():
    """Exact only in the limit of small steps: 400 must be closer than 20 and than other noise."""
    image = stepper().run([request(steps=50, sampler="ddim", guidance_scale=1.0)])

    def error(steps):
        inversion = request(steps=steps, sampler="ddim", guidance_scale=1.0)
        noise = invert(stepper(), [inversion], image)[0]
        return (stepper().run([replace(inversion, noise=noise)]) - image).abs().mean().item()

    other = (
        (stepper().run([request(seed=8, steps=50, sampler="ddim", guidance_scale=1.0)]) - image)
        .abs()
        .mean()
        .item()
    )
    few, many = error(20), error(400)
    assert many < few / 3 and many < other / 3


def test_images_with_one_caption_are_inverted_with_their_own_conditioning():
    requests = [replace(request("upsampler", seed, steps=4), guidance_scale=3.0) for seed in (1, 2)]
    images = stepper("upsampler").run(requests)
    alone = torch.cat(
        [
            invert(stepper("upsampler"), [single_request], image[None])
            for single_request, image in zip(requests, images, strict=True)
        ]
    )
    assert torch.allclose(
        invert(stepper("upsampler", batched=True), requests, images), alone, atol=2e-3
    )


def test_equal_seeds_give_equal_pictures_and_different_seeds_different_ones():
    images = stepper().run(
        [request(seed=1, steps=3), request(seed=1, steps=3), request(seed=2, steps=3)]
    )
    assert torch.equal(images[0], images[1]) and not torch.equal(images[0], images[2])
    assert images.abs().max() <= 1


def test_samples_in_flight_never_exceed_the_capacity():
    shared_stepper = stepper(max_in_flight=2)
    for seed in range(5):
        shared_stepper.submit(request(seed=seed, steps=2))
    shared_stepper.step()
    assert (shared_stepper.scheduler.in_flight, shared_stepper.scheduler.queued) == (2, 3)
    done = 0
    while shared_stepper.scheduler.in_flight or shared_stepper.scheduler.queued:
        done += len(shared_stepper.step())
        assert shared_stepper.scheduler.in_flight <= 2
    assert done == 5


def finished(shared_stepper):
    """Tickets in the order of completion."""
    order = []
    while shared_stepper.scheduler.in_flight or shared_stepper.scheduler.queued:
        order += [ticket for ticket, _ in shared_stepper.step()]
    return order


def test_a_short_sample_overtakes_a_long_one():
    shared_stepper = stepper(max_in_flight=4)
    long = shared_stepper.submit(request(steps=50))
    for _ in range(10):
        shared_stepper.step()
    short = shared_stepper.submit(request(steps=5))
    assert finished(shared_stepper) == [short, long]


def test_a_request_for_many_pictures_does_not_delay_a_single_picture():
    shared_stepper = stepper(max_in_flight=2)
    many = [
        shared_stepper.submit(replace(request(seed=seed, steps=4), group="many"))
        for seed in range(6)
    ]
    shared_stepper.step()
    single = shared_stepper.submit(replace(request(seed=9, steps=4), group="single"))
    order = finished(shared_stepper)
    assert order.index(single) <= 2 and [ticket for ticket in order if ticket != single] == many


@pytest.mark.parametrize(
    "steps, previews, taken",
    [(8, 3, [2, 4, 6]), (5, 0, []), (3, 3, [1, 2]), (10, 1, [5]), (1, 3, [])],
)
def test_previews_are_the_predicted_image_at_evenly_spaced_steps(steps, previews, taken):
    shared_stepper, seen = stepper(), []
    shared_stepper.submit(
        replace(
            request(steps=steps),
            previews=previews,
            on_preview=lambda image: seen.append((shared_stepper.scheduler.steps_done + 1, image)),
        )
    )
    while not (done := shared_stepper.step()):
        pass
    assert [step for step, _ in seen] == taken
    assert all(image.shape == (3, 16, 16) and image.abs().max() <= 1 for _, image in seen)
    assert torch.equal(done[0][1], stepper().run([request(steps=steps)])[0])
    if len(seen) == 3 and steps == 8:  # later previews are closer to the picture
        errors = [(image - done[0][1]).abs().mean().item() for _, image in seen]
        assert errors[2] < errors[0]


def test_a_caption_shared_by_samples_is_encoded_once():
    shared_stepper, calls = stepper(), []
    encode = shared_stepper.model.encode_text
    shared_stepper.model.encode_text = lambda tokens, mask: calls.append(1) or encode(tokens, mask)
    shared_stepper.run(
        [
            request(seed=seed, steps=2, prompt=prompt)
            for seed, prompt in enumerate(["a", "b", "a", "a", "b"])
        ]
    )
    assert len(calls) == 3  # both captions, and the empty one
    shared_stepper.run([request(steps=2, prompt="b")])
    assert len(calls) == 3


def test_a_cancelled_sample_leaves_immediately_and_changes_no_other_sample():
    alone = stepper().run([request(steps=5)])[0]
    shared_stepper = stepper()
    leaver, stayer = (
        shared_stepper.submit(request(seed=3, steps=9)),
        shared_stepper.submit(request(steps=5)),
    )
    shared_stepper.step()
    assert shared_stepper.scheduler.cancel(leaver) and shared_stepper.scheduler.in_flight == 1
    assert not shared_stepper.scheduler.cancel(leaver)
    images = {}
    while not images:
        images.update(shared_stepper.step())
    assert torch.equal(images[stayer], alone)


def test_an_interrupted_run_leaves_no_samples_for_the_next():
    shared_stepper, requests = stepper(), [request(seed=seed, steps=3) for seed in (1, 2)]

    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shared_stepper.run(requests, interrupt)
    with pytest.raises(UserError, match="no sampler 'euler'"):
        shared_stepper.run([request(seed=8, steps=3), request(sampler="euler")])
    assert (shared_stepper.scheduler.in_flight, shared_stepper.scheduler.queued) == (
        0,
        0,
    ) and torch.equal(shared_stepper.run(requests), stepper().run(requests))


def test_a_run_returns_only_its_own_samples():
    shared_stepper = stepper()
    shared_stepper.submit(request(seed=8, steps=1))
    assert torch.equal(
        shared_stepper.run([request(steps=3)])[0], stepper().run([request(steps=3)])[0]
    )


def test_known_pixels_are_kept_and_the_others_are_painted():
    import numpy as np

    known = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    mask = np.zeros((16, 16), bool)
    mask[:, :8] = True
    image = stepper().run([request(steps=4, known=known, known_mask=mask)])[0]
    from glide_ray.data.images import to_uint8

    assert np.array_equal(to_uint8(image)[mask], known[mask])
    assert not np.array_equal(to_uint8(image)[~mask], known[~mask])


def test_an_engine_answers_many_threads_and_matches_the_stepper():
    expected = stepper().run([request(seed=seed, steps=3) for seed in range(6)])
    engine = Engine(stepper(max_in_flight=3))
    results = {}

    def ask(seed):
        results[seed] = engine.submit(request(seed=seed, steps=3)).result(60)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    engine.close()
    assert all(torch.equal(results[seed], expected[seed]) for seed in range(6))


def test_a_cancelled_future_frees_its_slot_within_two_steps():
    engine = Engine(stepper())
    future = engine.submit(request(steps=1000))
    while engine.load.steps < 2:
        time.sleep(0.01)
    assert engine.load.in_flight == 1
    future.cancel()
    before = engine.load.steps
    deadline = time.monotonic() + 20
    while engine.load.in_flight and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (
        engine.load.in_flight == 0
        and engine.load.steps <= before + 2
        and engine.load.cancelled == 1
    )
    engine.close()


def test_an_engine_counts_its_samples_and_steps():
    engine = Engine(stepper(lanes=2))
    for future in [engine.submit(request(seed=seed, steps=4)) for seed in range(4)]:
        future.result(60)
    load = engine.load
    assert (
        load.finished,
        load.sample_steps,
        load.width,
        load.in_flight,
        load.queued,
        load.failed,
    ) == (4, 16, 2, 0, 0, 0)
    assert 8 <= load.steps <= 16 and load.busy_seconds > 0
    engine.close()


def test_an_engine_refuses_an_invalid_request_and_continues():
    engine = Engine(stepper())
    with pytest.raises(UserError, match="no sampler 'euler'"):
        engine.submit(request(sampler="euler")).result(60)
    with pytest.raises(UserError, match="Respacing"):
        engine.submit(request(steps="1,2,")).result(60)
    assert engine.submit(request(steps=2)).result(60).shape == (3, 16, 16)
    engine.close()


def failing(shared_stepper, fails):
    """The stepper with a network that raises in call N, counted from 1, if `fails(N)`."""
    network, calls = shared_stepper.denoiser.network, itertools.count(1)

    def call(*inputs):
        if fails(next(calls)):
            raise RuntimeError("out of memory")
        return network(*inputs)

    shared_stepper.denoiser.network = call
    return shared_stepper


def test_a_failed_step_fails_the_samples_in_flight_and_queued_ones_still_run():
    submitted = threading.Event()
    engine = Engine(failing(stepper(max_in_flight=1), lambda call: call == 2))
    # Its first step waits until the others are submitted.
    futures = [
        engine.submit(
            replace(request(steps=2), previews=1, on_preview=lambda image: submitted.wait(60))
        )
    ]
    futures += [engine.submit(request(seed=seed, steps=3)) for seed in range(3)]
    submitted.set()
    with pytest.raises(RuntimeError, match="out of memory"):
        futures[0].result(60)
    assert [future.result(60).shape for future in futures[1:]] == [(3, 16, 16)] * 3
    assert (engine.load.failed, engine.load.finished) == (1, 3)
    engine.close()


def test_if_every_step_fails_every_future_gets_the_error():
    engine = Engine(failing(stepper(max_in_flight=2), lambda call: True))
    for future in [engine.submit(request(seed=seed, steps=2)) for seed in range(5)]:
        with pytest.raises(RuntimeError, match="out of memory"):
            future.result(60)
    assert (engine.load.failed, engine.load.queued) == (5, 0)
    engine.close()


def test_an_image_lost_by_a_gpu_fault_fails_its_future():
    class Lost:
        def cpu(self):
            raise RuntimeError("an illegal memory access was encountered")

    shared_stepper = stepper()
    step = shared_stepper.step
    shared_stepper.step = lambda: [(ticket, Lost()) for ticket, _ in step()]
    engine = Engine(shared_stepper)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        engine.submit(request(steps=2)).result(60)
    assert (engine.load.failed, engine.load.finished) == (1, 0)
    engine.close()


def loaded(state, config, dtype=torch.float32, **options):
    model = GlideUNet(config.unet)
    model.load_state_dict(state)
    return Stepper(model, config, dtype=dtype, **options)


@pytest.mark.parametrize("batched", [False, True])
def test_a_sample_with_nan_fails_alone_in_its_batch_and_is_counted(batched):
    config = tiny().model
    state = with_nan_for("apple", config)
    good = [request(seed=seed, prompt="a dog", steps=4) for seed in range(3)]
    alone = loaded(state, config, batched=batched).run(good)
    engine = Engine(loaded(state, config, batched=batched))
    bad = engine.submit(request(prompt="apple", steps=4))
    futures = [engine.submit(one) for one in good]
    with pytest.raises(NonFiniteError, match="weights hold NaN.*first in text.token.weight"):
        bad.result(60)
    for future, image in zip(futures, alone, strict=True):
        assert torch.allclose(future.result(60), image, atol=2e-3 if batched else 0)
    load = engine.load
    assert (load.not_finite, load.failed, load.finished) == (1, 1, 3)
    engine.close()


@pytest.mark.parametrize("sampler", ["ancestral", "ddim", "plms", "dpm++", "unipc"])
def test_an_overflow_in_fp16_names_the_precision_and_fp32_gives_a_picture(sampler):
    config = tiny().model
    state = overflowing(config)
    asked = request(steps=3, sampler=sampler)
    assert loaded(state, config).run([asked]).isfinite().all()
    with pytest.raises(NonFiniteError, match="fp16, which overflows; try --precision bf16 or fp32"):
        loaded(state, config, torch.float16).run([asked])
    state["out.weight"] *= 1e6  # becomes infinite in fp16
    with pytest.raises(NonFiniteError, match="its weight out.weight is too large"):
        loaded(state, config, torch.float16).run([asked])


def test_an_infinite_output_is_no_black_picture_though_x0_is_clipped():
    """The last convolution overflows: eps is infinite, and no NaN arises without guidance."""
    config = tiny().model
    state = random_model(config.unet).state_dict()
    state["out.bias"][:] = 3e38
    state["out.weight"] *= 3e38
    with pytest.raises(NonFiniteError, match="in fp32: its output is not finite"):
        loaded(state, config).run([request(steps=3, guidance_scale=1.0, sampler="ddim")])


def test_previews_of_a_picture_with_nan_are_not_shown():
    config, shown = tiny().model, []
    asked = replace(request(prompt="apple", steps=4), previews=2, on_preview=shown.append)
    with pytest.raises(NonFiniteError):
        loaded(with_nan_for("apple", config), config).run([asked])
    assert shown == []


def test_a_request_that_cannot_be_queued_fails_alone():
    engine = Engine(stepper())
    with pytest.raises(TypeError):
        engine.submit(replace(request(), start=torch.zeros(3, 16, 16), strength="all")).result(60)
    assert engine.submit(request(steps=2)).result(60).shape == (3, 16, 16)
    assert engine.load.failed == 1
    engine.close()


def test_a_closed_engine_cancels_unfinished_samples_and_reports_unhealthy():
    engine, first_preview, go = Engine(stepper()), threading.Event(), threading.Event()
    first = engine.submit(
        replace(
            request(steps=1000),
            previews=999,
            on_preview=lambda image: first_preview.set() or go.wait(60),
        )
    )
    assert first_preview.wait(60)
    second = engine.submit(request(steps=2))  # stays queued until the current step ends
    engine.check()
    closing = threading.Thread(target=engine.close)
    closing.start()
    while not engine._closed:
        time.sleep(0.01)
    go.set()
    closing.join(60)
    assert first.cancelled() and second.cancelled()
    with pytest.raises(RuntimeError, match="has been closed"):
        engine.submit(request(steps=2))
    with pytest.raises(RuntimeError, match="thread has ended"):
        engine.check()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_whose_thread_dies_fails_all_waiting_futures():
    shared_stepper = stepper()

    def end():
        raise SystemExit

    shared_stepper.step = end
    engine = Engine(shared_stepper)
    with pytest.raises(CancelledError):
        engine.submit(request(steps=2)).result(60)
    engine._thread.join(60)
    with pytest.raises(RuntimeError, match="thread has ended"):
        engine.check()
    with pytest.raises(RuntimeError, match="has been closed"):
        engine.submit(request(steps=2))


@pytest.mark.parametrize(
    "options, param",
    [
        ({"guidance_scale": -1.0}, "guidance_scale"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"guidance_scale": 1e9}, "guidance_scale"),
        ({"steps": 0}, "steps"),
        ({"steps": 1001}, "steps"),
        ({"steps": "abc"}, "steps"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**70}, "seed"),
        ({"sampler": "euler"}, "sampler"),
        ({"clip_scale": -1.0}, "clip_scale"),
        ({"guidance_interval": (0.8, 0.2)}, "guidance_interval"),
        ({"upsampler_steps": "2,"}, "upsampler_steps"),
        ({"strength": 0.0}, "strength"),
    ],
)
def test_the_error_for_an_invalid_option_names_its_field(options, param):
    with pytest.raises(RequestError) as refusal:
        beside = {name: options.pop(name) for name in ("seed", "strength") if name in options}
        check_options(SampleOptions(**options), **beside)
    assert refusal.value.param == param


def test_a_request_error_keeps_its_field_when_pickled():
    again = pickle.loads(pickle.dumps(RequestError("steps are too many.", "steps")))
    assert (type(again), str(again), again.param) == (RequestError, "steps are too many.", "steps")


def test_a_variation_without_known_pixels_is_unchanged_by_an_edit_in_its_batch():
    """Noise is drawn for known pixels only in samples that have any."""
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    kept = np.arange(256).reshape(16, 16) % 16 < 8
    varied = request(steps=6, known=picture, known_mask=np.zeros((16, 16), bool))
    edited = request(seed=2, steps=6, known=picture, known_mask=kept)
    assert torch.equal(stepper().run([edited, varied])[1], stepper().run([varied])[0])
