"""The U-Net beyond the golden numbers: initialisation, memory, and the forms of its input."""

from dataclasses import replace

import pytest
import torch
from helpers.tiny import random_model, tiny
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from glide_ray.config.models import DiffusionConfig
from glide_ray.data.tokenizer import Tokenizer
from glide_ray.diffusion.process import q_sample, x0_from_eps
from glide_ray.diffusion.schedule import make_schedule
from glide_ray.models.cost import inspect
from glide_ray.models.layers import attend
from glide_ray.models.unet import GlideUNet
from glide_ray.models.weights import with_known_channels
from glide_ray.tensors import Conditioning


def inputs(unet, batch=2):
    torch.manual_seed(1)
    tokens, mask = Tokenizer(unet.text.context).batch(["a red apple", ""][:batch])
    size = unet.image_size
    low_res = (
        torch.rand(batch, 3, unet.low_res_size, unet.low_res_size) if unet.low_res_size else None
    )
    return (
        torch.randn(batch, 3, size, size),
        torch.tensor([10, 700][:batch]),
        Conditioning(tokens, mask, low_res),
    )


def test_a_fresh_model_predicts_no_noise_and_every_parameter_is_initialised():
    unet = tiny().model.unet
    torch.manual_seed(0)
    first = GlideUNet(unet)
    torch.manual_seed(0)
    second = GlideUNet(unet)
    output = first(*inputs(unet))
    assert not output.eps.any() and not output.variance.any()
    for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.isfinite(a).all() and torch.equal(a, b), f"{name} is not drawn from the seed"
        assert a.abs().max() < 10, name


@pytest.mark.parametrize("kind", ["base", "upsampler"])
@pytest.mark.parametrize("settings", [[], ["model.unet.pixel_channels=4"]])
def test_every_parameter_affects_the_output(kind, settings):
    unet = tiny(kind, *settings).model.unet
    model = random_model(unet).requires_grad_(True)
    output = model(*inputs(unet))
    (output.eps.square().sum() + output.variance.sum()).backward()
    assert not [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    ]


def test_precomputed_text_gives_the_same_output():
    unet = tiny().model.unet
    model = random_model(unet)
    x, timestep, conditioning = inputs(unet)
    text = model.encode_text(conditioning.tokens, conditioning.mask)
    assert torch.equal(
        model(x, timestep, conditioning).eps, model(x, timestep, conditioning, text).eps
    )
    assert len(text.keys_values) == len(model.attention_layers())


def test_channels_last_and_contiguous_memory_give_the_same_output():
    unet = tiny().model.unet
    last, contiguous = random_model(unet).to(memory_format=torch.channels_last), random_model(unet)
    contiguous.memory_format = torch.contiguous_format
    assert torch.allclose(last(*inputs(unet)).eps, contiguous(*inputs(unet)).eps, atol=1e-5)


def test_activation_checkpointing_saves_memory_and_gives_the_same_gradients():
    unet = tiny().model.unet

    def run(checkpointing):
        model = random_model(unet).requires_grad_(True)
        model.activation_checkpointing = checkpointing
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: kept.append(tensor.nbytes) or tensor, lambda tensor: tensor
        ):
            loss = model(*inputs(unet)).eps.square().sum()
        loss.backward()
        return sum(kept), [parameter.grad for parameter in model.parameters()]

    plain_bytes, plain = run(False)
    saved_bytes, checkpointed = run(True)
    assert saved_bytes < plain_bytes / 3
    assert all(
        torch.allclose(a, b, atol=1e-6)
        for a, b in zip(plain, checkpointed, strict=True)
        if a is not None
    )


def test_the_known_channels_of_a_fresh_inpainting_model_have_zero_weights():
    unet = tiny().model.unet.model_copy(update={"inpaint": True})
    model = GlideUNet(unet)
    assert not model.stem.weight[:, 3:7].any() and model.stem.weight[:, :3].any()


