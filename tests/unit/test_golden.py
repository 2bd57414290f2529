"""Agreement with the released implementation on the numbers in tests/golden.

The README there describes each file.
"""

import json
from types import SimpleNamespace

import pytest
import torch
from helpers.paths import GOLDEN
from safetensors import safe_open
from safetensors.torch import load_file

from glide_ray.config import presets
from glide_ray.config.models import (
    ClipConfig,
    DiffusionConfig,
    ModelConfig,
    TextConfig,
    UNetConfig,
)
from glide_ray.data.tokenizer import Tokenizer
from glide_ray.diffusion.guidance import classifier_free, score_gradient
from glide_ray.diffusion.loss import hybrid_loss
from glide_ray.diffusion.process import q_sample
from glide_ray.diffusion.samplers import (
    History,
    Known,
    StepInput,
    ancestral_step,
    ddim_inversion_step,
    ddim_step,
    unipc_step,
)
from glide_ray.diffusion.schedule import kept_timesteps, make_schedule, respace
from glide_ray.models.clip import NoisedClip
from glide_ray.models.released import clip_from_released, clip_to_released, from_released
from glide_ray.models.unet import GlideUNet
from glide_ray.sampling import stepper
from glide_ray.sampling.request import SampleRequest
from glide_ray.tensors import Conditioning, ModelOutput

TOLERANCE = 2e-5
SHAPE = json.loads((GOLDEN / "config.json").read_text())
FORMS = {
    "base": {},
    "upsampler": {"low_res_size": 4},
    "base_inpaint": {"inpaint": True},
    "upsampler_inpaint": {"low_res_size": 4, "inpaint": True},
}


@pytest.mark.parametrize("name", ["cosine", "linear"])
@pytest.mark.parametrize("spacing", ["lambda8", "edm8", "20"])
def test_unipc_agrees_with_an_independent_implementation(name, spacing):
    """The trajectories of another library, on a network in closed form (see the README there)."""
    stored = load_file(GOLDEN / "unipc.safetensors")
    schedule, x = respace(make_schedule(name), spacing), stored["start"]
    assert schedule.timestep.tolist() == stored[f"{name}.{spacing}.timesteps"].tolist()
    history = History.none(x)
    for i in reversed(range(len(schedule))):
        eps = torch.tanh(1.3 * x) + 0.2 * torch.sin(0.01 * schedule.timestep[i] + x)
        output = ModelOutput(eps, torch.zeros_like(x))
        indices, noise = torch.full((2,), i), torch.zeros_like(x)
        step = unipc_step(StepInput(schedule, output, x, indices, noise, history=history))
        x, history = step.x, history.then(step)
    assert torch.allclose(x, stored[f"{name}.{spacing}"], atol=TOLERANCE)


def golden_model(form):
    config = UNetConfig(
        image_size=SHAPE["image_size"],
        channels=SHAPE["model_channels"],
        multipliers=SHAPE["channel_mult"],
        blocks=SHAPE["num_res_blocks"],
        head_channels=SHAPE["head_channels"],
        groups=SHAPE["num_groups"],
        attention_sizes=[
            SHAPE["image_size"] // factor for factor in SHAPE["attention_downsample_factors"]
        ],
        text=TextConfig(
            width=SHAPE["text_width"],
            layers=SHAPE["text_layers"],
            heads=SHAPE["text_heads"],
            context=SHAPE["text_ctx"],
            vocabulary=SHAPE["vocab_size"],
        ),
        **FORMS[form],
    )
    model = GlideUNet(config).eval().requires_grad_(False)
    state = {
        name: tensor.float()
        for name, tensor in load_file(GOLDEN / f"{form}.weights.safetensors").items()
    }
    model.load_state_dict(from_released(state, config), strict=True)
    return model.to(memory_format=torch.channels_last)


def read(name):
    with safe_open(GOLDEN / name, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}


def worst(a, b):
    return (a - b).abs().max().item()


# -- models ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_the_unet_gives_the_released_output(form):
    stored, _ = read(f"{form}.forward.safetensors")
    conditioning = Conditioning(
        stored["tokens"],
        stored["mask"],
        stored.get("low_res"),
        stored.get("inpaint_image"),
        stored.get("inpaint_mask"),
    )
    output = golden_model(form)(stored["x"], stored["t"], conditioning)
    assert worst(torch.cat([output.eps, output.variance], 1), stored["output"]) <= TOLERANCE


