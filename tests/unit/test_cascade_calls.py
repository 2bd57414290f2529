"""The order of the calls to the cascade's stages, which here only name the stage and the seed."""

from dataclasses import replace

import pytest

from glide_ray.sampling.cascade_calls import (
    ScoreCall,
    candidates,
    cascade_calls,
    image_jobs,
    split_previews,
)
from glide_ray.sampling.job import Job

JOB = Job("a cat", 10, 64)


def answer_calls(images, upsample, score=lambda image: 0.0):
    """Answer the calls; an image is "stage seed". Returns the calls and the finished images."""
    generator, result, calls = cascade_calls(images, upsample), None, []
    while True:
        try:
            call = generator.send(result)
        except StopIteration as end:
            return calls, end.value
        calls.append(call)
        result = (
            [score(image) for image in call.images]
            if isinstance(call, ScoreCall)
            else [f"{call.stage} {job.seed}" for job in call.jobs]
        )


def test_the_upsampler_receives_the_base_models_image():
    (base, upsampler), (image,) = answer_calls([[JOB]], upsample=True)
    assert (base.stage, base.jobs, upsampler.stage, upsampler.jobs) == (
        "base",
        [JOB],
        "upsampler",
        [JOB],
    )
    assert upsampler.low_res == ["base 10"]
    assert (image.base_image, image.upsampled, image.seed, image.scores) == (
        "base 10",
        "upsampler 10",
        10,
        {},
    )


def test_without_an_upsampler_the_base_image_is_the_result():
    (base,), (image,) = answer_calls([[JOB]], upsample=False)
    assert base.stage == "base" and (image.base_image, image.upsampled) == ("base 10", None)


def test_several_images_share_one_call_of_each_stage():
    jobs = [replace(JOB, seed=seed) for seed in (3, 1, 2)]
    calls, images = answer_calls([[job] for job in jobs], upsample=True)
    assert [call.jobs for call in calls] == [jobs, jobs]
    assert [image.upsampled for image in images] == ["upsampler 3", "upsampler 1", "upsampler 2"]


def test_only_the_candidate_with_the_highest_score_is_upsampled():
    scores = {"base 10": 0.5, "base 11": 2.0, "base 12": -1.0}
    calls, (image,) = answer_calls([candidates(replace(JOB, best_of=3))], True, scores.get)
    assert [type(call).__name__ for call in calls] == ["StageCall", "ScoreCall", "StageCall"]
    assert calls[1].images == list(scores) and calls[1].prompt == "a cat"
    assert [job.seed for job in calls[2].jobs] == [11] and calls[2].low_res == ["base 11"]
    assert (image.seed, image.upsampled) == (11, "upsampler 11")
    assert image.scores == {10: 0.5, 11: 2.0, 12: -1.0}


def test_candidates_have_no_previews_but_the_upsampling_of_the_best_has():
    calls, _ = answer_calls([candidates(replace(JOB, best_of=2, previews=3))], upsample=True)
    assert [job.previews for job in calls[0].jobs] == [0, 0]
    assert [job.previews for job in calls[2].jobs] == [1]


@pytest.mark.parametrize(
    "previews, upsample, split",
    [
        (0, True, (0, 0)),
        (1, True, (0, 0)),
        (2, True, (1, 0)),
        (3, True, (1, 1)),
        (3, False, (3, 0)),
    ],
)
def test_the_base_image_itself_is_one_of_the_previews(previews, upsample, split):
    assert split_previews(previews, upsample) == split
    assert not upsample or not previews or sum(split) + 1 == previews


def test_the_images_of_a_request_have_disjoint_candidates_with_consecutive_seeds():
    jobs = image_jobs(replace(JOB, best_of=3), 2)
    seeds = [[job.seed for job in candidates(job)] for job in jobs]
    assert seeds == [[10, 11, 12], [13, 14, 15]]


def test_seeds_wrap_around_at_their_maximum():
    last = replace(JOB, seed=2**63 - 1, best_of=2)
    assert [job.seed for job in candidates(last)] == [2**63 - 1, 0]
    assert [job.seed for job in image_jobs(last, 2)] == [2**63 - 1, 1]
