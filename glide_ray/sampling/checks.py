"""Checks of sampling options, for the command line, the server and the stepper."""

from __future__ import annotations

from ..config.models import DiffusionConfig, ModelConfig, SamplingConfig
from ..config.sampling import SampleOptions
from ..diffusion.samplers import SAMPLERS
from ..diffusion.schedule import ScheduleError, check_pure_noise, grid, make_schedule
from ..errors import UserError, nearest

MAX_SCALE = 100.0  # largest scale of classifier-free and CLIP guidance
TIMESTEPS = 1000  # default number of diffusion timesteps when the model is unknown


class RequestError(UserError):
    """An invalid request. `param`: name of the invalid field."""

    def __init__(self, message: str, param: str):
        super().__init__(message)
        self.param = param

    # By default an exception is unpickled from the arguments of its base class, without `param`.
    def __reduce__(self) -> tuple[type[RequestError], tuple[str, str]]:
        return type(self), (str(self), self.param)


def check_options(
    options: SampleOptions,
    seed: int | None = None,
    strength: float | None = None,
    base: ModelConfig | None = None,
    upsampler: ModelConfig | None = None,
) -> None:
    """Raise RequestError for an invalid option, seed or strength.

    Steps are checked against the schedules of the models, or the default one for a model that is
    None.
    """
    for param in ("guidance_scale", "upsampler_guidance_scale", "clip_scale"):
        scale = getattr(options, param)
        if scale is not None and not 0 <= scale <= MAX_SCALE:  # true for NaN, too
            raise RequestError(
                f"{param} must lie between 0 and {MAX_SCALE:g} (given: {scale}); 3 is usual.",
                param,
            )
    strict = options.noise_scheme > 1  # recipes before version 0.2 begin at any timestep
    check_steps("steps", options.steps, options.sampler, base, strict and strength is None)
    check_steps(
        "upsampler_steps", options.upsampler_steps, options.upsampler_sampler, upsampler, strict
    )
    for param in ("sampler", "upsampler_sampler"):
        if (name := getattr(options, param)) is not None:
            check_sampler(name, param)
    low, high = options.guidance_interval
    if not 0 <= low <= high <= 1:
        raise RequestError(
            f"guidance_interval must be two numbers from 0 to 1, the smaller first "
            f"(given: {low} and {high}).",
            "guidance_interval",
        )
    if seed is not None:
        check_seed(seed)
    if strength is not None:
        check_strength(strength)


def check_seed(seed: int) -> None:
    """Raise RequestError for a seed outside of 63 bits."""
    if not 0 <= seed < 2**63:
        raise RequestError(f"seed must lie between 0 and 2^63 - 1 (given: {seed}).", "seed")


def check_steps(
    param: str,
    steps: int | str | None,
    sampler: str | None,
    model: ModelConfig | None,
    from_noise: bool = True,
) -> None:
    """Raise RequestError unless a model can take these steps: a number or a respacing.

    `from_noise`: sampling begins from pure noise, not from a picture.
    """
    if steps is None:
        return
    diffusion = model.diffusion if model else DiffusionConfig()
    spacing = (model.sampling if model else SamplingConfig()).respacing_for(steps, sampler)
    process = make_schedule(diffusion.schedule, diffusion.steps)
    try:
        kept = grid(process, spacing)
        if from_noise:
            check_pure_noise(process, kept[-1], spacing)
    except ScheduleError as error:
        number = str(steps).lstrip("-").isdecimal()
        hint = f" Steps may be a number from 1 to {diffusion.steps}." if number else ""
        raise RequestError(f"{error}{hint}", param) from None


def check_sampler(name: str, param: str = "sampler") -> None:
    """Raise RequestError for an unknown sampler."""
    if name not in SAMPLERS:
        raise RequestError(f"There is no sampler {name!r}; {nearest(name, SAMPLERS)}", param)


def check_strength(strength: float) -> None:
    """Raise RequestError for a strength outside of (0, 1]."""
    if not 0 < strength <= 1:  # true for NaN, too
        raise RequestError(
            f"strength must lie above 0 and at most at 1 (given: {strength}); "
            f"0.6 keeps a picture's outline.",
            "strength",
        )


def check_negative(model: ModelConfig, options: SampleOptions) -> None:
    """Raise RequestError for a negative prompt without guidance, where it would do nothing.

    `model`: the base model, or the upsampler where it works alone.
    """
    prefix = "" if model.low_res_size is None else "upsampler_"
    scale = getattr(options, f"{prefix}guidance_scale")
    if options.negative_prompt and (model.sampling.guidance_scale if scale is None else scale) == 1:
        which = "an upsampler" if prefix else "a"
        raise RequestError(
            f"negative_prompt needs classifier-free guidance; set {which} guidance scale other "
            "than 1.",
            "negative_prompt",
        )


def check_clip(clip_scale: float, has_clip: bool) -> None:
    """Raise RequestError for CLIP guidance without a CLIP model."""
    if clip_scale and not has_clip:
        raise RequestError(
            "clip_scale asks for CLIP guidance, which needs a CLIP model; give one with it.",
            "clip_scale",
        )