# -- schedules and losses --------------------------------------------------------------------------


def test_every_respacing_keeps_the_released_timesteps():
    for spacing, timesteps in json.loads((GOLDEN / "timesteps.json").read_text()).items():
        assert kept_timesteps(1000, spacing) == timesteps, spacing


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_schedule_tables_equal_the_released_ones(name):
    stored, _ = read(f"loss.{name}.safetensors")
    schedule = make_schedule(name)
    assert worst(schedule.alpha_bar, stored["alphas_cumprod"]) <= 1e-12
    assert worst(schedule.max_log_variance.exp(), stored["betas"]) <= 1e-12
    assert worst(schedule.posterior_variance, stored["posterior_variance"]) <= 1e-12
    assert worst(schedule.min_log_variance, stored["posterior_log_variance_clipped"]) <= 1e-9


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_noising_and_the_hybrid_loss_equal_the_released_ones(name):
    stored, _ = read(f"loss.{name}.safetensors")
    schedule = make_schedule(name)
    assert (
        worst(q_sample(schedule, stored["x_start"], stored["t"], stored["noise"]), stored["x_t"])
        <= TOLERANCE
    )
    loss = hybrid_loss(
        schedule,
        ModelOutput(*stored["model_output"].chunk(2, 1)),
        stored["x_start"],
        stored["x_t"],
        stored["t"],
        stored["noise"],
    )
    for ours, theirs in ((loss.mse, "mse"), (loss.vb, "vb"), (loss.total, "loss")):
        assert worst(ours, stored[theirs]) <= TOLERANCE, theirs


# -- samplers --------------------------------------------------------------------------------------

TRAJECTORIES = sorted(
    path.name
    for path in GOLDEN.glob("sampler.*.safetensors")
    if not any(word in path.name for word in ("inversion", "inpaint", "guided.ddim"))
)
RELEASED_SCHEDULES = {"squaredcos_cap_v2": "cosine", "linear": "linear"}


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_every_step_of_a_released_trajectory_is_reproduced(name):
    """Each step starts from the released previous state and uses the released noise.

    The tolerance is 2e-5 for the network's guided eps and for values of size 1. A step scales an
    error of eps by its derivative with respect to eps, which is large near t = T
    (1/sqrt(alpha_bar) reaches 20,000 on the cosine schedule). The images agree within 2e-5
    unscaled. Gradient-guided DDIM has a test of its own.
    """
    stored, meta = read(name)
    schedule = respace(make_schedule(RELEASED_SCHEDULES[meta["schedule"]]), meta["respacing"])
    assert schedule.timestep.tolist() == stored["timesteps"].sort().values.tolist()
    model = golden_model("base")
    denoiser = _denoiser(model, stored, float(meta.get("guidance_scale", 1)))
    x = stored["x_T"]
    for number, i in enumerate(_countdown(schedule, x)):
        step_input = StepInput(
            schedule,
            denoiser(x, schedule.timestep[i]),
            x,
            i,
            stored["step_noise"][number],
            gradient=float(meta["strength"]) * (stored["target"] - x)
            if "target" in stored
            else None,
        )
        step = (
            ancestral_step(step_input)
            if meta["sampler"] == "ddpm"
            else ddim_step(step_input, eta=0.5 if meta["sampler"] == "ddim_eta0.5" else 0.0)
        )
        to_x0 = (1 / schedule.at("alpha_bar", i) - 1).sqrt().max().item()
        to_x = to_x0 * schedule.at(
            "x0_weight" if meta["sampler"] == "ddpm" else "alpha_bar_prev", i
        ).max().item() ** (1 if meta["sampler"] == "ddpm" else 0.5)
        if "pred_x0" in stored:
            assert worst(step.x0, stored["pred_x0"][number]) <= TOLERANCE * max(1, to_x0), number
        assert worst(step.x, stored["samples"][number]) <= TOLERANCE * max(
            1, to_x, x.abs().max().item()
        ), number
        x = stored["samples"][number]


