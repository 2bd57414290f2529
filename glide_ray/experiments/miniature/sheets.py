"""Figures 6, 9 and 11, a sheet of all sets, and the HTML page that shows everything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...evaluation.elo import Standing
from ...evaluation.features import ClipFeatures
from ...evaluation.pages import Picture, Section, page
from ...evaluation.report import Point, contact_sheet, fronts, grid, show_hole
from .findings import Finding
from .models import CLIP, FILTERED, LARGE, SIDE, SMALL, STRIPPED
from .pictures import (
    BEST,
    BY_CLIP,
    CLASSIFIER_FREE,
    CLIP_GUIDED,
    CLIPS,
    GUIDED,
    SMALLS,
    UNGUIDED,
    Real,
    SetSampling,
    by_clip,
    fill,
    generate,
    guided,
    load,
)

PROMPTS = (
    "a red heart, 3D render",
    "a green apple, flat icon",
    "a yellow star, Noto",
    "a blue book, Twemoji",
    "a smiling face, 3D render",
    "a dog face, flat icon",
)
INSIDE = "a yellow star, flat icon"  # caption for the holes of figure 11
RULE = (
    "A finding holds if every difference in it is more than two standard errors from zero. "
    "Differences are between pictures of the same captions and seeds."
)
VOTERS = (
    "People voted in the paper. Here EfficientNet votes, which has never seen an emoji: for the "
    "picture nearer to any real one, and for the one nearer to the real picture of its caption."
)
MEASURES = (
    "real pictures that no model was trained on. Distances, precision and recall use "
    "EfficientNet's features, or where the name says so those of a CLIP that guides no sampling."
)
IMPLICIT = (
    "Implicit inpainting and CLIP guidance use the shipped weights without the input channels of "
    "the known pixels, which are noised into every step instead."
)
CAPTIONS_SHOWN = 10  # captions on the sheet of all sets
# Figure 11: pictures, and seeds of each, from which CLIP chooses the best (app. D: 64)
HOLES, TRIES = 5, 8


def figure_6(table: Mapping[str, Mapping[str, float]]) -> np.ndarray:
    """Figure 6: fronts of both kinds of guidance for the large model."""
    points = [Point(name, row) for name, row in table.items() if name not in SMALLS]
    return fronts(points, inception=False, network="EfficientNet")


def figure_9(weights: Mapping[str, Path]) -> np.ndarray:
    """Figure 9, with the paper's rows: four models and kinds of guidance.

    The large model, the small one, the small one trained on the filtered corpus, and the last again
    with CLIP guidance. Seeds are 0 to 5, not selected.
    """
    rows = {
        "large": SetSampling(LARGE, guided(BEST)),
        "small": SetSampling(SMALL, guided(BEST)),
        "small, filtered": SetSampling(FILTERED, guided(BEST)),
        "small, filtered, CLIP": SetSampling(FILTERED, by_clip(BY_CLIP)),
    }
    pictures = [
        list(
            generate(
                load(weights[variant.model], weights[CLIP] if variant.options.clip_scale else None),
                PROMPTS,
                variant.options,
            )
        )
        for variant in rows.values()
    ]
    return np.asarray(grid(pictures, PROMPTS, list(rows)))


def figure_11(weights: Mapping[str, Path], real: Real, judge: Path) -> np.ndarray:
    """Figure 11: real pictures with a round hole, inpainted in three ways.

    CLIP guidance, the inpainting model, and implicit inpainting. Shows the seed of TRIES that the
    plain CLIP, `judge`, scores highest.
    """
    y, x = np.mgrid[:SIDE, :SIDE]
    known = (y - SIDE / 2) ** 2 + (x - SIDE / 2) ** 2 > (SIDE / 3) ** 2
    variants = {
        "CLIP guidance": SetSampling(STRIPPED, by_clip(BY_CLIP)),
        "inpainting model": SetSampling(LARGE, guided(BEST)),
        "implicit": SetSampling(STRIPPED, guided(BEST)),
    }
    clip, images, labels = ClipFeatures(judge), [], []
    cascades = {
        name: load(weights[variant.model], weights[CLIP] if variant.options.clip_scale else None)
        for name, variant in variants.items()
    }
    caption_features = clip.words([INSIDE])[0]
    for picture in real.pixels[:: len(real.pixels) // HOLES][:HOLES]:
        images.append(show_hole(picture, known))
        labels.append(f"{INSIDE}, into the hole")
        for name, variant in variants.items():
            filled = fill(cascades[name], picture, known, INSIDE, range(TRIES), variant.options)
            images.append(
                filled[
                    int(
                        np.argmax(
                            clip.images([Image.fromarray(image) for image in filled])
                            @ caption_features
                        )
                    )
                ]
            )
            labels.append(name)
    return np.asarray(contact_sheet(images, labels, columns=1 + len(variants), size=128))


def sets_side_by_side(pictures: Mapping[str, np.ndarray], real: Real) -> np.ndarray:
    """Pictures of the first captions: real ones, then a row per set, same seeds."""
    rows = {"real": real.pixels, **pictures}
    return np.asarray(
        grid(
            [list(pixels[:CAPTIONS_SHOWN]) for pixels in rows.values()],
            real.captions[:CAPTIONS_SHOWN],
            list(rows),
            96,
        )
    )


def report(
    table: Mapping[str, Mapping[str, float]],
    standings: Mapping[str, Mapping[str, Standing]],
    painted: Mapping[str, Any],
    found: Sequence[Finding],
    sheets: Mapping[str, np.ndarray],
    images: int,
    reals: int,
) -> str:
    """The page as HTML.

    `table`: metrics of each set; `sheets`: pictures by file name; `images`: number of pictures in a
    set; `reals`: number of real pictures in the reference.
    """
    held = sum(finding.holds for finding in found)
    return page(
        "The paper in miniature",
        [
            Section(
                f"{held} of {len(found)} findings hold at this scale",
                RULE,
                table=_findings_table(found),
            ),
            *_guidance_sections(sheets, images),
            Section("Table 1: Elo", VOTERS, table=_elo_table(standings)),
            Section(
                "Table 2: distance to real pictures",
                f"{reals} {MEASURES}",
                table=_figures_table(table),
            ),
            *_model_sections(sheets),
            Section(
                "Errors of inpainting",
                f"Mean squared error against the original picture, over {painted['images']} holes.",
                table=_errors_table(painted),
            ),
        ],
    )


def _findings_table(found: Sequence[Finding]) -> list[list[str]]:
    rows = [
        [finding.text, finding.measured, "holds" if finding.holds else "does not hold"]
        for finding in found
    ]
    return [["the paper", "here", ""], *rows]


def _guidance_sections(sheets: Mapping[str, np.ndarray], images: int) -> list[Section]:
    return [
        _sheet(
            "The same captions and seeds",
            f"Rows: {', '.join(['real', *CLASSIFIER_FREE, *CLIPS, *SMALLS])}.",
            sheets["sets.png"],
            1040,
        ),
        _sheet(
            "Figure 6: both kinds of guidance",
            f"{images} pictures per point.",
            sheets["figure-6.png"],
            1040,
        ),
    ]


def _model_sections(sheets: Mapping[str, np.ndarray]) -> list[Section]:
    return [
        _sheet(
            "Figure 9: large and small models",
            "Seeds 0 to 5, without selection.",
            sheets["figure-9.png"],
            1000,
        ),
        _sheet(
            "Figure 11: inpainting",
            f"Each is the best of {TRIES} by CLIP score. {IMPLICIT}",
            sheets["figure-11.png"],
            600,
        ),
    ]


def _sheet(title: str, text: str, picture: np.ndarray, width: int) -> Section:
    return Section(title, text, groups=[[Picture(picture)]], width=width)


def _elo_table(standings: Mapping[str, Mapping[str, Standing]]) -> list[list[str]]:
    def cell(standing: Standing) -> str:
        return f"{standing.score:+.1f} ({standing.low:+.1f} to {standing.high:+.1f})"

    names = (GUIDED, CLIP_GUIDED, UNGUIDED)
    return [
        ["", *standings],
        *([name, *(cell(scores[name]) for scores in standings.values())] for name in names),
    ]


def _figures_table(table: Mapping[str, Mapping[str, float]]) -> list[list[str]]:
    columns = [name for name in next(iter(table.values())) if not name.endswith("_scale")]
    return [
        ["", *(name.replace("_", " ") for name in columns)],
        *([name, *(f"{row[column]:.4g}" for column in columns)] for name, row in table.items()),
    ]


def _errors_table(painted: Mapping[str, Any]) -> list[list[str]]:
    samplers = {name: errors for name, errors in painted.items() if isinstance(errors, Mapping)}
    columns = list(next(iter(samplers.values())))
    return [
        ["sampler", *(name.replace("_", " ") for name in columns)],
        *(
            [name, *(str(errors[column]) for column in columns)]
            for name, errors in samplers.items()
        ),
    ]
