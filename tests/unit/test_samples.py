"""Sample grids and the EMA's held-out loss: reproducible to the byte, for each kind of model."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.tiny import random_model, tiny, tiny_clip, with_nan_for
from PIL import Image

from glide_ray.data.images import area_downsample, centre_crop, decode
from glide_ray.data.shards import ShardError
from glide_ray.data.sources import find_parts, read_part
from glide_ray.data.tokenizer import Tokenizer
from glide_ray.data.transforms import held_out_batches
from glide_ray.diffusion.schedule import make_schedule
from glide_ray.distributed.training import samples as review
from glide_ray.evaluation.report import HOLE, MARGIN, contact_sheet
from glide_ray.models.clip import NoisedClip
from glide_ray.models.unet import GlideUNet
from glide_ray.models.weights import WeightsError, load_model, save_weights
from glide_ray.sampling.cascade import load_stepper
from glide_ray.sampling.finite import NonFiniteError
from glide_ray.sampling.request import SampleRequest
from glide_ray.tensors import Conditioning
from glide_ray.train import samples
from glide_ray.train.objectives import held_out_sums, images_in, objective_of
from glide_ray.train.samples import centre_hole, held_out_of_average, sample_grid

PROMPTS = "sample_prompts=a red ellipse; a blue rectangle; a dog"


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    """Few sampling steps, and one thread, because more would mostly wait for such small models."""
    monkeypatch.setattr(samples, "STEPS", 3)
    monkeypatch.setattr(samples, "PICTURES", 2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def preset(corpus, kind="base", *settings):
    make = tiny_clip if kind == "clip" else lambda *more: tiny(kind, *more)
    return make(
        f"data.held_out={corpus / 'held_out'}",
        "data.min_size=16",
        "batch=4",
        "workers=1",
        *settings,
    )


def weights_of(path, settings, model=None, **metadata):
    save_weights(
        path, (model or random_model(settings.model.unet)).state_dict(), settings.model, **metadata
    )
    return path


def cells(grid, columns, count, size=192):
    """The pictures in a grid with one-line labels, found by the layout of `contact_sheet`."""
    top, pitch = MARGIN + 16 + MARGIN, size + 20 + MARGIN
    found = []
    for n in range(count):
        x, y = MARGIN + n % columns * (size + MARGIN), top + n // columns * pitch
        found.append(grid[y : y + size, x : x + size])
    return found


def shrunk(cell, size):
    """Undo the enlargement of a picture whose pixels were repeated."""
    factor = len(cell) // size
    small = cell[::factor, ::factor]
    assert np.array_equal(small.repeat(factor, 0).repeat(factor, 1), cell)
    return small


def originals(corpus, size):
    return [
        centre_crop(decode(sample.image), size)
        for part in find_parts(str(corpus / "held_out"))
        for sample in read_part(part)
    ][:2]


# -- grid ------------------------------------------------------------------------------------------


def test_a_base_models_grid_shows_each_prompt_with_seeds_0_to_2_and_is_deterministic(
    tiny_weights, drawn_corpus
):
    progress = []
    settings = preset(drawn_corpus, "base", PROMPTS)
    grid = sample_grid(
        tiny_weights["base"], settings, lambda done, total: progress.append((done, total))
    )
    assert grid.dtype == np.uint8 and grid.shape == (
        MARGIN + 28 + 192 + 20 + MARGIN,
        MARGIN + 4 * (192 + MARGIN),
        3,
    )
    assert progress == [(step, 9) for step in range(1, 10)]  # one sample after the other on a CPU
    assert sample_grid(tiny_weights["base"], settings).tobytes() == grid.tobytes()

    pictures = [shrunk(cell, 16) for cell in cells(grid, 4, 3)]
    stepper = load_stepper(tiny_weights["base"], "base")
    for seed, prompt in enumerate(settings.train.sample_prompts):
        tokens, mask = Tokenizer().batch([prompt])
        alone = stepper.run(
            [
                SampleRequest(
                    Conditioning(tokens, mask),
                    seed,
                    "3",
                    "ddim",
                    settings.model.sampling.guidance_scale,
                )
            ]
        )[0]
        assert np.array_equal(pictures[seed], samples.to_uint8(alone))
    expected = contact_sheet(
        pictures, ["a red ellipse", "a blue rectangle", "a dog"], 4, 192, "nano-base after step 0"
    )
    assert np.array_equal(grid, np.asarray(expected))  # labels and title too


def test_other_weights_give_another_grid_titled_with_the_step(tmp_path, drawn_corpus):
    settings = preset(drawn_corpus, "base", PROMPTS)
    first = sample_grid(weights_of(tmp_path / "1", settings, step="1200"), settings)
    second = sample_grid(
        weights_of(
            tmp_path / "2", settings, random_model(settings.model.unet, seed=1), step="1200"
        ),
        settings,
    )
    assert (first[40:232] != second[40:232]).any()
    title = np.asarray(
        contact_sheet([first[40:232, 12:204]], [""], 4, 192, "nano-base after step 1,200")
    )[: MARGIN + 28]
    assert np.array_equal(first[: MARGIN + 28], title) and np.array_equal(
        second[: MARGIN + 28], title
    )


def test_grids_use_guidance_only_for_models_trained_with_empty_captions(tiny_weights, drawn_corpus):
    guided, plain, unguided = (
        sample_grid(
            tiny_weights["base"],
            preset(drawn_corpus, "base", PROMPTS, f"empty_caption_rate={rate}"),
        )
        for rate in (0.2, 0, 0)
    )
    assert (guided != plain).any() and np.array_equal(plain, unguided)


def test_a_model_that_predicts_zero_noise_has_a_grid(tmp_path, drawn_corpus):
    settings = preset(drawn_corpus, "base", PROMPTS)
    model = GlideUNet(settings.model.unet)  # the last layer is initialised to zero
    grid = sample_grid(weights_of(tmp_path / "w", settings, model), settings)
    # The pictures are amplified noise.
    assert all(shrunk(cell, 16).std() > 50 for cell in cells(grid, 4, 3))


def test_a_grid_uses_at_most_the_timesteps_of_the_schedule(tmp_path, drawn_corpus, monkeypatch):
    monkeypatch.setattr(samples, "STEPS", 25)
    settings = preset(drawn_corpus, "base", "model.diffusion.steps=4", "sample_prompts=x")
    progress = []
    sample_grid(weights_of(tmp_path / "w", settings), settings, lambda *step: progress.append(step))
    assert progress[-1] == (4, 4)


def test_an_upsamplers_grid_shows_low_resolution_sample_and_original_side_by_side(
    tiny_weights, drawn_corpus
):
    settings = preset(drawn_corpus, "upsampler")
    grid = sample_grid(tiny_weights["upsampler"], settings)
    assert sample_grid(tiny_weights["upsampler"], settings).tobytes() == grid.tobytes()
    assert grid.shape == (MARGIN + 28 + 2 * (192 + 20 + MARGIN), MARGIN + 3 * (192 + MARGIN), 3)
    shown = cells(grid, 3, 6)
    for n, original in enumerate(originals(drawn_corpus, 64)):
        assert np.array_equal(shrunk(shown[3 * n], 16), area_downsample(original, 16))
        assert np.array_equal(shrunk(shown[3 * n + 2], 64), original)
        assert not np.array_equal(shrunk(shown[3 * n + 1], 64), original)
    labels = ["16 pixels", "a red ellipse", "original", "16 pixels", "a green ellipse", "original"]
    pictures = [shrunk(cell, size) for cell, size in zip(shown, 2 * (16, 64, 64), strict=True)]
    assert np.array_equal(
        grid, np.asarray(contact_sheet(pictures, labels, 3, 192, "nano-upsampler after step 0"))
    )


def test_an_inpainting_models_grid_keeps_known_pixels_and_fills_the_hole(tmp_path, drawn_corpus):
    settings = preset(drawn_corpus, "base", "model.unet.inpaint=true")
    weights = weights_of(tmp_path / "w", settings)
    grid = sample_grid(weights, settings)
    assert sample_grid(weights, settings).tobytes() == grid.tobytes()
    shown, known = [shrunk(cell, 16) for cell in cells(grid, 3, 6)], centre_hole(16)
    assert (~known).sum() == 64
    for n, original in enumerate(originals(drawn_corpus, 16)):
        masked, filled, whole = shown[3 * n : 3 * n + 3]
        assert np.array_equal(whole, original) and np.array_equal(filled[known], original[known])
        assert (
            (filled[~known] != original[~known]).any()
            and (masked[~known] == HOLE).all()
            and np.array_equal(masked[known], original[known])
        )


def test_an_inpainting_upsamplers_grid_shows_its_low_res_and_its_masked_input(
    tmp_path, drawn_corpus
):
    settings = preset(drawn_corpus, "upsampler", "model.unet.inpaint=true")
    grid = sample_grid(weights_of(tmp_path / "w", settings), settings)
    assert grid.shape[1] == MARGIN + 4 * (192 + MARGIN)
    low_res, masked, filled, whole = (
        shrunk(cell, size) for cell, size in zip(cells(grid, 4, 4), (16, 64, 64, 64), strict=True)
    )
    known = centre_hole(64)
    assert (
        np.array_equal(filled[known], whole[known])
        and (masked[~known] == HOLE).all()
        and np.array_equal(low_res, area_downsample(whole, 16))
    )


def test_pictures_of_a_large_model_are_shown_at_full_size(tmp_path, drawn_corpus):
    settings = preset(
        drawn_corpus,
        "base",
        "model.unet.image_size=256",
        "model.unet.multipliers=1,1,1,1,1,1",
        "sample_prompts=x",
        "empty_caption_rate=0",
    )
    grid = sample_grid(weights_of(tmp_path / "w", settings), settings)
    assert grid.shape[1] == MARGIN + 4 * (256 + MARGIN)


def test_a_clip_has_no_grid(tiny_weights, drawn_corpus):
    assert sample_grid(tiny_weights["clip"], preset(drawn_corpus, "clip")) is None


def test_a_grid_with_nan_is_one_sentence_and_no_black_pictures(tmp_path, drawn_corpus):
    settings = preset(drawn_corpus, "base", "sample_prompts=apple")
    path = tmp_path / "w.safetensors"
    save_weights(path, with_nan_for("apple", settings.model), settings.model)
    with pytest.raises(NonFiniteError, match="its weights hold NaN"):
        sample_grid(path, settings)


def test_missing_weights_or_held_out_pictures_are_named(tmp_path, tiny_weights, drawn_corpus):
    with pytest.raises(WeightsError, match="There is no weights file"):
        sample_grid(tmp_path / "none", preset(drawn_corpus))
    (tmp_path / "held_out").mkdir()
    for function in (sample_grid, held_out_of_average):
        with pytest.raises(ShardError):
            function(tiny_weights["upsampler"], preset(tmp_path, "upsampler"))


# -- held-out loss ---------------------------------------------------------------------------------


def as_ranks(weights, settings, ranks):
    """The held-out loss as training computes it: the mean over ranks, each with own batches."""
    model, config = load_model(weights)
    images, totals, batches = (
        0,
        {},
        [
            held_out_batches(settings.data, config, settings.train.micro_batch, rank, ranks)
            for rank in range(ranks)
        ],
    )
    for own in batches:
        own = list(own)
        images += images_in(own)
        sums = held_out_sums(
            objective_of(settings),
            model,
            make_schedule(config.diffusion.schedule),
            own,
            settings.train.seed,
            15,
        )
        totals = {name: totals.get(name, 0) + value for name, value in sums.items()}
    assert images == 15
    return {
        "average_held_out" if name == "loss" else f"average_held_out_{name}": pytest.approx(
            float(value / images), rel=1e-6
        )
        for name, value in totals.items()
    }


@pytest.mark.parametrize(
    "kind, names",
    [
        ("base", {"", "_mse", "_vb"}),
        ("upsampler", {"", "_mse", "_vb"}),
        ("clip", {"", "_accuracy"}),
    ],
)
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_held_out_loss_of_the_average_equals_trainings_for_the_same_weights(
    tiny_weights, drawn_corpus, kind, names, ranks
):
    settings = preset(
        drawn_corpus, kind, f"workers={ranks}", "micro_batch=3", "data.held_out_images=15"
    )
    figures = held_out_of_average(tiny_weights[kind], settings)
    assert figures == as_ranks(tiny_weights[kind], settings, ranks)
    assert set(figures) == {f"average_held_out{name}" for name in names}
    assert held_out_of_average(tiny_weights[kind], settings) == figures


def test_held_out_loss_of_a_plain_clip_can_use_fewer_images(tmp_path, drawn_corpus):
    settings, five = (
        preset(drawn_corpus, "clip", "model.clip.noised=false", f"data.held_out_images={images}")
        for images in (16, 5)
    )
    torch.manual_seed(0)
    weights = weights_of(tmp_path / "w", settings, NoisedClip(settings.model.clip))
    few, all_of_them = (
        held_out_of_average(weights, settings, images=5),
        held_out_of_average(weights, settings),
    )
    assert few != all_of_them and few == held_out_of_average(weights, five)


def test_the_error_of_a_model_that_predicts_zero_noise_is_the_mean_square_of_the_noise(
    tmp_path, drawn_corpus
):
    settings = preset(drawn_corpus)
    figures = held_out_of_average(
        weights_of(tmp_path / "w", settings, GlideUNet(settings.model.unet)), settings
    )
    assert figures["average_held_out_mse"] == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(
    "gpus, place",
    [
        (0, {"num_gpus": 0, "runtime_env": {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}}}),
        (2, {"num_gpus": 1}),
        (1, {"num_gpus": 0, "runtime_env": {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}}}),
    ],
)
def test_a_review_uses_a_gpu_that_no_worker_needs_or_none(
    drawn_corpus, tmp_path, monkeypatch, gpus, place
):
    task_options = []
    monkeypatch.setattr(review.ray, "cluster_resources", lambda: {"GPU": gpus})
    monkeypatch.setattr(
        review.ray,
        "remote",
        lambda **options: (
            task_options.append(options)
            or (lambda function: SimpleNamespace(remote=lambda *_: None))
        ),
    )
    reviewer = review.Reviewer(
        preset(drawn_corpus, "base", "steps=4", "checkpoint_every=2", "sample_every=2"),
        tmp_path,
        lambda *_: None,
        print,
    )
    reviewer.offer(2, "checkpoint")
    assert task_options == [{"num_cpus": 0, "max_retries": 1, **place}]


def test_a_grid_can_be_stored_as_a_picture(tiny_weights, drawn_corpus, tmp_path):
    grid = sample_grid(tiny_weights["base"], preset(drawn_corpus))
    Image.fromarray(grid).save(tmp_path / "grid.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "grid.png")), grid)