def test_guided_ddim_differs_from_the_release_in_the_size_of_the_move_and_in_clipping():
    """The release moves x_0 by up to 20,000 times the gradient, which saturates pictures.

    The released x_0 follows from each pair of states. Without its move it is the clipped prediction
    of the network, to which ours adds the move of the ancestral step and clips again.
    """
    stored, meta = read("sampler.gradient_guided.ddim.safetensors")
    schedule = respace(make_schedule("cosine"), meta["respacing"])
    denoiser = _denoiser(golden_model("base"), stored, 1.0)
    x = stored["x_T"]
    for number, i in enumerate(_countdown(schedule, x)):
        gradient = float(meta["strength"]) * (stored["target"] - x)
        output, noise = denoiser(x, schedule.timestep[i]), stored["step_noise"][number]
        step = ddim_step(StepInput(schedule, output, x, i, noise, gradient=gradient))
        level, before = (schedule.at(name, i) for name in ("alpha_bar", "alpha_bar_prev"))
        share = ((1 - before) / (1 / level - 1)).sqrt()  # of x_0's part in the next x, through eps
        released_x0 = (stored["samples"][number] - share * x / level.sqrt()) / (
            before.sqrt() - share
        )
        predicted = released_x0 - (1 - level) / level.sqrt() * gradient
        expected = predicted + (1 - before) / before.sqrt() * gradient
        # Rounding of the released states, and of eps, which 1/sqrt(alpha_bar) multiplies
        rounding = max(
            1,
            ((1 - level) / level).sqrt().max().item(),
            (x.abs().max() / (before.sqrt() - share).abs().min()).item(),
        )
        assert worst(step.x0, expected.clamp(-1, 1)) <= TOLERANCE * rounding, number
        x = stored["samples"][number]


def test_a_trajectory_with_known_pixels_is_reproduced_to_its_end():
    stored, meta = read("sampler.inpaint.ddpm.safetensors")
    schedule = respace(make_schedule("cosine"), meta["respacing"])
    model, known = (
        golden_model("base_inpaint"),
        Known(stored["inpaint_image"], stored["inpaint_mask"]),
    )
    conditioning = Conditioning(stored["tokens"], stored["mask"], None, known.image, known.mask)
    x = stored["x_T"]
    for number, i in enumerate(_countdown(schedule, x)):
        output = model(x, schedule.timestep[i], conditioning)
        x = ancestral_step(StepInput(schedule, output, x, i, stored["step_noise"][number], known)).x
    assert worst(x, stored["sample"]) <= TOLERANCE
    kept = known.mask.expand_as(x) > 0.5
    assert torch.equal(x[kept], known.image[kept])


def _sampled(stored, meta, form, preset, monkeypatch):
    """The images of a `Stepper` with a preset's sampler, from stored noise instead of a seed's."""
    sampling = presets.get(preset).model.sampling
    schedule = RELEASED_SCHEDULES[meta["schedule"]]
    model = golden_model(form)
    config = ModelConfig(name=form, unet=model.config, diffusion=DiffusionConfig(schedule=schedule))
    drawn = (iter(stored["step_noise"][:, n : n + 1]) for n in range(len(stored["x_T"])))

    def noise_source(*_):
        rows = next(drawn)
        return SimpleNamespace(normal=lambda shape: next(rows))

    monkeypatch.setattr(stepper, "noise_source", noise_source)
    requests = [
        SampleRequest(
            Conditioning(
                stored["tokens"][n : n + 1],
                stored["mask"][n : n + 1],
                None,
                *(
                    None if image is None else image[n : n + 1]
                    for image in (stored.get("inpaint_image"), stored.get("inpaint_mask"))
                ),
            ),
            seed=n,
            respacing=meta["respacing"],
            sampler=sampling.sampler,
            guidance_scale=float(meta.get("guidance_scale", 1)),
            noise=noise,
        )
        for n, noise in enumerate(stored["x_T"])
    ]
    return stepper.Stepper(model, config).run(requests)


def test_the_released_upsampler_is_sampled_by_the_released_ddim_loop(monkeypatch):
    """Whole trajectories; rounding in the first steps is scaled by up to 1/sqrt(alpha_bar)."""
    stored, meta = read("sampler.ddim.linear.ddim10.safetensors")
    images = _sampled(stored, meta, "base", "filtered-upsampler", monkeypatch)
    assert worst(images, stored["samples"][-1]) <= 10 * TOLERANCE


