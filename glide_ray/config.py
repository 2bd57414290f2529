"""Every number that fixes a run, as frozen pydantic models. Unknown keys are refused by name.

One class per thing: `TextConfig`, `UNetConfig`, `DiffusionConfig`, `SamplingConfig` make a `ModelConfig` (what a weights
file carries with it), as `ClipConfig` makes a `ClipModelConfig`; with `DataConfig` and `TrainConfig` either makes a `Preset`
(what `glide train` runs).
"""

from __future__ import annotations

import difflib
import math
import operator
from collections.abc import Iterable
from itertools import accumulate
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, StringConstraints, Tag, model_validator


COSINE_BETA_MAX = 0.999   # Nichol & Dhariwal (2021), sec. 3.2
SHIPPED = "emoji"          # the name of the weights that ship with the package (`pretrained/`)


class UserError(ValueError):
    """Something that the user can mend. The message is one sentence for them: it names the thing and the remedy."""


class ConfigError(UserError):
    """A setting that cannot be used."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint for a misspelled name: the nearest known one, or all of them where none is near."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else "choose one of: " + ", ".join(known) + "."


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TextConfig(Frozen):
    """The text transformer (sec. 4.1): K = `context` tokens of `width` channels through `layers` residual blocks."""

    width: int = Field(gt=0)
    layers: int = Field(gt=0)
    heads: int = Field(gt=0)
    context: int = Field(128, gt=0)
    vocabulary: int = Field(50257, gt=0)

    @model_validator(mode="after")
    def _heads_divide_width(self) -> TextConfig:
        if self.width % self.heads:
            raise ValueError(f"text.width {self.width} is not divisible by text.heads {self.heads}")
        return self


class UNetConfig(Frozen):
    """The ADM UNet with text (Dhariwal & Nichol 2021; GLIDE sec. 4.1).

    `low_res_size` makes it an upsampler (3 more input channels), `inpaint` an inpainting model (4 more: sec. 4.3).
    `patch` folds squares of so many pixels a side into channels at both ends of the network, as Hoogeboom et al.
    (2023, simple diffusion) do: `attention_sizes` are those of the feature maps behind it.
    """

    image_size: int = Field(gt=0)
    channels: int = Field(gt=0)
    multipliers: tuple[int, ...] = Field(min_length=1)
    blocks: int = Field(gt=0)
    text: TextConfig
    attention_sizes: tuple[int, ...] = (32, 16, 8)
    head_channels: int = Field(64, gt=0)
    groups: int = Field(32, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    low_res_size: int | None = Field(None, gt=0)
    inpaint: bool = False
    patch: int = Field(1, gt=0)                        # pixels a side
    prediction: Literal["eps", "v", "x0"] = "eps"      # of the last layer, given out as eps; an upsampler's "x0" adds to its low-res image

    @property
    def in_channels(self) -> int:
        """Channels of an image and what is laid beside it, before squares are folded."""
        return 3 + (3 if self.low_res_size else 0) + (4 if self.inpaint else 0)

    @property
    def grain(self) -> int:
        """Pixels that an image's side must be a multiple of."""
        return self.patch * 2 ** (len(self.multipliers) - 1)

    @model_validator(mode="after")
    def _shapes_fit(self) -> UNetConfig:
        halvings = len(self.multipliers) - 1
        if self.image_size % self.grain:
            folded = f" into squares of {self.patch} pixels and" if self.patch > 1 else ""
            raise ValueError(f"image_size {self.image_size} cannot be divided{folded} halved {halvings} times" if folded
                             else f"image_size {self.image_size} cannot be halved {halvings} times")
        if self.channels % self.groups:
            raise ValueError(f"channels {self.channels} are not divisible by groups {self.groups}")
        for level, multiplier in enumerate(self.multipliers):
            width = self.channels * multiplier
            size = self.image_size // self.patch >> level
            if size in self.attention_sizes and width % self.head_channels:
                raise ValueError(f"{width} channels at {size} pixels are not divisible by "
                                 f"head_channels {self.head_channels}")
        if self.channels * self.multipliers[-1] % self.head_channels:
            raise ValueError(f"the middle block's {self.channels * self.multipliers[-1]} channels are not divisible by "
                             f"head_channels {self.head_channels}")
        return self


