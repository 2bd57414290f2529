"""Data configs: training corpora, cleaning and content filters."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field, StringConstraints, field_validator, model_validator

from ..errors import nearest
from .models import Frozen

# Scripts common in web captions, as the first word of the Unicode names of their letters.
SCRIPTS = (
    "arabic",
    "armenian",
    "bengali",
    "cjk",
    "cyrillic",
    "devanagari",
    "ethiopic",
    "georgian",
    "greek",
    "gujarati",
    "gurmukhi",
    "hangul",
    "hebrew",
    "hiragana",
    "kannada",
    "katakana",
    "khmer",
    "lao",
    "latin",
    "malayalam",
    "myanmar",
    "sinhala",
    "tamil",
    "telugu",
    "thai",
    "tibetan",
)


def _not_empty(path: str) -> str:
    if not path.strip():
        raise ValueError("the path is empty; give a folder, a file or s3://...")
    return path


CorpusPath = Annotated[str, AfterValidator(_not_empty)]

BASELINES = ("basic", "clip_score", "image_based", "intersection")  # see data/baselines.py


class DataConfig(Frozen):
    """Data of a training run."""

    corpus: CorpusPath = Field(
        "runs/corpus/train",
        description="folder or s3:// prefix of tar shards or "
        "Parquet files; several as runs/corpus/{train,scenes} or a::b, a mixture as a:0.7,b:0.3",
    )
    caption_column: str | None = Field(
        None, description="field or column of captions, for tables and JSON with another name"
    )
    held_out: CorpusPath = Field(
        "runs/corpus/held_out", description="corpus of the held-out images"
    )
    held_out_images: int = Field(
        1024, gt=0, description="held-out images of an evaluation, over all workers, at most"
    )
    min_size: int = Field(
        64, gt=0, description="pixels; images with a shorter side are dropped and counted"
    )
    crop: int | None = Field(
        None,
        gt=0,
        description="pixels a side of an upsampler's random training crops; none: whole images",
    )
    empty_caption_rate: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of captions emptied; 0.2 "
        "to fine-tune for classifier-free guidance (sec. 4.2)",
    )
    generate_rate: float = Field(
        0.0,
        ge=0,
        le=1,
        description="inpainting models: share of images "
        "without known pixels; the others are erased at random",
    )
    flip_rate: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of images that training mirrors, left to right; captions stay",
    )
    low_res_blur_rate: float = Field(
        0.0,
        ge=0,
        le=1,
        description="upsamplers: share of low-res images that are blurred; 0.5 in Ho et al. (2021)",
    )
    low_res_noise: float = Field(
        0.0,
        ge=0,
        description="upsamplers: largest standard deviation, in 8-bit levels, of the noise added "
        "to low-res images, drawn uniformly from 0; a base model's pictures are not flat where "
        "real ones are",
    )
    shuffle_buffer: int = Field(
        2048,
        ge=0,
        description="rows in the shuffle buffer of each reading task, 256 MiB of pictures at most",
    )
    shares: dict[str, Annotated[float, Field(gt=0, le=1)]] = Field(
        {},
        description="share of rows that an epoch reads, by folder name or by the group in "
        "a row's json",
    )
    cache_gib: float = Field(
        0.0,
        ge=0,
        description="GiB of a worker's memory for decoded pictures, kept for later epochs",
    )


class CleanConfig(Frozen):
    """Rules of `glide clean`. The limits are ours: the paper gives none for its corpus."""

    min_size: int = Field(64, gt=0, description="shortest side of an image, in pixels")
    max_aspect: float | None = Field(
        3.0, ge=1, description="largest ratio of the longer side to the shorter"
    )
    min_characters: int = Field(3, ge=0, description="shortest caption, in characters")
    max_characters: int = Field(1000, gt=0, description="longest caption, in characters")
    scripts: tuple[Annotated[str, StringConstraints(to_lower=True)], ...] = Field(
        ("latin",), description="scripts of the letters in captions, by Unicode name; none: any"
    )
    duplicates: bool = Field(True, description="drop near-duplicate images")
    semantic: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="cosine similarity of features above which an image of the same cluster is a "
        "semantic duplicate, such as 0.95 (SemDeDup); none: keep them",
    )
    baseline: str | None = Field(
        None, description=f"filter of DataComp: {', '.join(BASELINES)}; none: no such filter"
    )
    clip: str | None = Field(
        None,
        description="CLIP of the features and scores: a weights file of glide_ray, or the folder "
        "of a public CLIP; none: features of EfficientNet-Lite0",
    )
    clip_share: float = Field(
        0.3,
        gt=0,
        le=1,
        description="share of the rows, those with the highest CLIP scores, that clip_score and "
        "intersection keep",
    )
    reference: str | None = Field(
        None,
        description="folder or corpus of reference images, for image_based and intersection; "
        "DataComp takes ImageNet's training images",
    )
    per_shard: int = Field(10_000, gt=0, description="rows of an output shard")
    caption_column: str | None = Field(
        None, description="field or column of captions, for tables and JSON with another name"
    )

    @field_validator("baseline")
    @classmethod
    def _baseline_exists(cls, name: str | None) -> str | None:
        if name is not None and name not in BASELINES:
            raise ValueError(f"there is no filter {name!r}; {nearest(name, BASELINES)}")
        return name

    @model_validator(mode="after")
    def _scripts_exist(self) -> CleanConfig:
        unknown = next((script for script in self.scripts if script not in SCRIPTS), None)
        if unknown is not None:
            raise ValueError(
                f"no letters are named {unknown!r} by Unicode; it has {', '.join(SCRIPTS)}"
            )
        return self


class FilterConfig(Frozen):
    """Labelling and bias of `glide filter fit` (app. F.1)."""

    labels: int = Field(300, gt=0, description="labelled images, at most")
    first: int = Field(
        100,
        gt=0,
        description="labels before the first fit: half from the search words, half at random",
    )
    each_round: int = Field(50, gt=0, description="labels of each later round, near the boundary")
    pool: int = Field(
        20_000, gt=0, description="candidate images, drawn at random from a larger corpus"
    )
    max_missed: float = Field(
        0.01, gt=0, lt=1, description="largest share of the content that may pass the filter"
    )
    confidence: float = Field(0.95, gt=0.5, lt=1, description="confidence level of max_missed")
    group: str = Field(
        "emoji",
        description="json field that rows of the same thing share; a group "
        "is never split between fitting and validation",
    )
    caption_column: str | None = Field(
        None, description="field or column of captions, for tables and JSON with another name"
    )
    seed: int = Field(0, description="seed of the draws")