def test_an_inpainting_model_sees_only_the_known_pixels():
    unet = tiny().model.unet.model_copy(update={"inpaint": True})
    model = random_model(unet)
    x, timestep, conditioning = inputs(unet)
    known, mask = torch.rand(2, 3, 16, 16), torch.zeros(2, 1, 16, 16)
    mask[:, :, :8] = 1
    other = torch.where(mask > 0, known, -known)
    outputs = [
        model(x, timestep, replace(conditioning, known=image, known_mask=mask)).eps
        for image in (known, other)
    ]
    assert torch.equal(*outputs)
    assert not torch.equal(outputs[0], model(x, timestep, conditioning).eps)


def test_an_upsampler_without_its_low_res_image_is_refused():
    unet = tiny("upsampler").model.unet
    x, timestep, conditioning = inputs(unet)
    with pytest.raises(ValueError, match="low_res"):
        GlideUNet(unet)(x, timestep, replace(conditioning, low_res=None))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_outputs_are_near_float32(dtype):
    unet = tiny().model.unet
    exact = random_model(unet)(*inputs(unet)).eps
    rough = random_model(unet).to(dtype)(*inputs(unet)).eps
    assert rough.dtype == torch.float32
    assert (rough - exact).abs().max() < 0.05 * exact.abs().max()


def test_inspect_agrees_with_the_models_parameters_and_torchs_flop_counter():
    preset = tiny()
    info = inspect(preset.model)
    model = GlideUNet(preset.model.unet)
    assert info.parameters == sum(parameter.numel() for parameter in model.parameters())
    x, timestep, conditioning = inputs(preset.model.unet, 1)
    # Unfused attention, because the counter does not know the CPU's fused kernel.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(x, timestep, conditioning)
    assert info.flops + info.text_flops == counter.get_total_flops()


def test_patches_are_unfolded_to_the_pixels_they_were_folded_from():
    config = tiny("base", "model.unet.patch=2", "model.unet.attention_sizes=4").model.unet
    model = random_model(config)
    seen = {}
    model.stem.register_forward_hook(lambda module, given, out: seen.update(stem=given[0]))
    model.out.register_forward_hook(lambda module, given, out: seen.update(out=out))
    x = torch.randn(2, 3, 16, 16)
    conditioning = Conditioning(
        torch.zeros(2, 128, dtype=torch.int64), torch.zeros(2, 128, dtype=torch.bool)
    )
    output = model(x, torch.tensor([3, 900]), conditioning)
    # Pixel unshuffle at the input and shuffle at the output: channel c of pixel (2i + r, 2j + s) is
    # channel 4c + 2r + s of square (i, j).
    assert torch.equal(seen["stem"][:, 4 * 1 + 2 * 0 + 1, 3, 5], x[:, 1, 6, 11])
    assert output.eps.shape == x.shape
    assert torch.equal(output.eps[:, 2, 9, 4], seen["out"][:, 4 * 2 + 2 * 1 + 0, 4, 2])
    assert torch.equal(output.variance[:, 0, 2, 3], seen["out"][:, 4 * 3 + 2 * 0 + 1, 1, 1])


@pytest.mark.parametrize("kind", ["base", "upsampler"])
def test_layers_at_full_resolution_start_as_the_identity(kind):
    plain = tiny(kind, "model.unet.patch=2", "model.unet.attention_sizes=4").model.unet
    corrected = plain.model_copy(update={"pixel_channels": 8})
    before, after = random_model(plain), GlideUNet(corrected).eval().requires_grad_(False)
    after.load_state_dict(before.state_dict(), strict=False)
    given = inputs(plain)
    expected, output = before(*given), after(*given)
    assert torch.equal(output.eps, expected.eps)
    assert torch.equal(output.variance, expected.variance)


