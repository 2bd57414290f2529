"""Text pre-training: the text transformer learns from captions before the U-Net is trained."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from helpers.tiny import random_model, tiny

from glide_ray.tensors import Batch, Conditioning
from glide_ray.train import text_first
from glide_ray.train.text_first import SPREAD, explained, learn_words, standardise

COLOURS = torch.tensor([[1, -1, -1], [-1, 1, -1], [-1, -1, 1], [1, 1, -1]]).float()


def batches(seed=0):
    """Batches with captions of two words: the colours of the left and right half of the image."""
    draws = torch.Generator().manual_seed(seed)
    while True:
        words = torch.randint(0, 4, (32, 2), generator=draws)
        tokens = torch.zeros(32, tiny().model.unet.text.context, dtype=torch.long)
        tokens[:, :2] = words + torch.tensor([10, 20])
        mask = torch.zeros_like(tokens, dtype=torch.bool)
        mask[:, :2] = True
        image = (
            COLOURS[words]
            .permute(0, 2, 1)
            .repeat_interleave(8, 2)[:, :, None]
            .expand(32, 3, 16, 16)
        )
        yield Batch(image=image.contiguous(), conditioning=Conditioning(tokens=tokens, mask=mask))


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """A clock of text_first alone, on which a step takes 20 ms however busy the machine is."""
    clock = SimpleNamespace(monotonic=itertools.count(0, 0.01).__next__)
    monkeypatch.setattr(text_first, "time", clock)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_learn_words_makes_captions_explain_pictures_and_keeps_the_unet(dtype):
    model = random_model(tiny().model.unet).requires_grad_(True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert learn_words(model, batches(), 0.1, dtype=dtype) > 0.9
    changed = {
        name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])
    }
    assert changed and all(name.startswith("text.") for name in changed)


def test_the_pooled_text_features_are_standardised():
    model = random_model(tiny().model.unet).requires_grad_(True)
    learn_words(model, batches(), 0.02)
    seen = torch.cat(
        [
            model.text(batch.conditioning.tokens, batch.conditioning.mask)[1].detach()
            for batch in itertools.islice(batches(1), 20)
        ]
    )
    assert seen.mean(0).abs().mean() < 0.3 * SPREAD
    assert seen.std(0).mean().item() == pytest.approx(SPREAD, rel=0.3)


def test_standardising_gives_the_layers_output_the_requested_mean_and_spread():
    torch.manual_seed(0)
    pool, x = torch.nn.Linear(5, 7), torch.randn(1000, 5)
    standardise(pool, pool(x))
    assert pool(x).mean(0).abs().max() < 1e-5 and pool(x).std(0).mean().item() == pytest.approx(
        SPREAD, rel=1e-4
    )


def test_the_share_explained_is_one_minus_the_error_over_the_variance():
    assert explained([(1.0, 4.0), (0.0, 4.0)]) == pytest.approx(0.875)