class ClipConfig(Frozen):
    """Noised CLIP (sec. 4.4): both towers, and the width of the space that they share."""

    image_size: int = Field(64, gt=0)
    patch_size: int = Field(4, gt=0)
    image_width: int = Field(gt=0)
    image_layers: int = Field(gt=0)
    image_heads: int = Field(gt=0)
    text_width: int = Field(gt=0)
    text_layers: int = Field(gt=0)
    text_heads: int = Field(gt=0)
    context: int = Field(77, gt=0)
    vocabulary: int = Field(50257, gt=0)
    embedding: int = Field(512, gt=0)
    timesteps: int = Field(1000, gt=0)
    noised: bool = True                                # False: trained on images without noise, at timestep 0, as public CLIPs are
    scale: float = Field(1 / 0.07, gt=0)               # of the logits, to begin with (Radford et al. 2021, sec. 2.5)
    tokenizer: Literal["gpt2", "clip"] = "gpt2"        # "clip" is the released model's, whose vocabulary its weights file carries

    @model_validator(mode="after")
    def _shapes_fit(self) -> ClipConfig:
        for tower in ("image", "text"):
            width, heads = getattr(self, f"{tower}_width"), getattr(self, f"{tower}_heads")
            if width % heads:
                raise ValueError(f"{tower}_width {width} is not divisible by {tower}_heads {heads}")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not divisible by patch_size {self.patch_size}")
        return self


class DiffusionConfig(Frozen):
    """The noise process: `cosine` for the base model, `linear` for the upsampler, in `steps` timesteps."""

    schedule: Literal["cosine", "linear"] = "cosine"
    steps: int = Field(1000, gt=1)

    def alpha_bar(self) -> list[float]:
        """Signal power at each timestep, the least noisy first: `cosine` by Nichol & Dhariwal (2021, eq. 17), `linear`
        by Ho et al. (2020), rescaled to any number of steps."""
        if self.schedule == "cosine":
            def power(t: float) -> float:           # t in [0, 1]
                return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
            kept = [max(power((n + 1) / self.steps) / power(n / self.steps), 1 - COSINE_BETA_MAX) for n in range(self.steps)]
        else:
            first, last = 1000 / self.steps * 1e-4, 1000 / self.steps * 0.02
            kept = [1 - (first + (last - first) * n / (self.steps - 1)) for n in range(self.steps)]
        return list(accumulate(kept, operator.mul))


class SamplingConfig(Frozen):
    """How a model is sampled when a request does not say otherwise (app. B.2)."""

    sampler: Literal["ancestral", "ddim", "plms", "dpm++"] = "ancestral"
    respacing: str = "150"
    guidance_scale: float = Field(3.0, ge=0)
    noise_scale: float = Field(1.0, gt=0)   # of the initial noise; 0.997 for the released upsampler


class SampleOptions(Frozen):
    """What a request says of how it is sampled; None takes the model's own `SamplingConfig`."""

    sampler: str | None = None                         # of the base model; the upsampler keeps its own
    steps: int | str | None = None                     # of the base model: a number, or a respacing such as "10,10,3,2,2"
    upsampler_steps: int | str | None = None
    guidance_scale: float | None = None                # of classifier-free guidance
    clip_scale: float = 0.0                            # of CLIP guidance; 0 is none
    guidance_interval: tuple[float, float] = (0.0, 1.0)    # of the timesteps, 1 the noisiest: no guidance of either kind outside of it


class BulkConfig(Frozen):
    """What pictures in bulk are made with. Weights are paths that all nodes see, `s3://`, or the name of the shipped ones."""

    base: str = SHIPPED
    upsampler: str | None = None
    clip: str | None = None                            # for CLIP guidance
    device: Literal["auto", "cpu", "gpu"] = "auto"     # of a worker; auto: a GPU, if the cluster has one now. gpu: also if they are yet to come
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    options: SampleOptions = SampleOptions()
    seed: int = 0                                      # of the first picture; it counts up over all of them
    per_prompt: int = Field(1, gt=0)


class ModelConfig(Frozen):
    """All that is needed to rebuild and sample a model; stored inside its weights file."""

    name: str
    unet: UNetConfig
    diffusion: DiffusionConfig = DiffusionConfig()
    sampling: SamplingConfig = SamplingConfig()

    @property
    def role(self) -> str:
        """What a weights file can be used as: "base", "upsampler", or (of a `ClipModelConfig`) "clip"."""
        return "upsampler" if self.unet.low_res_size else "base"

    @property
    def image_size(self) -> int:
        return self.unet.image_size

    @property
    def low_res_size(self) -> int | None:
        return self.unet.low_res_size

    @property
    def inpaint(self) -> bool:
        return self.unet.inpaint

    @property
    def context(self) -> int:
        return self.unet.text.context


class ClipModelConfig(Frozen):
    """All that is needed to rebuild noised CLIP. `diffusion` must be the base model's (sec. 4.4)."""

    name: str
    clip: ClipConfig
    diffusion: DiffusionConfig = DiffusionConfig()

    role: ClassVar[str] = "clip"
    low_res_size: ClassVar[None] = None
    inpaint: ClassVar[bool] = False

    @property
    def image_size(self) -> int:
        return self.clip.image_size

    @property
    def context(self) -> int:
        return self.clip.context


