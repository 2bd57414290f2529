"""CLIP for guidance and reranking: embed captions once, score images against them at every step.

`NoisedClipScorer` is for our models, trained on noised images (sec. 4.4) or on clean ones.
`PublicClipScorer` is for published models that never saw noise, for the comparison of app. D. Both
run in float32: at lower precision their gradients underflow.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import storage
from ..config.models import ClipModelConfig, ModelConfig
from ..data.tokenizer import ClipTokenizer, Tokenizer
from ..errors import UserError
from .clip import CHANNEL_MEANS, CHANNEL_STDS, NoisedClip
from .weights import WeightsError, load_metadata, load_noised_clip

# Files of a public CLIP's folder: weights, settings, vocabulary.
CLIP_FILES = (".safetensors", ".json", ".txt")


class ClipScorer(Protocol):
    noised: bool  # trained on noised images, so `score` can receive x_t itself
    embedding: int
    image_size: int  # input side in pixels

    def embed(self, prompts: Sequence[str]) -> Tensor:
        """Captions -> embeddings (N, E) of length 1."""

    def embed_images(self, x: Tensor) -> Tensor:
        """Clean images (B, 3, H, W) in [-1, 1] -> embeddings (B, E) of length 1."""

    def score(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        """Logits (B,) of images (B, 3, H, W) at timesteps (B,) with their captions (B, E)."""


class NoisedClipScorer:
    def __init__(
        self,
        model: NoisedClip,
        config: ClipModelConfig,
        device: torch.device | str = "cpu",
        merges: str | None = None,
    ):
        self.model, self.config, self.device = (
            model.to(device, torch.float32).eval().requires_grad_(False),
            config,
            device,
        )
        self.noised, self.embedding, self.image_size = (
            config.clip.noised,
            config.clip.embedding,
            config.image_size,
        )
        self._tokenizer = (
            ClipTokenizer(merges, config.context) if merges else Tokenizer(config.context)
        )

    @torch.no_grad()
    def embed(self, prompts: Sequence[str]) -> Tensor:
        tokens, mask = self._tokenizer.batch(list(prompts))
        return self.model.encode_text(tokens.to(self.device), mask.sum(1).to(self.device))

    @torch.no_grad()
    def embed_images(self, x: Tensor) -> Tensor:
        x = x.to(self.device)
        return self.model.encode_image(
            x, torch.zeros(len(x), dtype=torch.int64, device=self.device)
        )

    def score(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        return self.model.score(x, timestep if self.noised else torch.zeros_like(timestep), text)


class PublicClipScorer:
    """A CLIP in `transformers` format: a folder with config, tokenizer and safetensors weights.

    Raises UserError without transformers, WeightsError for an unsuitable folder.
    """

    noised = False

    def __init__(self, folder: str | Path, device: torch.device | str = "cpu"):
        self._model, self._tokenizer = _read_public_clip(folder)
        self._model.to(device, torch.float32).eval().requires_grad_(False)
        self.device = device
        self.embedding: int = self._model.config.projection_dim
        self.image_size: int = self._model.config.vision_config.image_size

    @torch.no_grad()
    def embed(self, prompts: Sequence[str]) -> Tensor:
        context = self._model.config.text_config.max_position_embeddings
        tokens = self._tokenizer(
            list(prompts), padding=True, truncation=True, max_length=context, return_tensors="pt"
        ).to(self.device)
        return F.normalize(
            self._model.text_projection(self._model.text_model(**tokens).pooler_output), dim=-1
        )

    @torch.no_grad()
    def embed_images(self, x: Tensor) -> Tensor:
        return self._embed_images(x.to(self.device))

    def score(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        """Logits, as in `ClipScorer`; the timestep is ignored."""
        return self._model.logit_scale.exp() * (self._embed_images(x) * text).sum(-1)

    def _embed_images(self, x: Tensor) -> Tensor:
        x = F.interpolate(
            (x + 1) / 2,
            (self.image_size, self.image_size),
            mode="bicubic",
            align_corners=False,
            antialias=True,
        )
        mean, std = (
            x.new_tensor(values).reshape(1, 3, 1, 1) / 255
            for values in (CHANNEL_MEANS, CHANNEL_STDS)
        )
        return F.normalize(
            self._model.visual_projection(self._model.vision_model((x - mean) / std).pooler_output),
            dim=-1,
        )


def _read_public_clip(folder: str | Path) -> tuple[Any, Any]:
    """Model and tokenizer of `transformers`, whose annotations are too wide to be of use."""
    try:
        # Optional dependency, for public CLIPs only.
        from transformers import CLIPModel, CLIPTokenizer
    except ImportError:
        raise UserError(
            "A public CLIP needs transformers; run `pip install 'glide_ray[clip]'`."
        ) from None
    try:
        return (
            CLIPModel.from_pretrained(folder, use_safetensors=True, local_files_only=True),
            CLIPTokenizer.from_pretrained(folder, local_files_only=True),
        )
    except Exception as error:  # the library raises many types for an unsuitable folder
        raise WeightsError(
            f"{folder} does not hold a CLIP that transformers can read from safetensors "
            f"({str(error).splitlines()[0][:200]})."
        ) from None


def load_critic(
    path: str | Path, base: ModelConfig, device: torch.device | str = "cpu"
) -> ClipScorer:
    """The CLIP at `path`, checked against a base model. Raises WeightsError.

    `path`: a weights file of noised CLIP, or the folder of a public CLIP.
    """
    critic = load_clip(path, device)
    if isinstance(critic, PublicClipScorer):
        return critic
    check_clip(critic.config, base, path)
    return critic


def check_clip(config: ClipModelConfig, base: ModelConfig, path: str | Path) -> None:
    """Raise WeightsError if one of our CLIPs does not match the base model's size and noise."""
    if config.image_size != base.image_size:
        raise WeightsError(
            f"{path} reads images of {config.image_size} pixels and {base.name} makes "
            f"{base.image_size}; give a CLIP that was trained for this size."
        )
    if config.clip.noised and config.diffusion != base.diffusion:
        raise WeightsError(
            f"{path} was trained on the noise of a {config.diffusion.schedule} schedule of "
            f"{config.diffusion.steps} steps and {base.name} on a {base.diffusion.schedule} one of "
            f"{base.diffusion.steps}; give a CLIP of the same noise."
        )


def load_clip(
    path: str | Path, device: torch.device | str = "cpu"
) -> NoisedClipScorer | PublicClipScorer:
    """The CLIP at `path`, not checked against a base model. Raises WeightsError.

    `path`: a weights file of noised CLIP, or the folder of a public CLIP.
    """
    if Path(path).is_dir():
        return PublicClipScorer(path, device)
    model, config = load_noised_clip(path)
    merges = load_metadata(path).get("merges")
    if config.clip.tokenizer == "clip" and not merges:
        raise WeightsError(
            f"{path} lacks the vocabulary of its captions; import it again with --vocabulary."
        )
    return NoisedClipScorer(model, config, device, merges)


def fetch_clip(path: str | Path) -> Path:
    """Local path of a CLIP: a local path unchanged, or copies in the cache of s3:// objects.

    Raises WeightsError, StorageError.
    """
    if not storage.is_remote(path) and not Path(path).exists():
        raise WeightsError(
            f"There is no weights file {path}; train one with `glide train nano-plain-clip`, or "
            f"give another CLIP with --clip."
        )
    if not storage.is_remote(path) or str(path).endswith(".safetensors"):
        return storage.fetch(path) if storage.is_remote(path) else Path(path)
    return storage.fetch_folder(path, CLIP_FILES)
