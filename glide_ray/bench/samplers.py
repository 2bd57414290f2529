"""`glide bench samplers` and `glide bench distance`: which sampler needs fewest network calls.

`samplers` measures how closely each sampler and grid follows the ODE of a model, by the pictures of
250 DDIM steps from the same noise. `distance` measures pictures against real ones, where samplers
with fresh noise compare too.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..config.models import steps_of
from ..config.sampling import SampleOptions
from ..config.training import SAMPLE_PROMPTS
from ..data.images import area_downsample, to_tensor, to_uint8
from ..evaluation.cases import Case, read_rows, single_cases
from ..evaluation.judge_features import FeatureExtractor, View
from ..sampling.cascade import load_stepper
from ..sampling.grids import TRUTH, GridSearch, base_requests, upsampler_requests
from ..sampling.job import base_request, upsampler_request
from ..sampling.stepper import Stepper

IMAGES_PER_CALL = 32
FIRST_SEED = 1000  # `glide tune-sampler` uses the seeds from 0 on
UPSAMPLER_SHARE = 4  # an upsampler makes a quarter of the pictures, each 16 times as large
SETTINGS = (  # sampler and grid; {} is the number of steps
    ("ddim", "even{}"),
    ("plms", "even{}"),
    ("dpm++", "even{}"),
    ("dpm++", "lambda{}"),
    ("unipc", "even{}"),
    ("unipc", "lambda{}"),
    ("unipc", "mixed{}"),
    ("unipc", "edm{}"),
    ("unipc", "tuned"),
)
BASELINE = "dpm++ even"
RESAMPLES = 500  # of the bootstrap over pictures
# Requests of `glide bench distance`: the reference first
BASE_SETTINGS = (
    ("ancestral", "150"),
    ("ancestral", "25"),
    ("dpm++", "25"),
    ("dpm++sde", "15"),
    ("dpm++sde", "10"),
    ("unipc", "15"),
    ("unipc", "8"),
    ("unipc", "6"),
)
UPSAMPLER_SETTINGS = (
    ("ancestral", "10,10,3,2,2"),
    ("ancestral", "8"),
    ("ddim", "8"),
    ("unipc", "8"),
    ("unipc", "6"),
    ("unipc", "4"),
)


def bench_samplers(
    base: str | Path,
    upsampler: str | Path,
    pictures: int = 64,
    steps: Sequence[int] = (8, 15, 30),
    upsampler_steps: Sequence[int] = (4, 6, 8),
) -> dict[str, Any]:
    """RMSE of each sampler and grid to `TRUTH`, and its ratio to evenly spaced dpm++.

    The base model has its own guidance scale. Raises WeightsError.
    """
    prompts = [SAMPLE_PROMPTS[n % len(SAMPLE_PROMPTS)] for n in range(pictures)]
    seeds = range(FIRST_SEED, FIRST_SEED + pictures)
    stepper = _stepper(base, "base")
    search = GridSearch.of(stepper, base_requests(stepper.config, prompts, seeds))
    figures = {"base": _stage_figures(search, pictures, steps)}
    few = max(1, pictures // UPSAMPLER_SHARE)
    low_res, stepper = search.truth[:few], _stepper(upsampler, "upsampler")
    requests = upsampler_requests(stepper.config, prompts[:few], seeds[:few], low_res)
    figures["upsampler"] = _stage_figures(GridSearch.of(stepper, requests), few, upsampler_steps)
    return {"truth": " ".join(TRUTH), **figures}


def _stage_figures(search: GridSearch, pictures: int, steps: Sequence[int]) -> dict[str, Any]:
    sampling = search.stepper.config.sampling
    tuned = {steps_of(grid): grid for grid in sampling.tuned_grids}
    figures: dict[str, Any] = {"pictures": pictures, "guidance_scale": sampling.guidance_scale}
    for count in steps:
        found = {}
        for sampler, grid in SETTINGS:
            spacing = tuned.get(count) if grid == "tuned" else grid.format(count)
            if spacing is not None:
                began = time.perf_counter()
                distance = search.distance(spacing, sampler)
                seconds = (time.perf_counter() - began) / pictures
                found[f"{sampler} {grid.removesuffix('{}')}"] = (distance, seconds)
        least = found[BASELINE][0]
        figures[f"{count} steps"] = {
            name: {
                "rmse": round(distance, 4),
                "to_dpm++": round(distance / least, 2),
                "seconds": round(seconds, 3),
            }
            for name, (distance, seconds) in found.items()
        }
    return figures


def bench_distance(
    base: str | Path, upsampler: str | Path, corpus: str, pictures: int = 200
) -> dict[str, Any]:
    """Distance of pictures to real ones for several settings, compared with the first setting.

    The distance is the unbiased squared MMD of the judge's network with the kernel (xy/D + 1)^3
    (KID; Binkowski et al. 2018). Intervals of 95% are from a bootstrap over the prompts, which all
    settings share, as they do the seeds. The upsampler enlarges real pictures of the corpus. Raises
    WeightsError, CorpusError.
    """
    cases = single_cases("seen", read_rows(corpus, "train"), pictures, FIRST_SEED)
    extractor = FeatureExtractor()
    figures: dict[str, Any] = {"pictures": pictures}
    for role, weights, settings in (
        ("base", base, BASE_SETTINGS),
        ("upsampler", upsampler, UPSAMPLER_SETTINGS),
    ):
        stepper = _stepper(weights, role)
        size = stepper.config.image_size
        real = _features(extractor, [area_downsample(case.picture, size) for case in cases])
        generated, seconds = {}, {}
        for sampler, steps in settings:
            began = time.perf_counter()
            made = _pictures(stepper, cases, sampler, steps)
            name = f"{sampler} {steps}"
            seconds[name] = (time.perf_counter() - began) / pictures
            generated[name] = _features(extractor, made)
        figures[role] = {
            name: {**found, "seconds": round(seconds[name], 3)}
            for name, found in _compared(real, generated).items()
        }
    return figures


def _pictures(
    stepper: Stepper, cases: Sequence[Case], sampler: str, steps: str
) -> list[np.ndarray]:
    """Pictures (S, S, 3) uint8 of the cases' prompts and seeds, by a base model or an upsampler."""
    config = stepper.config
    requests = []
    for case in cases:
        if config.low_res_size is None:
            options = SampleOptions(sampler=sampler, steps=steps)
            requests.append(base_request(config, case.prompt, case.seed, options))
        else:
            options = SampleOptions(upsampler_sampler=sampler, upsampler_steps=steps)
            low_res = to_tensor(area_downsample(case.picture, config.low_res_size))
            requests.append(upsampler_request(config, case.prompt, case.seed, low_res, options))
    made: list[Tensor] = []
    for start in range(0, len(requests), IMAGES_PER_CALL):
        made += stepper.run(requests[start : start + IMAGES_PER_CALL])
    return [to_uint8(image) for image in made]