def _tag(given: Any) -> str:
    return "CLIP" if isinstance(given, ClipModelConfig) or (isinstance(given, dict) and "clip" in given) else "UNET"


TAGS = ("UNET", "CLIP")      # pydantic puts them into the places of its findings; `validate` leaves them out again
AnyModelConfig = Annotated[Annotated[ModelConfig, Tag("UNET")] | Annotated[ClipModelConfig, Tag("CLIP")], Discriminator(_tag)]


# What a run's grids of samples show, for the emoji corpus.
SAMPLE_PROMPTS = ("a red apple, 3D render", "a green heart, 3D render", "a grinning face, 3D render", "a blue circle, flat icon",
                  "a dog face, 3D render", "an orange, 3D render", "a tree, 3D render", "a purple heart, flat icon")


class DataConfig(Frozen):
    """What a run reads. `corpus` is a folder or `s3://` prefix of tar shards or Parquet files, or several: `corpus/{train,scenes}`."""

    corpus: str = "runs/corpus/train"
    held_out: str = "runs/corpus/held_out"
    held_out_images: int = Field(1024, gt=0)           # at most so many are read at each evaluation, over all workers
    min_size: int = Field(64, gt=0)                    # images smaller than this on a side are dropped, and counted
    crop: int | None = Field(None, gt=0)               # upsamplers: train on random squares of this many pixels, not the whole
    empty_caption_rate: float = Field(0.0, ge=0, le=1)  # 0.2 when fine-tuning for classifier-free guidance (sec. 4.2)
    generate_rate: float = Field(0.0, ge=0, le=1)      # inpainting models: images of which nothing is known, beside random erasures
    low_res_blur_rate: float = Field(0.0, ge=0, le=1)  # upsamplers: blur the low-res half of so many pairs; 0.5 in Ho et al. 2021
    shuffle_buffer: int = Field(2048, ge=0)            # rows among which each reading task shuffles
    shares: dict[str, Annotated[float, Field(gt=0, le=1)]] = {}    # of rows that an epoch reads, by their folder's name or their json's group
    cache_gib: float = Field(0.0, ge=0)                # of a worker's memory in which decoded pictures are kept for later epochs


# The first words of Unicode's names of letters, for the scripts that captions on the web are written in.
SCRIPTS = ("arabic", "armenian", "bengali", "cjk", "cyrillic", "devanagari", "ethiopic", "georgian", "greek", "gujarati", "gurmukhi", "hangul",
           "hebrew", "hiragana", "kannada", "katakana", "khmer", "lao", "latin", "malayalam", "myanmar", "sinhala", "tamil", "telugu", "thai",
           "tibetan")


class CleanConfig(Frozen):
    """What `glide clean` keeps. The limits are ours: the paper gives none for its corpus."""

    min_size: int = Field(64, gt=0)                    # pixels on the shorter side
    max_aspect: float | None = Field(3.0, ge=1)        # longer side to shorter
    min_characters: int = Field(3, ge=0)               # of a caption
    max_characters: int = Field(1000, gt=0)
    scripts: tuple[Annotated[str, StringConstraints(to_lower=True)], ...] = ("latin",)    # of a caption's letters, as Unicode names them; none: any
    duplicates: bool = True                            # whether near-duplicates are dropped
    per_shard: int = Field(10_000, gt=0)               # rows in a shard that is written

    @model_validator(mode="after")
    def _scripts_exist(self) -> CleanConfig:
        unknown = next((script for script in self.scripts if script not in SCRIPTS), None)
        if unknown is not None:
            raise ValueError(f"no letters are named {unknown!r} by Unicode; it has {', '.join(SCRIPTS)}")
        return self


class FilterConfig(Frozen):
    """How `glide filter fit` asks for labels, and where it sets the bias (app. F.1)."""

    labels: int = Field(300, gt=0)                     # at most so many are asked for
    first: int = Field(100, gt=0)                      # of them before there is an SVM: half by the words to search for, half at random
    each_round: int = Field(50, gt=0)                  # of them in each later round, near the boundary
    pool: int = Field(20_000, gt=0)                    # rows that are looked at; of a larger corpus, so many from parts drawn at random
    max_missed: float = Field(0.01, gt=0, lt=1)        # the share of the content that may pass, at the most
    confidence: float = Field(0.95, gt=0.5, lt=1)      # of the labels' word for that
    group: str = "emoji"                               # the field of a row's .json that rows of one thing share, so that none vouches for another
    seed: int = 0


