"""`glide evaluate`: metrics of generated against real pictures, and guidance sweeps (sec. 5.1).

Writes the figures as JSON, plots and a report page.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ... import storage
from ...config.sampling import BulkConfig
from ...data.images import ImageError, decode, encode
from ...data.sources import read_corpus
from ...errors import UserError
from ...evaluation.features import ClipFeatures, fetch_network
from ...evaluation.image_features import ImageFeatures, Reference
from ...evaluation.metrics import MetricError
from ...evaluation.pages import Picture, Section, page
from ...evaluation.report import Point, fronts, number
from ...records import cached_result
from ...sampling.prompt import literal
from ...storage import fingerprint
from ..cluster import connect
from ..embed import ACTORS, JOB, EmbeddedCorpus, embed_corpus
from ..generate import generate
from ..rows import PAGE

log = logging.getLogger(__name__)

FIGURES, REFERENCE, FRONTS, PROMPTS = (
    "figures.json",
    "reference.safetensors",
    "fronts.png",
    "prompts.jsonl",
)
PROMPTS_SHOWN, CAPTIONS_PER_CALL = 12, 256  # prompts on the page; captions per CLIP call
UNGUIDED = "unguided"
CLIP, INCEPTION = "clip", "inception"


@dataclass(frozen=True)
class Judges:
    """Feature networks: a CLIP, and Inception if its TorchScript file is given.

    Paths that all nodes can read, or s3://.
    """

    clip: str
    inception: str | None = None

    @property
    def paths(self) -> dict[str, str]:
        return {
            CLIP: storage.absolute(self.clip),
            **({INCEPTION: storage.absolute(self.inception)} if self.inception else {}),
        }


def evaluate(
    sets: Mapping[str, str],
    reference: str,
    out: str,
    judges: Judges,
    leave_out: Sequence[str] | None = None,
    size: int | None = None,
) -> dict[str, Any]:
    """Measure sets of pictures against a reference and write figures, plots and a page to `out`.

    `sets`: name -> folder of bulk generation, or any corpus. `reference`: a corpus, or the
    REFERENCE file of an earlier evaluation. `leave_out`: names of reference images; the Frechet
    distance is measured a second time without them (sec. 5.2, validation filtered). `size`: pixels
    to which larger images of both sides are reduced, by default the size of the first picture. All
    paths are local or s3://. Features and figures are kept in `out`: rerunning after a failure
    resumes and gives identical figures. Raises UserError.
    """
    out = storage.absolute(out).rstrip("/")
    # Report a missing network before Ray starts.
    judged = {name: fingerprint(fetch_network(path)) for name, path in judges.paths.items()}
    clip, size = ClipFeatures(judges.clip), size or _size(next(iter(sets.values())))
    connect(2 + ACTORS)
    key = {"judges": judged, "size": size}
    real, about_real, shown = _reference(reference, out, judges, key, clip)
    filtered = real.without(set(leave_out)) if leave_out is not None else None
    figures, embedded_sets = {}, {}
    for name, source in sets.items():
        embedded = _embed(name, source, size, out, judges)
        embedded_sets[name] = embedded[CLIP]
        asked = {
            "reference": about_real,
            "left_out": None if leave_out is None else sorted(leave_out),
            "set": [corpus.digest for corpus in embedded.values()],
        }
        measure = partial(_measure, name, embedded, clip, real, filtered)
        row, _ = cached_result(f"{out}/sets/{name}.json", asked, measure)
        figures[name] = _settings_of(source) | row
    about = {"source": reference, "images": len(real.names), "clip_score": real.images.clip_score}
    if filtered:
        about["filtered_images"] = len(filtered.names)
    found = {
        "reference": about,
        "size": size,
        "inception": judges.inception is not None,
        "sets": figures,
    }
    _write(out, found, embedded_sets, shown)
    return found


def generate_sets(
    config: BulkConfig,
    scales: Sequence[float],
    clip_scales: Sequence[float],
    captions: Sequence[str],
    images: int,
    out: str,
) -> dict[str, str]:
    """Generate a set of pictures for each classifier-free and CLIP guidance scale.

    Returns name -> folder. Every set has `images` pictures with the same captions and seeds; the
    captions are drawn at random, each equally often. Without scales, one set "made" with the
    config's own options. Existing pictures are not made again. Raises UserError.
    """
    out = storage.absolute(out).rstrip("/")
    order = np.random.default_rng(config.seed).permutation(len(captions))
    lines = [
        json.dumps(
            {"prompt": literal(captions[order[n % len(order)]]), "seed": config.seed + n},
            ensure_ascii=False,
        )
        for n in range(images)
    ]
    storage.put("".join(f"{line}\n" for line in lines).encode(), f"{out}/{PROMPTS}")
    options_of_config = config.options
    sets = {
        UNGUIDED if scale == 1 else f"guidance-{scale:g}": options_of_config.model_copy(
            update={"guidance_scale": scale, "clip_scale": 0.0}
        )
        for scale in scales
    }
    sets |= {
        UNGUIDED if scale == 0 else f"clip-{scale:g}": options_of_config.model_copy(
            update={"guidance_scale": 1.0, "clip_scale": scale}
        )
        for scale in clip_scales
    }
    for name, options in (sets := sets or {"made": options_of_config}).items():
        log.info(f"{name}: {images:,} pictures")
        needed = config.model_copy(
            update={"options": options, "clip": config.clip if options.clip_scale else None}
        )
        generate(f"{out}/{PROMPTS}", f"{out}/pictures/{name}", needed)
    return {name: f"{out}/pictures/{name}" for name in sets}


def captions_of(reference: str) -> list[str]:
    """First caption of each image of a corpus or of a REFERENCE file. Raises UserError."""
    if reference.endswith(".safetensors"):
        captions = Reference.load(storage.absolute(reference))[0].captions
    else:
        captions = [
            sample.captions[0]
            for sample in read_corpus(storage.absolute(reference))
            if sample.captions
        ]
    if not any(captions):
        raise UserError(
            f"No image of {reference} has a caption; give a corpus with captions, or existing "
            "pictures."
        )
    return [caption for caption in captions if caption]


# -- features of both sides ------------------------------------------------------------------------


def _reference(
    path: str, out: str, judges: Judges, asked: dict[str, Any], clip: ClipFeatures
) -> tuple[Reference, str, EmbeddedCorpus | None]:
    """(reference features, key that identifies them, the images, or None for a REFERENCE file)."""
    if path.endswith(".safetensors"):
        real, about = Reference.load(storage.absolute(path))
        if differs := [name for name in asked if about.get(name) != asked[name]]:
            raise MetricError(
                f"{path} was measured with other {' and '.join(differs)} "
                f"({', '.join(str(about.get(name)) for name in differs)}); give the same, "
                f"or a corpus as the reference."
            )
        return real, fingerprint(storage.fetch(storage.absolute(path))), None
    embedded = _embed("reference", path, asked["size"], out, judges)
    about = {**asked, "of": [corpus.digest for corpus in embedded.values()]}
    try:
        real, before = Reference.load(f"{out}/{REFERENCE}")
    except (storage.StorageError, MetricError):
        before = None
    if before != about:
        real = Reference(
            embedded[CLIP].names, embedded[CLIP].captions, _image_features(embedded, clip)
        )
        real.save(f"{out}/{REFERENCE}", about)
    return real, json.dumps(about), embedded[CLIP]


def _embed(
    name: str, source: str, size: int, out: str, judges: Judges
) -> dict[str, EmbeddedCorpus]:
    """Embed one side with each network.

    Raises UserError if the networks did not read the same pictures.
    """
    embedded = {
        network: embed_corpus(source, path, size, f"{out}/features/{name}-{network}.parquet")
        for network, path in judges.paths.items()
    }
    if len({tuple(corpus.names) for corpus in embedded.values()}) > 1:
        counts = " and ".join(
            f"{len(corpus.names):,} by {network}" for network, corpus in embedded.items()
        )
        raise UserError(
            f"Not the same pictures of {source} could be read for each network ({counts}); "
            f"run the same command again."
        )
    return embedded


def _image_features(embedded: Mapping[str, EmbeddedCorpus], clip: ClipFeatures) -> ImageFeatures:
    captions, places = np.unique(embedded[CLIP].captions, return_inverse=True)
    words = np.concatenate(
        [
            clip.words(captions[start : start + CAPTIONS_PER_CALL].tolist())
            for start in range(0, len(captions), CAPTIONS_PER_CALL)
        ]
    )
    words[captions == ""] = np.nan
    return ImageFeatures(
        embedded[CLIP].features,
        words[places],
        embedded[INCEPTION].features if INCEPTION in embedded else None,
    )


def _measure(
    name: str,
    embedded: Mapping[str, EmbeddedCorpus],
    clip: ClipFeatures,
    real: Reference,
    filtered: Reference | None,
) -> dict[str, float | None]:
    log.info(f"measuring {name}: {len(embedded[CLIP].names):,} pictures")
    features = _image_features(embedded, clip)
    if missing := int((~features.captioned).sum()):
        log.info(
            f"{name}: {missing:,} of {len(features.clip):,} pictures have no caption, "
            f"and are left out of the CLIP score"
        )
    figures = {"pictures": len(features.clip), **real.figures(features)}
    return (
        figures
        if filtered is None
        else {**figures, "filtered_frechet_distance": filtered.frechet_distance(features)}
    )


def _size(source: str) -> int:
    for sample in read_corpus(storage.absolute(source)):
        try:
            return min(decode(sample.image).size)
        except ImageError:
            continue
    raise UserError(f"No picture in {source} can be read.")


def _settings_of(source: str) -> dict[str, Any]:
    """Hash of the base model and guidance scales, from JOB; {} if bulk generation left none."""
    try:
        job = json.loads(storage.read(f"{storage.absolute(source)}/{JOB}"))
        options = job["options"]
        return {
            "model": job["models"]["base"][:12],
            **{
                name: options[name]
                for name in ("guidance_scale", "clip_scale")
                if options.get(name) is not None
            },
        }
    except (storage.StorageError, ValueError, KeyError):
        return {}


# -- output ----------------------------------------------------------------------------------------


def _write(
    out: str,
    found: dict[str, Any],
    sets: Mapping[str, EmbeddedCorpus],
    reference: EmbeddedCorpus | None,
) -> None:
    plot = fronts([Point(name, row) for name, row in found["sets"].items()], found["inception"])
    storage.put(encode(plot), f"{out}/{FRONTS}")
    storage.put(_page(found, plot, sets, reference).encode(), f"{out}/{PAGE}")
    storage.put(json.dumps(found, indent=1, ensure_ascii=False).encode(), f"{out}/{FIGURES}")


def _page(
    found: dict[str, Any],
    plot: np.ndarray,
    sets: Mapping[str, EmbeddedCorpus],
    reference: EmbeddedCorpus | None,
) -> str:
    draws = np.random.default_rng(0)
    sections = [
        Section("Figures", _about(found), table=_table(found["sets"])),
        Section("Fronts", "As in figure 6 of the paper.", groups=[[Picture(plot)]], width=1040),
        *_picture_sections(sets, draws),
    ]
    if reference:
        sections.append(_at_random("The reference", reference, draws))
    return page("Generated pictures beside real ones", sections)


def _table(sets: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    columns = [
        name
        for name in dict.fromkeys(key for row in sets.values() for key in row)
        if name != "model" and not name.endswith("_deviation")
    ]
    return [
        ["", *(name.replace("_", " ") for name in columns)],
        *([name, *(number(row.get(column)) for column in columns)] for name, row in sets.items()),
    ]


def _about(found: dict[str, Any]) -> str:
    """Text of the page: the reference of the comparison, and the features."""
    real = found["reference"]
    return (
        f"Compared with {real['images']:,} images of {real['source']}, at {found['size']} pixels; "
        f"{_own_captions(real['clip_score'])}. "
        + (
            "Distances are FID and the score is IS."
            if found["inception"]
            else "No Inception network was given: distances and scores use the CLIP's "
            "features. They are not FID and IS, and compare only with each other."
        )
        + (
            f" Filtered: without the {real['images'] - real['filtered_images']:,} images of "
            "--leave-out."
            if "filtered_images" in real
            else ""
        )
    )


def _picture_sections(
    sets: Mapping[str, EmbeddedCorpus], draws: np.random.Generator
) -> list[Section]:
    """Pictures by caption where all sets have the same captions, else at random from each set."""
    first = next(iter(sets.values()))
    if len(sets) == 1 or any(embedded.captions != first.captions for embedded in sets.values()):
        return [_at_random(name, embedded, draws) for name, embedded in sets.items()]
    chosen = sorted(draws.permutation(len(first.captions))[:PROMPTS_SHOWN].tolist())
    shown = [embedded.pictures(chosen, [name] * len(chosen)) for name, embedded in sets.items()]
    return [
        Section(f"“{first.captions[row]}”", groups=[[pictures[n][0] for pictures in shown]])
        for n, row in enumerate(chosen)
    ]


def _own_captions(score: float | None) -> str:
    return "they have no captions" if score is None else f"their own captions score {score:.2f}"


def _at_random(name: str, embedded: EmbeddedCorpus, draws: np.random.Generator) -> Section:
    return Section(
        f"{name}, at random",
        groups=embedded.pictures(
            draws.permutation(len(embedded.names))[: 2 * PROMPTS_SHOWN].tolist()
        ),
    )