def _features(extractor: FeatureExtractor, pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Features (N, D) of the judge's network, each of mean 0 and norm sqrt(D)."""
    features = extractor.shapes([View.of(picture) for picture in pictures]).astype(np.float64)
    features -= features.mean(1, keepdims=True)
    return features / features.std(1, keepdims=True)


def _compared(
    real: np.ndarray, generated: Mapping[str, np.ndarray]
) -> dict[str, dict[str, float | list[float]]]:
    """Distance of each setting to the real pictures, and its difference to the first setting's.

    With intervals of 95%. The ratio to the first setting's too, where that is above 0 in nearly all
    draws: unbiased distances of pictures as good as real ones scatter around 0.
    """
    rng, n = np.random.default_rng(0), len(real)
    samples = [np.arange(n), *(rng.integers(0, n, n) for _ in range(RESAMPLES))]
    distances = {name: _resampled(real, features, samples) for name, features in generated.items()}
    reference = next(iter(distances.values()))
    found: dict[str, dict[str, float | list[float]]] = {}
    for name, values in distances.items():
        found[name] = {"distance": round(float(values[0]), 4)}
        compared = {"difference": values - reference}
        if np.quantile(reference, 0.025) > 0:
            compared["ratio"] = values / reference
        for kind, drawn in compared.items():
            found[name][kind] = round(float(drawn[0]), 4)
            found[name][f"{kind}_interval"] = [
                round(float(edge), 4) for edge in np.quantile(drawn[1:], (0.025, 0.975))
            ]
    return found


def _resampled(
    real: np.ndarray, generated: np.ndarray, samples: Sequence[np.ndarray]
) -> np.ndarray:
    """Unbiased squared MMD for each resample of the pictures.

    A picture that was drawn twice is no pair with itself.
    """

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / a.shape[1] + 1) ** 3

    within = [kernel(real, real), kernel(generated, generated)]
    across = kernel(real, generated)
    values = []
    for drawn in samples:
        weights = np.bincount(drawn, minlength=len(real)).astype(float)
        pairs = np.outer(weights, weights)
        np.fill_diagonal(pairs, 0)
        apart = (pairs * (within[0] + within[1])).sum() / pairs.sum()
        together = (np.outer(weights, weights) * across).sum() / weights.sum() ** 2
        values.append(apart - 2 * together)
    return np.array(values)


def _stepper(weights: str | Path, role: str) -> Stepper:
    return load_stepper(weights, role, "fp32", max_in_flight=IMAGES_PER_CALL, batched=True)