def test_layers_at_full_resolution_pass_a_change_across_the_edge_of_a_patch():
    config = tiny("base", "model.unet.patch=8", "model.unet.multipliers=1").model.unet
    model = random_model(config.model_copy(update={"pixel_channels": 8}))
    head = model.pixel_head
    prediction, given = torch.zeros(1, 3, 16, 16), torch.randn(1, 3, 16, 16)
    prediction.requires_grad_(True)
    output = head(prediction, given, torch.randn(1, head.embedding.in_features))
    output[0, 0, 8, 8].backward()  # the first pixel of the last patch
    reached = prediction.grad[0].abs().sum(0).nonzero()
    # Three convolutions of 3 pixels see 3 pixels to each side.
    assert reached.min(0).values.tolist() == [5, 5] and reached.max(0).values.tolist() == [11, 11]


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_v_prediction_network_returns_the_eps_of_x_t(schedule):
    diffusion = DiffusionConfig(schedule=schedule)
    model = GlideUNet(tiny("base", "model.unet.prediction=v").model.unet, diffusion).eval()
    x0, eps, i = (
        torch.rand(3, 3, 16, 16) * 2 - 1,
        torch.randn(3, 3, 16, 16),
        torch.tensor([0, 400, 999]),
    )
    tables = make_schedule(schedule)
    signal = tables.at("alpha_bar", i).sqrt()
    v = signal * eps - (1 - signal**2).sqrt() * x0
    model.out.register_forward_hook(
        lambda module, given, out: torch.cat([v, torch.zeros_like(v)], dim=1).float()
    )
    conditioning = Conditioning(
        torch.zeros(3, 128, dtype=torch.int64), torch.zeros(3, 128, dtype=torch.bool)
    )
    output = model(q_sample(tables, x0, i, eps), i, conditioning)
    assert torch.allclose(output.eps, eps, atol=1e-5)


@pytest.mark.parametrize("kind", ["base", "upsampler"])
def test_an_x0_prediction_network_returns_the_matching_eps(kind):
    model = GlideUNet(tiny(kind, "model.unet.prediction=x0").model.unet).eval()
    x, timestep, conditioning = inputs(model.config)
    output = model(x, timestep, conditioning)  # the last layer is zero
    low = (
        torch.nn.functional.interpolate(conditioning.low_res, x.shape[-2:], mode="bilinear")
        if kind == "upsampler"
        else torch.zeros_like(x)
    )
    x0 = x0_from_eps(make_schedule("cosine"), x, timestep, output.eps)
    assert torch.allclose(x0, low, atol=1e-4)


def test_manual_attention_agrees_with_pytorchs_in_16_bits():
    query, key, value = (torch.randn(2, 3, 20, 16).bfloat16().requires_grad_() for _ in range(3))
    exact = torch.nn.functional.scaled_dot_product_attention(
        query.float(), key.float(), value.float()
    )
    assert torch.allclose(attend(query, key, value).float(), exact, atol=0.02)
    assert torch.equal(
        attend(*(tensor.detach() for tensor in (query, key, value))),
        torch.nn.functional.scaled_dot_product_attention(query, key, value),
    )


def test_known_channels_can_be_added_to_a_model_with_patches():
    patches = ["model.unet.patch=2", "model.unet.attention_sizes=4", "model.unet.pixel_channels=4"]
    plain = tiny("base", *patches).model.unet
    inpaint = plain.model_copy(update={"inpaint": True})
    before, after = random_model(plain), GlideUNet(inpaint).eval().requires_grad_(False)
    after.load_state_dict(with_known_channels(before.state_dict(), inpaint))
    x, known = torch.randn(1, 3, 16, 16), torch.randn(1, 3, 16, 16)
    tokens, mask = torch.zeros(1, 128, dtype=torch.int64), torch.zeros(1, 128, dtype=torch.bool)
    expected = before(x, torch.tensor([500]), Conditioning(tokens, mask)).eps
    conditioning = Conditioning(tokens, mask, known=known, known_mask=torch.ones(1, 1, 16, 16))
    assert torch.allclose(after(x, torch.tensor([500]), conditioning).eps, expected, atol=1e-5)
