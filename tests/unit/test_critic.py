"""CLIP: training, guidance of samples, and ranking of samples."""

import math

import pytest
import torch
import torch.multiprocessing as multiprocessing
from helpers.drawings import drawn_samples
from helpers.tiny import random_model, tiny, tiny_clip
from torch import distributed as dist

from glide_ray.config import presets
from glide_ray.config.overrides import override
from glide_ray.config.sampling import SampleOptions
from glide_ray.data.images import centre_crop, decode, to_8_bits, to_tensor
from glide_ray.data.tokenizer import Tokenizer
from glide_ray.diffusion.samplers import SAMPLERS
from glide_ray.diffusion.schedule import make_schedule
from glide_ray.errors import UserError
from glide_ray.models.clip import NoisedClip
from glide_ray.models.clip_scorer import NoisedClipScorer, PublicClipScorer, load_critic
from glide_ray.models.weights import WeightsError
from glide_ray.sampling.cascade import Cascade
from glide_ray.sampling.checks import RequestError
from glide_ray.sampling.request import SampleRequest
from glide_ray.sampling.stepper import Stepper
from glide_ray.tensors import Batch, Conditioning
from glide_ray.train.objectives import contrastive, draw, held_out_sums

CLIP = tiny_clip().model


def clip_model(seed=0):
    torch.manual_seed(seed)
    return NoisedClip(CLIP.clip)


def drawings(count):
    samples = list(drawn_samples(count, size=16))
    image = torch.stack([to_tensor(centre_crop(decode(sample.image), 16)) for sample in samples])
    return Batch(
        image,
        Conditioning(
            *Tokenizer(CLIP.context).batch(
                [f"{sample.captions[0]} number {n}" for n, sample in enumerate(samples)]
            )
        ),
    )


# -- training --------------------------------------------------------------------------------------


def loss_of(model, rows):
    batch, schedule = drawings(8), make_schedule("cosine")
    i, noise = draw(schedule, batch, 0, 1)
    return contrastive(model, schedule, batch[rows], i[rows], noise[rows])


