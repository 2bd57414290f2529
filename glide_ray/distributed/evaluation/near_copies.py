"""Nearest training images, by cosine distance of CLIP features.

`filter_reference` lists near-copies in a reference (sec. 5.2, validation filtered);
`regurgitation` tests whether a model repeats its training images (sec. 6).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import numpy as np
from PIL import Image

from ... import storage
from ...config.sampling import BulkConfig
from ...data.images import ImageError, centre_crop, decode, encode
from ...errors import UserError
from ...evaluation.neighbours import Nearest, nearest, nearest_with_caption, same_picture
from ...evaluation.pages import Picture, Section, page, thumbnail
from ...evaluation.report import contact_sheet, on_square
from ...models.clip_scorer import fetch_clip
from ..cluster import connect
from ..embed import ACTORS, EmbeddedCorpus, embed_corpus
from ..rows import PAGE, read_rows
from .evaluate import generate_sets

LEFT_OUT, FIGURES, SHEET = "left-out.json", "figures.json", "closest.png"
SIZE = 256  # pixels to which larger images are reduced before CLIP
PAIRS_SHOWN = 24  # pairs on a page
EDGES = (0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 2)  # histogram, cosine distance


def filter_reference(
    reference: str,
    training: str,
    out: str,
    clip: str,
    distance: float,
) -> dict[str, Any]:
    """Write LEFT_OUT: the reference images within a cosine `distance` of some training image.

    Also writes a page that helps to choose the distance. All paths are local or s3://. Features
    are kept in `out` for later calls. Raises UserError.
    """
    if not 0 < distance < 2:
        raise UserError(
            f"--distance is a cosine distance, above 0 and below 2 (given: {distance:g})."
        )
    out = _begin(out, clip)
    real = _embed("reference", reference, out, clip)
    trained = _embed("training", training, out, clip)
    found = nearest(real.features, trained.features)
    names = [name for name, far in zip(real.names, found.distances, strict=True) if far < distance]
    result = {
        "reference": reference,
        "training": training,
        "clip": storage.absolute(clip),
        "distance": distance,
        "images": len(real.names),
        "names": names,
    }
    sections = _filter_sections(result, real, trained, found)
    storage.put(
        page(f"{reference} without near-copies of {training}", sections).encode(), f"{out}/{PAGE}"
    )
    storage.put(json.dumps(result, indent=1, ensure_ascii=False).encode(), f"{out}/{LEFT_OUT}")
    return {**result, "names": len(names)}


def _filter_sections(
    result: dict[str, Any], real: EmbeddedCorpus, trained: EmbeddedCorpus, found: Nearest
) -> list[Section]:
    count, training, distance = len(result["names"]), result["training"], result["distance"]
    order = np.argsort(found.distances)
    within, beyond = order[:count][::-1], order[count:]
    text = (
        f"{count:,} of {len(real.names):,} images of {result['reference']} "
        f"({count / len(real.names):.1%}) lie within {distance:g} of an image of "
        f"{training}. Choose the distance so that the pairs below it are copies and those above "
        "it are not."
    )
    return [
        Section("Distances to the nearest training image", text, bars=_bars(found.distances)),
        *(
            Section(title, groups=_pairs(real, rows[:PAIRS_SHOWN], trained, found)[0], width=112)
            for title, rows in (
                ("Left out, nearest to the limit", within),
                ("Kept, nearest to the limit", beyond),
            )
        ),
    ]


def left_out(path: str) -> list[str]:
    """Image names listed by `filter_reference`, as in `EmbeddedCorpus.names`. Raises UserError."""
    try:
        names = json.loads(storage.read(storage.absolute(path)))["names"]
    except (ValueError, KeyError, TypeError):
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(
            f"{path} is not a list as `glide filter-reference` writes it; give its {LEFT_OUT}."
        )
    return names


def regurgitation(
    pictures: str | None,
    training: str,
    held_out: str,
    out: str,
    clip: str,
    config: BulkConfig,
    images: int,
) -> dict[str, Any]:
    """Compare the distances of generated and of held-out real pictures to their nearest originals.

    The originals are the training images; real pictures of `held_out` were never trained on.
    `pictures`: folder of bulk generation from training prompts; if None, `images` pictures are
    generated first, from captions of the training corpus. The nearest pairs are shown side by side
    and also compared by pixels. All paths are local or s3://. Pictures and features are kept in
    `out` for later calls. Raises UserError.
    """
    out = _begin(out, clip)
    trained = _embed("training", training, out, clip)
    if pictures is None:
        captions = [caption for caption in trained.captions if caption]
        if not captions:
            raise UserError(f"No image of {training} has a caption; give existing pictures.")
        [pictures] = generate_sets(config, (), (), captions, images, out).values()
    generated = _embed("pictures", pictures, out, clip)
    real = _embed("held-out", held_out, out, clip)
    found = nearest(generated.features, trained.features)
    baseline = nearest(real.features, trained.features)
    order = np.argsort(found.distances)[:PAIRS_SHOWN]
    groups, copies, sheet = _pairs(generated, order, trained, found)
    figures = {
        **_distances(generated, trained, found, baseline),
        "compared_by_pixels": len(order),
        "copies_by_pixels": copies,
    }
    sections = _regurgitation_sections(figures, found, baseline, groups)
    storage.put(encode(sheet), f"{out}/{SHEET}")
    storage.put(page(f"Does the model repeat {training}?", sections).encode(), f"{out}/{PAGE}")
    storage.put(json.dumps(figures, indent=1).encode(), f"{out}/{FIGURES}")
    return figures


def _distances(
    generated: EmbeddedCorpus, trained: EmbeddedCorpus, found: Nearest, baseline: Nearest
) -> dict[str, Any]:
    """Figures of the nearest training images: `found` of generated, `baseline` of held-out ones."""
    own = nearest_with_caption(
        generated.features, generated.captions, trained.features, trained.captions
    )
    near = float(np.quantile(baseline.distances, 0.01))
    return {
        "pictures": len(generated.names),
        "training": len(trained.names),
        "held_out": len(baseline.distances),
        "closest": float(found.distances.min()),
        "median": float(np.median(found.distances)),
        "held_out_closest": float(baseline.distances.min()),
        "held_out_median": float(np.median(baseline.distances)),
        "nearer_than_1_percent_of_held_out": float((found.distances < near).mean()),
        "own_originals": int((own.rows >= 0).sum()),
        "own_median": float(np.nanmedian(own.distances)) if (own.rows >= 0).any() else None,
    }


def _regurgitation_sections(
    figures: dict[str, Any], found: Nearest, baseline: Nearest, groups: list[list[Picture]]
) -> list[Section]:
    text = (
        f"Distance of each of {figures['pictures']:,} pictures to the nearest of "
        f"{figures['training']:,} training images: closest {figures['closest']:.4f}, median "
        f"{figures['median']:.4f}. For {figures['held_out']:,} real pictures outside the "
        f"training set: closest {figures['held_out_closest']:.4f}, median "
        f"{figures['held_out_median']:.4f}. Pictures by a model that repeats training images are "
        "nearer to them than these."
    )
    return [
        Section("Generated pictures", text, bars=_bars(found.distances)),
        Section("Held-out real pictures", "The same distances.", bars=_bars(baseline.distances)),
        Section(
            "The closest pairs",
            f"Each picture, then the training image. {figures['copies_by_pixels']} of these "
            f"{figures['compared_by_pixels']} pairs show the same picture, judged by pixels.",
            groups=groups,
        ),
    ]


def _begin(out: str, clip: str) -> str:
    fetch_clip(clip)  # report a missing CLIP before Ray starts
    connect(2 + ACTORS)
    return storage.absolute(out).rstrip("/")


def _embed(name: str, source: str, out: str, clip: str) -> EmbeddedCorpus:
    return embed_corpus(source, clip, SIZE, f"{out}/features/{name}.parquet")


def _pairs(
    side: EmbeddedCorpus, rows: Iterable[int], trained: EmbeddedCorpus, found: Nearest
) -> tuple[list[list[Picture]], int, np.ndarray]:
    """Rows beside their nearest training images.

    Returns the groups for the page, the number of pairs that are the same picture by pixels, and
    a contact sheet (H, W, 3) uint8.
    """
    rows = [int(row) for row in rows]
    pictures_read, originals = (
        read_rows(embedded.parts, [embedded.places[n] for n in chosen])
        for embedded, chosen in ((side, rows), (trained, found.rows[rows]))
    )
    groups, images, labels, copies = [], [], [], 0
    for row in rows:
        one = pictures_read.get(side.places[row])
        other = originals.get(trained.places[found.rows[row]])
        shown = [thumbnail(sample.image) if sample else None for sample in (one, other)]
        whole = [image for image in shown if image is not None]
        texts = [
            f"{found.distances[row]:.4f}: {side.captions[row]}",
            trained.captions[found.rows[row]],
        ]
        groups.append([Picture(image, text) for image, text in zip(shown, texts, strict=True)])
        if one is not None and other is not None and len(whole) == 2:
            images += [on_square(image) for image in whole]
            labels += texts
            copies += _alike(one.image, other.image)
    return (
        groups,
        copies,
        np.asarray(contact_sheet(images, labels, columns=8, size=112))
        if images
        else np.full((1, 1, 3), 255, np.uint8),
    )


def _alike(one: bytes, other: bytes) -> bool:
    """Whether the centred squares, all that training sees, are the same picture by pixels."""
    try:
        return same_picture(
            *(
                Image.fromarray(centre_crop(image, min(image.size)))
                for image in map(decode, (one, other))
            )
        )
    except ImageError:
        return False


def _bars(distances: np.ndarray) -> list[tuple[str, int]]:
    counts, _ = np.histogram(distances, EDGES)
    return [
        (f"{low:g} to {high:g}", int(count))
        for low, high, count in zip(EDGES[:-1], EDGES[1:], counts, strict=True)
    ]
