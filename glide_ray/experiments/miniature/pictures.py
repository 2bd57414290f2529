"""Sets of pictures with the same captions and seeds, and their features by two networks."""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ... import storage
from ...config.emoji_presets import SHARES
from ...config.sampling import SampleOptions
from ...data.images import decode, to_uint8
from ...data.sources import in_share, read_corpus, share_of
from ...evaluation.features import ClipFeatures
from ...models.efficientnet import load_efficientnet, normalise
from ...precision import fastest_precision
from ...progress import bar
from ...sampling.cascade import Cascade, load_stepper
from ...sampling.job import edit_request
from ...storage import fingerprint
from .models import CLIP, LARGE, SMALL

log = logging.getLogger(__name__)

SAMPLING = SampleOptions(sampler="dpm++", steps="16")
IMAGES = 192
SCALES, CLIP_SCALES = (1.0, 1.5, 2.0, 3.0, 5.0), (3.0, 10.0, 30.0)
# Scales in tables and figures. BY_CLIP was chosen on other captions: guidance at this scale changes
# their pictures without breaking them.
BEST, BY_CLIP = 3.0, 10.0
# No guidance at the noisiest timesteps: a small CLIP recognises nothing there, but its gradient
# would have the largest weight
CLIP_INTERVAL = (0.0, 0.9)
IMAGES_PER_CALL = 32  # images per model call
INPUT = 128  # side of EfficientNet's input in pixels


@dataclass(frozen=True)
class Real:
    """Real pictures uint8 (N, SIDE, SIDE, 3) that no model was trained on, each with a caption."""

    pixels: np.ndarray
    captions: list[str]


@dataclass(frozen=True)
class SetSampling:
    """How a set of pictures is sampled: the model and the options."""

    model: str
    options: SampleOptions


@dataclass(frozen=True)
class SetFeatures:
    """Features of N pictures by two networks.

    By the plain CLIP: `clip` (N, E) of the pictures and `words` (N, E) of their captions, both of
    unit length. By EfficientNet, which was never trained on emoji: features `looks` (N, 1280) and
    ImageNet class probabilities `classes` (N, 1000).
    """

    clip: np.ndarray
    words: np.ndarray
    looks: np.ndarray
    classes: np.ndarray

    @property
    def cosines(self) -> np.ndarray:
        """CLIP's cosine similarity of each picture with its caption (N,)."""
        return (self.clip * self.words).sum(1)


def guided(scale: float) -> SampleOptions:
    """Options with classifier-free guidance at `scale`; 1 is none."""
    return SAMPLING.model_copy(update={"guidance_scale": scale})


def by_clip(scale: float) -> SampleOptions:
    """Options with CLIP guidance at `scale`, without classifier-free guidance."""
    return guided(1.0).model_copy(update={"clip_scale": scale, "guidance_interval": CLIP_INTERVAL})


UNGUIDED, GUIDED, CLIP_GUIDED = "unguided", f"guidance-{BEST:g}", f"clip-{BY_CLIP:g}"
CLASSIFIER_FREE = {
    UNGUIDED if scale == 1 else f"guidance-{scale:g}": SetSampling(LARGE, guided(scale))
    for scale in SCALES
}
CLIPS = {f"clip-{scale:g}": SetSampling(LARGE, by_clip(scale)) for scale in CLIP_SCALES}
SMALLS = {
    f"{SMALL}-{name}": SetSampling(SMALL, guided(scale))
    for name, scale in ((UNGUIDED, 1.0), (GUIDED, BEST))
}
SETS = {**CLASSIFIER_FREE, **CLIPS, **SMALLS}


def real_pictures(folder: Path) -> Real:
    """Pictures of a corpus: of each group the share that training reads. Raises ShardError."""
    samples = [
        sample
        for sample in read_corpus(folder)
        if in_share(sample.key, 0, 0, share_of(SHARES, "", sample))
    ]
    return Real(
        np.stack([np.asarray(decode(sample.image)) for sample in samples]),
        [sample.captions[0] for sample in samples],
    )


def make_set(
    name: str,
    sampling: SetSampling,
    weights: Mapping[str, Path],
    captions: Sequence[str],
    out: Path,
) -> np.ndarray:
    """Pictures uint8 (N, S, S, 3), caption n with seed n; read from `out` if they are there."""
    clip = weights[CLIP] if sampling.options.clip_scale else None
    key = [
        fingerprint(weights[sampling.model]),
        fingerprint(clip) if clip else "",
        sampling.options.model_dump(mode="json"),
        list(captions),
    ]
    path = out / f"{name}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]}.npy"
    if path.exists():
        return np.load(path)
    log.info(f"{name}: {len(captions):,} pictures")
    pictures = generate(load(weights[sampling.model], clip), captions, sampling.options)
    buffer = io.BytesIO()
    np.save(buffer, pictures)
    storage.put(buffer.getvalue(), path)
    return pictures


def load(weights: Path, clip: Path | None = None) -> Cascade:
    """A base model that samples in batches, also on a CPU. Raises WeightsError."""
    return Cascade(
        load_stepper(weights, "base", fastest_precision(), IMAGES_PER_CALL, clip, batched=True)
    )


def generate(cascade: Cascade, captions: Sequence[str], options: SampleOptions) -> np.ndarray:
    """Sample pictures uint8 (N, S, S, 3), caption n with seed n."""
    with bar("generate", "image", len(captions)) as progress:
        pictures = []
        for start in range(0, len(captions), IMAGES_PER_CALL):
            batch = captions[start : start + IMAGES_PER_CALL]
            pictures += cascade.generate(batch, range(start, start + len(batch)), options)
            progress.update(len(batch))
    return np.stack(pictures)


def fill(
    cascade: Cascade,
    image: np.ndarray,
    known: np.ndarray,
    caption: str,
    seeds: Sequence[int],
    options: SampleOptions,
) -> list[np.ndarray]:
    """Inpaint `image` uint8 (S, S, 3) where `known` (S, S) is false, once per seed."""
    base = cascade.base
    return [
        to_uint8(filled)
        for filled in base.run(
            [
                edit_request(base.config, image, known, caption, seed, options, critic=base.critic)
                for seed in seeds
            ]
        )
    ]


class FeatureNetworks:
    """The plain CLIP and EfficientNet.

    Raises WeightsError for the CLIP, MissingNetworkError for EfficientNet.
    """

    def __init__(self, clip: Path):
        self._clip, self._efficientnet = ClipFeatures(clip), load_efficientnet()

    def features(self, pixels: np.ndarray, captions: Sequence[str]) -> SetFeatures:
        """Features of pictures uint8 (N, H, H, 3) and of their captions."""
        looks, classes = self._looks(pixels)
        clip_features = self._clip.images([Image.fromarray(image) for image in pixels])
        return SetFeatures(clip_features, self._clip.words(list(captions)), looks, classes)

    @torch.no_grad()
    def _looks(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        looks, classes = [], []
        for start in range(0, len(pixels), IMAGES_PER_CALL):
            resized = [
                np.asarray(Image.fromarray(image).resize((INPUT, INPUT), Image.Resampling.BICUBIC))
                for image in pixels[start : start + IMAGES_PER_CALL]
            ]
            x = normalise(torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2)).contiguous(
                memory_format=torch.channels_last
            )
            pooled = self._efficientnet.maps(x)[-1].mean((2, 3))
            looks.append(pooled.numpy())
            classes.append(self._efficientnet.classify(pooled).softmax(1).numpy())
        return np.concatenate(looks), np.concatenate(classes)
