"""Kernels and CUDA graphs of inference on a GPU.

Without a GPU, Triton interprets the kernels, and the tests that need CUDA itself are skipped.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from glide_ray.bench.speed import random_model
from glide_ray.config import presets
from glide_ray.models.cost import example_conditioning
from glide_ray.sampling.request import SampleRequest
from glide_ray.sampling.stepper import Stepper

kernels = pytest.importorskip(
    "glide_ray.models.kernels", reason="there is no Triton for this platform", exc_type=ImportError
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
RESAMPLED = {
    kernels.SAME: lambda x: x,
    kernels.UP: lambda x: F.interpolate(x, scale_factor=2.0),
    kernels.DOWN: lambda x: F.avg_pool2d(x, 2),
}


def relative_error(actual, expected):
    return float((actual - expected).norm() / expected.norm())


def images(*shape, mean=0.0, spread=1.0):
    return (mean + spread * torch.randn(*shape, device=DEVICE)).contiguous(
        memory_format=torch.channels_last
    )


def config_of(name):
    """A small version of the preset that has every kind of block."""
    config = presets.get(name).model
    unet = config.unet.model_copy(
        update={
            "image_size": 16,
            "low_res_size": 4 if config.unet.low_res_size else None,
            "channels": 16,
            "groups": 4,
            "multipliers": (1, 2),
            "attention_sizes": (8,),
            "head_channels": 16,
        }
    )
    return config.model_copy(update={"unet": unet})


@pytest.mark.parametrize("whole", [True, False], ids=["one program a group", "in chunks"])
@pytest.mark.parametrize(
    ("shape", "groups", "resample"),
    [
        ((2, 72, 16, 16), 6, "SAME"),
        ((1, 96, 8, 12), 32, "UP"),
        ((3, 64, 16, 8), 16, "DOWN"),
        ((1, 40, 20, 30), 4, "SAME"),
    ],
)
def test_fused_normalisation_agrees_with_pytorch_in_float64(
    monkeypatch, shape, groups, resample, whole
):
    """Includes means far from 0, and group widths and image sizes that are not powers of two."""
    if not whole:
        monkeypatch.setattr(kernels, "WHOLE", 0)
    torch.manual_seed(0)
    channels, resample = shape[1], getattr(kernels, resample)
    x, weight, bias, before = (
        images(*shape, mean=50, spread=3),
        *torch.randn(3, channels, device=DEVICE),
    )
    scale, shift = torch.randn(shape[0], 2 * channels, device=DEVICE).chunk(2, dim=1)
    expected = F.group_norm(
        x.double() + before.double()[:, None, None], groups, weight.double(), bias.double(), 1e-5
    )
    expected = expected * (1 + scale.double()[..., None, None]) + shift.double()[..., None, None]
    found = kernels.group_norm(
        x,
        groups,
        weight,
        bias,
        1e-5,
        before=before,
        scale=scale,
        shift=shift,
        silu=True,
        resample=resample,
    )
    assert relative_error(found, RESAMPLED[resample](F.silu(expected))) < 3e-6
    assert found.is_contiguous(memory_format=torch.channels_last)
    plain = kernels.group_norm(x, groups, weight, bias, 1e-5)
    assert (
        relative_error(
            plain, F.group_norm(x.double(), groups, weight.double(), bias.double(), 1e-5)
        )
        < 3e-6
    )


@pytest.mark.parametrize("resample", ["SAME", "UP", "DOWN"])
def test_a_fused_sum_equals_the_sum_of_its_terms(resample):
    torch.manual_seed(0)
    x, bias, other, resample = (
        images(2, 80, 8, 12),
        *torch.randn(2, 80, device=DEVICE),
        getattr(kernels, resample),
    )
    skip = RESAMPLED[resample](x)
    h = images(*skip.shape)
    assert (
        relative_error(
            kernels.add(h, x, bias, other, resample), h + skip + (bias + other)[:, None, None]
        )
        < 1e-6
    )
    assert (
        relative_error(kernels.add(h, x, bias, resample=resample), h + skip + bias[:, None, None])
        < 1e-6
    )


def test_keys_and_values_of_the_image_follow_those_of_the_text():
    qkv, key, value = (
        torch.randn(2, 30, 3, 3, 16, device=DEVICE),
        *torch.randn(2, 2, 3, 7, 16, device=DEVICE),
    )
    keys, values = kernels.keys_values(qkv, key, value)
    assert torch.equal(keys, torch.cat([key, qkv[:, :, :, 1].transpose(1, 2)], dim=2))
    assert torch.equal(values, torch.cat([value, qkv[:, :, :, 2].transpose(1, 2)], dim=2))


@pytest.mark.parametrize("name", ["nano-base", "nano-upsampler", "nano-base-inpaint"])
def test_a_fused_network_equals_the_plain_one_up_to_rounding(name):
    config = config_of(name)
    torch.manual_seed(0)
    model = random_model(config, torch.float32, device=DEVICE)
    conditioning = example_conditioning(config, 2).to(DEVICE)
    x, timestep = torch.randn(2, 3, 16, 16, device=DEVICE), torch.tensor([500, 20], device=DEVICE)
    with torch.inference_mode(), torch.backends.cudnn.flags(allow_tf32=False):
        plain, weights = (
            model(x, timestep, conditioning),
            {key: value.clone() for key, value in model.state_dict().items()},
        )
        model.fuse()
        fused = model(x, timestep, conditioning)
    assert relative_error(fused.eps, plain.eps) < 1e-5
    assert relative_error(fused.variance, plain.variance) < 1e-5
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


# -- on a GPU --------------------------------------------------------------------------------------


def requests(config, count):
    """Requests with different captions, samplers and steps; some without guidance."""
    conditioning = example_conditioning(config, count)
    conditioning = replace(
        conditioning, tokens=torch.arange(count)[:, None].expand_as(conditioning.tokens) + 5
    )
    return [
        SampleRequest(
            conditioning[n : n + 1],
            seed=n,
            respacing="4" if n % 3 else "7",
            guidance_scale=1.0 if n % 2 else 3.0,
            sampler=("ancestral", "dpm++", "plms")[n % 3],
        )
        for n in range(count)
    ]


@needs_gpu
@pytest.mark.parametrize("name", ["nano-base", "nano-upsampler", "nano-base-inpaint"])
def test_cuda_graphs_agree_with_the_cpu(name):
    """Samples of different lengths, samplers and guidance scales join and leave.

    A second round uses other captions with the same CUDA graphs.
    """
    config = config_of(name)
    torch.manual_seed(0)
    model = random_model(config, torch.float32)
    with torch.backends.cudnn.flags(allow_tf32=False):
        expected = Stepper(model, config, max_in_flight=5).run(requests(config, 9))
        found = Stepper(model, config, "cuda", max_in_flight=5).run(requests(config, 9)).cpu()
    assert relative_error(found, expected) < 1e-3
    assert (found - expected).abs().median() < 1e-5


@needs_gpu
def test_a_warmed_up_gpu_records_no_more_graphs():
    config = config_of("nano-base")
    stepper = Stepper(
        random_model(config, torch.float16), config, "cuda", torch.float16, max_in_flight=3
    )
    stepper.warm(requests(config, 1)[0])
    recorded = dict(stepper.denoiser.network._graphs)
    assert sorted(recorded) == [1, 2, 3, 4, 6]
    assert torch.isfinite(stepper.run(requests(config, 7))).all()
    assert stepper.denoiser.network._graphs == recorded


# -- training --------------------------------------------------------------------------------------


def test_a_network_with_fused_norms_has_the_gradients_of_the_plain_one():
    config = config_of("nano-base")
    conditioning = example_conditioning(config, 2).to(DEVICE)
    x, timestep = torch.randn(2, 3, 16, 16, device=DEVICE), torch.tensor([500, 20], device=DEVICE)
    found = []
    for fuse in (False, True):
        torch.manual_seed(0)
        model = random_model(config, torch.float32, device=DEVICE).train().requires_grad_()
        if fuse:
            model.fuse_training()
        torch.manual_seed(1)
        model(x, timestep, conditioning).eps.square().sum().backward()
        found.append({name: weight.grad for name, weight in model.named_parameters()})
    for name, gradient in found[0].items():
        if gradient is not None and gradient.any():
            assert relative_error(found[1][name], gradient) < 1e-4, name


@pytest.mark.parametrize("silu", [True, False], ids=["with SiLU", "without SiLU"])
@pytest.mark.parametrize("modulated", [True, False], ids=["modulated", "plain"])
@pytest.mark.parametrize(
    "shape, groups", [((2, 96, 8, 12), 32), ((3, 80, 20, 15), 8)], ids=["small", "in chunks"]
)
def test_the_fused_norm_of_training_has_the_gradients_of_pytorch_in_float64(
    shape, groups, modulated, silu
):
    from glide_ray.models.norm_training import norm

    torch.manual_seed(0)
    x, gradient = images(*shape, mean=5, spread=3), images(*shape)
    others = [*torch.randn(2, shape[1], device=DEVICE)]
    if modulated:
        others += torch.randn(shape[0], 2 * shape[1], device=DEVICE).chunk(2, dim=1)
    given = [tensor.detach().clone().requires_grad_() for tensor in (x, *others)]
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, *others)]
    expected = F.group_norm(exact[0], groups, exact[1], exact[2], 1e-5)
    if modulated:
        expected = expected * (1 + exact[3][..., None, None]) + exact[4][..., None, None]
    expected = F.silu(expected) if silu else expected
    found = norm(given[0], groups, *given[1:3], 1e-5, *given[3:], silu=silu)
    assert relative_error(found, expected) < 3e-6
    expected.backward(gradient.double())
    found.backward(gradient)
    for one, other in zip(given, exact, strict=True):
        assert relative_error(one.grad, other.grad) < 1e-5
