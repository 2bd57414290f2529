"""Samples with different adapters in one batch, and the cache of a model's adapters."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from helpers.adapters import random_adapter

from glide_ray.config.lora import Lora, NamedLora
from glide_ray.config.sampling import SampleOptions
from glide_ray.diffusion.samplers import SAMPLERS
from glide_ray.models.adapter_cache import AdapterCache
from glide_ray.models.adapters import read_adapter
from glide_ray.models.cost import example_conditioning
from glide_ray.models.row_adapters import AdaptedNetwork, ScaledAdapter
from glide_ray.models.weights import WeightsError, load_unet
from glide_ray.sampling.cascade import load_stepper
from glide_ray.sampling.job import base_request, upsampler_request
from glide_ray.storage import fingerprint


def near(images, others):
    """Whether images differ by rounding: with random weights, much only at single pixels."""
    return (images - others).abs().mean() < 1e-4


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny_weights):
    """Adapter files of the tiny weights: a and b of the base model, up of the upsampler."""
    folder = tmp_path_factory.mktemp("adapters")
    return {
        name: random_adapter(folder / f"{name}.safetensors", tiny_weights[role], seed)
        for seed, (name, role) in enumerate((("a", "base"), ("b", "base"), ("up", "upsampler")))
    }


def named(path, scale=1.0, role="base"):
    sha256 = fingerprint(path)
    return NamedLora(name=path.stem, path=str(path), sha256=sha256, role=role, scale=scale)


def cache_of(stepper, weights, most_bytes=2**30):
    return AdapterCache(stepper.model, fingerprint(weights), most_bytes)


@pytest.fixture(scope="module")
def made(tiny_weights, files):
    """A function (uses of each sample, batched, sampler, merged) -> images of the base model."""

    def make(uses, batched=False, sampler=None, merged=(), lanes=1, scales=(3.0,)):
        torch.set_num_threads(1)
        stepper = load_stepper(
            tiny_weights["base"], "base", "fp32", batched=batched, loras=merged, lanes=lanes
        )
        cache = cache_of(stepper, tiny_weights["base"])
        requests = []
        for seed, of_sample in enumerate(uses):
            adapters = cache.scaled([named(files[name], by) for name, by in of_sample])
            scale = scales[seed % len(scales)]
            options = SampleOptions(sampler=sampler, steps=4, guidance_scale=scale)
            request = base_request(stepper.config, "a red dog", seed, options)
            requests.append(replace(request, adapters=adapters))
        return stepper.run(requests)

    return make


MIXED = [
    (),
    (("a", 1.0),),
    (("b", 0.5),),
    (("a", 0.3), ("b", -0.7)),
    (("a", 1.0),),
    (("a", 0.0),),
]


@pytest.mark.parametrize("lanes", [1, 2])
def test_a_picture_is_bit_identical_alone_and_beside_other_adapters(made, lanes):
    together = made(MIXED, lanes=lanes)
    plain = made([()] * len(MIXED), lanes=lanes)
    for seed, use in enumerate(MIXED):
        alone = made([()] * seed + [use], lanes=lanes)[seed]
        assert torch.equal(together[seed], alone)
        scales = [scale for _, scale in use]
        assert torch.equal(together[seed], plain[seed]) == (not any(scales))


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("sampler", [None, *SAMPLERS])
def test_each_sample_is_that_of_its_adapters_merged_into_the_weights(made, files, batched, sampler):
    """Up to rounding, which random weights amplify, to less than a twentieth of the effect."""
    together, plain = made(MIXED, batched, sampler), made([()] * len(MIXED), batched, sampler)
    for seed, use in enumerate(MIXED):
        loras = [Lora(path=str(files[name]), scale=scale) for name, scale in use]
        merged = made([()] * (seed + 1), batched, sampler, loras)[seed]
        effect, error = (
            (merged - other).abs().mean().item() for other in (plain[seed], together[seed])
        )
        assert error < 1e-3
        assert (effect > 0.02) == any(scale for _, scale in use)


def test_samples_with_and_without_guidance_share_a_batch(made):
    """Rows without guidance have no second row with the empty caption."""
    scales = (3.0, 1.0, 1.0, 2.0)
    together, apart = (made(MIXED, batched, scales=scales) for batched in (True, False))
    assert near(together, apart)


def test_a_batch_makes_one_network_call_a_step_and_none_through_adapters_without_any(
    made, monkeypatch
):
    calls = []
    call = AdaptedNetwork.__call__

    def counted(self, adapters, *inputs):
        calls.append(len(adapters))
        return call(self, adapters, *inputs)

    monkeypatch.setattr(AdaptedNetwork, "__call__", counted)
    made(MIXED, batched=True)
    assert calls == [2 * len(MIXED)] * 4
    calls.clear()
    made([()] * 3, batched=True)
    assert not calls


def test_the_upsampler_takes_adapters_too(tiny_weights, files):
    low_res = torch.rand(3, 16, 16) * 2 - 1
    images = []
    for unmerged in (True, False):
        loras = () if unmerged else [Lora(path=str(files["up"]), scale=0.5)]
        stepper = load_stepper(tiny_weights["upsampler"], "upsampler", "fp32", loras=loras)
        request = upsampler_request(stepper.config, "x", 0, low_res, SampleOptions())
        if unmerged:
            cache = cache_of(stepper, tiny_weights["upsampler"])
            adapters = cache.scaled([named(files["up"], 0.5, "upsampler")])
            request = replace(request, adapters=adapters)
        images.append(stepper.run([request]))
    assert near(*images)


def test_layers_of_a_fused_network_are_called_one_by_one(tiny_weights):
    """The kernels of a fused network read weights directly, past the hooks of the layers."""
    pytest.importorskip("triton")
    model, config = load_unet(tiny_weights["base"], "base")
    inputs = torch.randn(2, 3, 16, 16), torch.tensor([10, 900]), example_conditioning(config, 2)
    before = model(*inputs)
    model.fuse()
    copied = model.unfused_copy()
    after = copied(*inputs)
    assert torch.equal(after.eps, before.eps) and torch.equal(after.variance, before.variance)
    fused = [name for name, one in copied.named_modules() if getattr(one, "fused", None)]
    assert fused == [] and any(getattr(one, "fused", None) for one in model.modules())
    pairs = zip(model.parameters(), copied.parameters(), strict=True)
    assert all(one is other for one, other in pairs)


# -- cache -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stepper(tiny_weights):
    return load_stepper(tiny_weights["base"], "base", "fp32")


def test_requests_that_first_name_an_adapter_together_read_its_file_once(
    tiny_weights, files, monkeypatch
):
    stepper = load_stepper(tiny_weights["base"], "base", "fp32")
    cache, reads = cache_of(stepper, tiny_weights["base"]), []

    def slow_read(config, *rest):
        reads.append(config)
        time.sleep(0.1)
        return read_adapter(config, *rest)

    monkeypatch.setattr("glide_ray.models.adapter_cache.read_adapter", slow_read)
    with ThreadPoolExecutor(4) as pool:
        found = [*pool.map(lambda _: cache.scaled([named(files["a"])])[0], range(4))]
    assert len(reads) == 1 and len({id(one.adapter) for one in found}) == 1
    lora = named(files["a"])
    cache.release(lora.sha256)
    files["a"].rename(files["a"].with_suffix(".away"))
    try:
        for _ in range(2):  # a failure leaves nothing locked
            with pytest.raises(WeightsError, match="cannot be read"):
                cache.scaled([lora])
    finally:
        files["a"].with_suffix(".away").rename(files["a"])


def test_the_least_recently_used_adapters_leave_the_cache_and_samples_keep_theirs(
    stepper, files, tiny_weights, tmp_path
):
    third = random_adapter(tmp_path / "c.safetensors", tiny_weights["base"], 7)
    size = cache_of(stepper, tiny_weights["base"]).scaled([named(third)])[0].adapter.size
    cache = cache_of(stepper, tiny_weights["base"], 2 * size)
    first = cache.scaled([named(files["a"])])[0].adapter
    second = cache.scaled([named(files["b"])])[0].adapter
    assert cache.scaled([named(files["a"], 0.2)])[0].adapter is first
    cache.scaled([named(third)])
    assert cache.size == 2 * size
    assert cache.scaled([named(files["a"])])[0].adapter is first
    assert cache.scaled([named(files["b"])])[0].adapter is not second
    assert second.layers  # samples in flight still have it
    cache.release(fingerprint(files["b"]))
    cache.release(fingerprint(third))
    assert cache.size == size


def test_a_scale_of_zero_loads_nothing(stepper, files, tiny_weights):
    cache = cache_of(stepper, tiny_weights["base"])
    assert cache.scaled([named(files["a"], 0.0)]) == () and cache.size == 0


def test_files_that_do_not_serve_are_refused_by_name(stepper, files, tiny_weights, tmp_path):
    other = random_adapter(tmp_path / "o.safetensors", tiny_weights["base"], base_sha256="0" * 64)
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"x" * 100)
    cache = cache_of(stepper, tiny_weights["base"])
    gone = named(files["a"]).model_copy(update={"path": str(tmp_path / "gone.safetensors")})
    changed = named(files["a"]).model_copy(update={"sha256": "0" * 64})
    for lora, sentence in (
        (named(other), "'o' belongs to nano-base with SHA-256 0000000000000000.*train it on"),
        (named(damaged), "'damaged' cannot be read; put it back"),
        (gone, "'a' cannot be read; put it back"),
        (changed, "'a' has changed.*unload it and load it again"),
        (named(files["up"]), "'up' belongs to nano-upsampler"),
    ):
        with pytest.raises(WeightsError, match=sentence) as error:
            cache.scaled([lora])
        assert str(tmp_path) not in str(error.value)


def test_adapters_of_equal_keys_change_the_model_alike(stepper, files, tiny_weights):
    one, other = (
        cache_of(stepper, tiny_weights["base"]).scaled([named(files["a"], 0.5)])[0]
        for _ in range(2)
    )
    assert one.key == other.key and one.adapter is not other.adapter
    assert one.key != ScaledAdapter(one.adapter, 0.6).key