@pytest.mark.parametrize("preset", ["filtered-base-inpaint", "filtered-upsampler-inpaint"])
def test_the_released_inpainting_models_are_sampled_by_the_released_p_sample_loop(
    preset, monkeypatch
):
    stored, meta = read("sampler.inpaint.ddpm.safetensors")
    images = _sampled(stored, meta, "base_inpaint", preset, monkeypatch)
    assert worst(images, stored["sample"]) <= 10 * TOLERANCE


def test_ddim_inversion_is_reproduced_to_its_end():
    stored, meta = read("sampler.ddim_inversion.safetensors")
    schedule = respace(make_schedule("cosine"), meta["respacing"])
    denoiser = _denoiser(golden_model("base"), stored, 1.0)
    x = stored["x_0"]
    for number in range(len(schedule) - 1):
        i = torch.full((len(x),), number)
        x = ddim_inversion_step(schedule, denoiser(x, schedule.timestep[i]), x, i).x
        assert worst(x, stored["samples"][number]) <= TOLERANCE


def _countdown(schedule, x):
    return [torch.full((len(x),), index) for index in reversed(range(len(schedule)))]


def _denoiser(model, stored, scale):
    tokens, mask = stored["tokens"], stored["mask"]

    def paired(x, timestep):
        twice = len(x) > len(tokens)
        return model(
            x,
            timestep,
            Conditioning(
                torch.cat([tokens, tokens]) if twice else tokens,
                torch.cat([mask, torch.zeros_like(mask)]) if twice else mask,
            ),
        )

    return classifier_free(paired, torch.full((len(tokens),), scale))


# -- tokens ----------------------------------------------------------------------------------------


def test_captions_have_the_released_tokens():
    tokenizer = Tokenizer()
    for row in json.loads((GOLDEN / "tokenizer.gpt2.json").read_text()):
        encoded = tokenizer.encode(row["text"])
        assert encoded.tokens == row["padded"], row["text"]
        assert sum(encoded.mask) == row["mask_true"]


# -- noised CLIP -----------------------------------------------------------------------------------


def golden_clip():
    """A noised CLIP and reference values computed once with the released encoders.

    All weights are random: the release initialises only some of the parameters randomly.
    """
    state, _ = read("clip.weights.safetensors")
    stored, meta = read("clip.forward.safetensors")
    layers, embedding = int(meta["layers"]), int(meta["embed_dim"])
    config = ClipConfig(
        image_size=int(meta["image_size"]),
        patch_size=int(meta["patch_size"]),
        embedding=embedding,
        image_width=int(meta["image_heads"]) * int(meta["head_dim"]),
        image_layers=layers,
        image_heads=int(meta["image_heads"]),
        text_width=int(meta["text_heads"]) * int(meta["head_dim"]),
        text_layers=layers,
        text_heads=int(meta["text_heads"]),
        context=int(meta["text_ctx"]),
        vocabulary=int(meta["vocab_size"]),
        scale=float(meta["logit_scale"]),
    )
    towers = [
        {
            key.removeprefix(f"{tower}_encoder."): tensor.float()
            for key, tensor in state.items()
            if key.startswith(tower)
        }
        for tower in ("image", "text")
    ]
    model = NoisedClip(config).eval().requires_grad_(False)
    model.load_state_dict(clip_from_released(*towers, config))
    return model, stored, meta, towers


def test_noised_clip_gives_the_released_embeddings():
    model, stored, _, towers = golden_clip()
    assert (
        worst(model.encode_text(stored["tokens"], stored["lengths"]), stored["text_embeddings"])
        <= TOLERANCE
    )
    assert (
        worst(model.encode_image(stored["images"], stored["t"]), stored["image_embeddings"])
        <= TOLERANCE
    )
    for ours, theirs in zip(clip_to_released(model.state_dict()), towers, strict=True):
        assert ours.keys() == theirs.keys() and all(
            torch.equal(ours[key], theirs[key]) for key in theirs
        )


def test_the_gradient_of_clip_guidance_equals_the_released_one():
    model, stored, meta, _ = golden_clip()
    text = stored["text_embeddings"]
    gradient = score_gradient(
        model.score,
        stored["images"],
        stored["t"],
        text,
        torch.full((3,), float(meta["gradient_scale"])),
    )
    assert (
        worst(gradient, stored["guidance_gradient"])
        <= 1e-4 * stored["guidance_gradient"].abs().max()
    )