class TrainConfig(Frozen):
    """One training run. `batch` is global: the images of all workers' micro-batches in one optimizer step."""

    objective: Literal["base", "upsampler", "clip"]
    steps: int = Field(gt=0)
    batch: int = Field(gt=0)
    start_from: str | None = None                      # weights to fine-tune, or `emoji`; an inpainting model may start from one that is not
    learning_rate: float = Field(gt=0)
    weight_decay: float = Field(0.0, ge=0)
    warmup_steps: int = Field(0, ge=0)
    constant_steps: int | None = Field(None, gt=0)     # after them the learning rate falls as 1 / sqrt(step) (EDM2); None: never
    min_snr: float | None = Field(None, gt=0)          # x_0's error weighs min(SNR, this), SNR + 1 for v (Hang et al. 2023: 5); None: eps' even
    timestep_power: float = Field(0.0, ge=0)           # timesteps are drawn with a density proportional to t to this power; 0: evenly (the paper)
    text_rate: float = Field(1.0, ge=0)                # factor on the learning rate of the text transformer; 0 freezes it
    clip_norm: float = Field(0.0, ge=0)                # 0 leaves gradients alone
    ema_rates: tuple[Annotated[float, Field(ge=0, lt=1)], ...] = Field((0.9999,), min_length=1)    # the first becomes the weights file
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    seed: int = 0

    # How it is spread over machines: none of this moves the loss, but for a CLIP's (see `contrastive`).
    workers: int = Field(1, gt=0)
    device: Literal["auto", "cpu", "gpu"] = "auto"     # of a worker; auto: a GPU, if the cluster has one now. gpu: also if they are yet to come
    min_workers: int | None = Field(None, gt=0)        # elastic: with how few it goes on where nodes are lost; None: all of them
    micro_batch: int | None = Field(None, gt=0)        # images in a worker's network call; None: as many as fit its memory
    zero_stage: int = Field(2, ge=0, le=3)
    offload_optimizer: bool = False                    # masters, moments and averages in the host's memory
    activation_checkpointing: bool = False

    # What is said and kept on the way.
    log_every: int = Field(10, gt=0)
    evaluate_every: int = Field(100, gt=0)
    checkpoint_every: int = Field(100, gt=0)
    keep_last: int = Field(2, gt=0)                    # checkpoints
    keep_every: int | None = Field(None, gt=0)         # steps: a checkpoint at each multiple of so many is kept for good
    trackers: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = ("tensorboard",)
    sample_every: int | None = Field(None, gt=0)       # steps between grids of samples, made beside the run from a checkpoint's average
    sample_prompts: tuple[str, ...] = Field(SAMPLE_PROMPTS, min_length=1)

    # What goes wrong.
    max_failures: int = Field(20, ge=-1)               # of workers and nodes, before the run gives up; -1: never
    stall_seconds: float = Field(900, gt=0)            # without a step, until a worker is taken to hang and begun again
    wait_seconds: float = Field(600, ge=0)             # for a cluster to have the workers that are asked for

    @model_validator(mode="after")
    def _parts_fit(self) -> TrainConfig:
        if self.batch % self.workers:
            near = max(self.workers, round(self.batch / self.workers) * self.workers)
            raise ValueError(f"train.batch {self.batch} is not divisible by train.workers {self.workers}; {near} is")
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"train.min_workers {self.min_workers} is more than train.workers {self.workers}")
        if self.min_workers not in (None, self.workers) and self.objective == "clip":
            raise ValueError("train.min_workers: CLIP's loss is over the embeddings of equally many images on each worker; leave it out")
        for name in ("keep_every", "sample_every"):
            every = getattr(self, name)
            if every is not None and every % self.checkpoint_every:
                raise ValueError(f"train.{name} {every} is not a multiple of train.checkpoint_every {self.checkpoint_every}")
        return self


class Preset(Frozen):
    """A complete run by name."""

    model: AnyModelConfig
    data: DataConfig
    train: TrainConfig

    @model_validator(mode="after")
    def _parts_fit(self) -> Preset:
        model, crop = self.model, self.data.crop
        if self.train.objective != model.role:
            raise ValueError(f"train.objective {self.train.objective!r} does not fit a model of the kind {model.role!r}"
                             + (f" (model.unet.low_res_size is {model.low_res_size})" if model.role != "clip" else ""))
        if crop is not None:
            if model.role != "upsampler":
                raise ValueError(f"data.crop {crop} is for upsamplers only")
            grain = model.unet.grain
            if crop > model.image_size or crop % grain or crop % (model.image_size // model.low_res_size):
                raise ValueError(f"data.crop {crop} must be a multiple of {grain}, at most image_size, and of an upsampler")
        return self