def rank_gradient(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = clip_model()
    losses = loss_of(model, slice(4 * rank, 4 * rank + 4))
    losses["loss"].mean().backward()
    torch.save(
        {"loss": losses["loss"].detach(), **{name: p.grad for name, p in model.named_parameters()}},
        f"{folder}/{rank}.pt",
    )
    dist.destroy_process_group()


def test_two_workers_have_the_loss_and_gradient_of_one_worker_with_the_whole_batch(tmp_path):
    multiprocessing.spawn(rank_gradient, (str(tmp_path),), nprocs=2)
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    model = clip_model()
    whole = loss_of(model, slice(0, 8))["loss"]
    whole.mean().backward()
    assert torch.allclose(torch.cat([part["loss"] for part in parts]), whole.detach(), atol=1e-5)
    for name, parameter in model.named_parameters():
        mean = (parts[0][name] + parts[1][name]) / 2  # data parallelism averages gradients
        assert (mean - parameter.grad).abs().max() <= 1e-5, name
    alone = clip_model()
    loss_of(alone, slice(0, 4))["loss"].mean().backward()
    assert any(
        (alone.get_parameter(name).grad - parts[0][name]).abs().max() > 1e-3
        for name in parts[0]
        if name != "loss"
    )


def test_the_contrastive_loss_equals_its_closed_form():
    """The loss at scale s is log(1 + (n - 1) exp(-s)) for n perfectly embedded pairs.

    Each image embedding equals that of its caption and is orthogonal to all others.
    """

    class Perfect:
        def __call__(self, x, timestep, tokens, mask):
            from glide_ray.tensors import ClipOutput

            return ClipOutput(torch.eye(8), torch.eye(8), torch.tensor(3.0))

    losses = loss_of(Perfect(), slice(0, 8))
    assert (
        torch.allclose(losses["loss"], torch.full((8,), math.log(1 + 7 * math.exp(-3))), atol=1e-6)
        and losses["accuracy"].all()
    )


def test_noised_clip_learns_which_caption_goes_with_which_image():
    from glide_ray.train.loop import Trainer

    trainer = Trainer(tiny_clip("workers=1", "batch=8", "learning_rate=3e-3", "warmup_steps=0"))
    batch = drawings(8)
    before = trainer.held_out([batch])
    for number in range(1, 121):
        trainer.step(iter([batch]), number)
    after = trainer.held_out([batch])
    assert (
        before["held_out"] > 1.8
        and after["held_out"] < before["held_out"] * 0.7
        and after["held_out_accuracy"] >= 0.5
    )
    assert {piece.name for piece in trainer.param_slices} == set(clip_model().state_dict())


def test_activation_checkpointing_changes_no_gradient_of_clip():
    gradients = []
    for checkpointing in (False, True):
        model = clip_model()
        model.activation_checkpointing = checkpointing
        loss_of(model, slice(0, 8))["loss"].mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.allclose(*gradients, atol=1e-7)


def test_gains_and_biases_of_clip_do_not_decay():
    from glide_ray.train.optimizer import parameter_groups

    train = presets.get("emoji-clip").train.model_copy(update={"weight_decay": 0.0})
    decaying, others = parameter_groups(
        clip_model(), train.model_copy(update={"weight_decay": 0.1})
    )
    assert (
        others["weight_decay"] == 0
        and all(p.dim() == 1 for p in others["params"])
        and all(p.dim() > 1 for p in decaying["params"])
    )
    assert len(parameter_groups(clip_model(), train)) == 1


def test_held_out_loss_is_the_same_at_every_evaluation():
    model, schedule = clip_model().eval(), make_schedule("cosine")
    first = held_out_sums(contrastive, model, schedule, [drawings(8)], 0, 8)
    assert first == held_out_sums(contrastive, model, schedule, [drawings(8)], 0, 8)


# -- guidance --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def critic():
    model, generator = clip_model(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return NoisedClipScorer(model, CLIP)


def stepper(critic=None, **options):
    config = tiny().model
    return Stepper(random_model(config.unet), config, critic=critic, **options)


def request(critic, seed=3, scale=0.0, sampler="ancestral", steps="12", **options):
    tokens, mask = Tokenizer(128).batch(["a red circle"])
    text = critic.embed(["a red circle"]) if scale else None
    return SampleRequest(
        Conditioning(tokens, mask),
        seed,
        steps,
        sampler,
        2.0,
        clip_text=text,
        clip_scale=scale,
        **options,
    )


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_clip_guidance_raises_the_score_with_classifier_free_guidance_on(critic, sampler):
    scores = []
    for scale in (0.0, 10.0):
        image = to_8_bits(stepper(critic).run([request(critic, scale=scale, sampler=sampler)]))
        scores.append(critic.score(image, torch.tensor([0]), critic.embed(["a red circle"])).item())
    assert scores[1] > scores[0] + 0.5


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("batched", [False, True])
def test_a_sample_without_clip_guidance_is_unchanged_by_a_guided_one_in_its_batch(
    critic, sampler, batched
):
    company = stepper(critic, batched=batched)
    images = company.run(
        [
            request(critic, 1, 2.0, sampler),
            request(critic, 3, 0.0, sampler),
            request(critic, 4, 1.0, sampler),
        ]
    )
    alone = stepper(None, batched=batched).run([request(critic, 3, 0.0, sampler)])[0]
    guided = stepper(critic, batched=batched).run([request(critic, 4, 1.0, sampler)])[0]
    if batched:
        assert torch.allclose(images[1], alone, atol=1e-4) and torch.allclose(
            images[2], guided, atol=1e-3
        )
    else:
        assert torch.equal(images[1], alone) and torch.equal(images[2], guided)


def test_clip_guidance_is_off_outside_its_interval(critic):
    plain, never, always = (
        stepper(critic).run([request(critic, scale=scale, guidance_interval=interval)])[0]
        for scale, interval in ((0.0, (0.9999, 1)), (2.0, (0.9999, 1)), (2.0, (0, 1)))
    )
    assert torch.equal(plain, never) and not torch.allclose(plain, always, atol=1e-2)


def test_clip_guidance_keeps_known_pixels(critic):
    known = torch.linspace(-1, 1, 3 * 256).reshape(1, 3, 16, 16)
    guided = request(critic, scale=3.0)
    mask = (torch.arange(16) < 8).float().expand(1, 1, 16, 16)
    conditioning = Conditioning(
        guided.conditioning.tokens, guided.conditioning.mask, None, known, mask
    )
    for sampler in SAMPLERS:
        edit = SampleRequest(
            conditioning, 1, "6", sampler, 2.0, clip_text=guided.clip_text, clip_scale=3.0
        )
        assert torch.equal(stepper(critic).run([edit])[0][:, :, :8], known[0, :, :, :8]), sampler


def test_clip_guidance_without_a_clip_is_refused(critic, tiny_weights):
    with pytest.raises(UserError, match="needs a CLIP model"):
        stepper().submit(request(critic, scale=1.0))
    cascade = Cascade.load(tiny_weights["base"])
    with pytest.raises(RequestError, match="needs a CLIP model"):
        cascade.generate(["x"], [0], SampleOptions(steps=2, clip_scale=1.0))
    with pytest.raises(RequestError, match="give a CLIP model"):
        cascade.best_of("x", [0, 1], SampleOptions(steps=2))


# -- public CLIP -----------------------------------------------------------------------------------


def test_a_public_clip_scores_as_in_transformers(public):
    from transformers import CLIPModel, CLIPTokenizerFast

    critic, images = PublicClipScorer(public), torch.rand(2, 3, 32, 32) * 2 - 1
    captions = ["a red circle", "A dog. " * 30]
    mean, std = torch.tensor(
        [[122.77093945, 116.74601272, 104.09373519], [68.50053285, 66.63215831, 70.32316309]]
    ).reshape(2, 1, 3, 1, 1)
    tokens = CLIPTokenizerFast.from_pretrained(public)(
        captions, padding=True, truncation=True, max_length=40, return_tensors="pt"
    )
    with torch.no_grad():
        truth = CLIPModel.from_pretrained(public)(
            pixel_values=((images + 1) * 127.5 - mean) / std, **tokens
        ).logits_per_image.diagonal()
        ours = critic.score(images, torch.zeros(2), critic.embed(captions))
    assert torch.allclose(ours, truth, atol=1e-3)


def test_a_public_clip_that_never_saw_noise_guides_too(public):
    critic = PublicClipScorer(public)
    scores = []
    for scale in (0.0, 3.0):
        image = to_8_bits(stepper(critic).run([request(critic, scale=scale)]))
        scores.append(critic.score(image, torch.tensor([0]), critic.embed(["a red circle"])).item())
    assert scores[1] > scores[0]


def test_a_folder_without_a_clip_is_refused_in_one_sentence(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(
        WeightsError, match="does not hold a CLIP that transformers can read from safetensors"
    ):
        load_critic(tmp_path, tiny().model)


# -- files and ranking -----------------------------------------------------------------------------


def test_a_clip_of_another_image_size_schedule_or_type_is_refused(tiny_weights):
    base = tiny().model
    assert load_critic(tiny_weights["clip"], base).noised
    with pytest.raises(WeightsError, match="reads images of 16 pixels and nano-base makes 64"):
        load_critic(tiny_weights["clip"], presets.get("nano-base").model)
    with pytest.raises(
        WeightsError,
        match="noise of a cosine schedule of 1000 steps and nano-base on a cosine one of 500",
    ):
        load_critic(tiny_weights["clip"], override(tiny(), ["model.diffusion.steps=500"]).model)
    with pytest.raises(
        WeightsError, match="a model of the kind 'base', where one of the kind 'clip'"
    ):
        load_critic(tiny_weights["base"], base)
    with pytest.raises(
        WeightsError, match="a model of the kind 'clip', where one of the kind 'base'"
    ):
        Cascade.load(tiny_weights["clip"])


def test_best_of_returns_the_candidate_with_the_highest_clip_score(tiny_weights):
    cascade = Cascade.load(
        tiny_weights["base"], tiny_weights["upsampler"], clip=tiny_weights["clip"]
    )
    options = SampleOptions(steps=3, upsampler_steps=2)
    best = cascade.best_of("a red circle", range(5, 11), options)
    assert best.seed == max(best.scores, key=best.scores.get) and set(best.scores) == set(
        range(5, 11)
    )
    assert (best.image == cascade.generate(["a red circle"], [best.seed], options)[0]).all()
    small = Cascade.load(tiny_weights["base"], clip=tiny_weights["clip"]).generate(
        ["a red circle"], [7], options
    )[0]
    assert cascade.score(to_tensor(small)[None], ["a red circle"])[0] == pytest.approx(
        best.scores[7], abs=1e-4
    )
