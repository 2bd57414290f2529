"""`glide miniature`: the paper's experiments at small scale.

Uses the shipped weights and models that a CPU trains in minutes. Each stage stores its result on
disk and is skipped if that exists, so an interrupted run resumes. Nobody votes here: table 1 has
the votes of a network in place of people's, and says so.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ... import storage
from ...bench.quality import bench_inpainting
from ...config.sampling import SampleOptions
from ...data import emoji
from ...data.images import encode
from ...data.shards import read_index
from ...evaluation.elo import Standing
from ...precision import fastest_precision
from ...records import cached_result
from ...storage import fingerprint
from . import findings as judged
from . import sheets
from .findings import Finding
from .models import JUDGE, LARGE, STRIPPED, train_all
from .pictures import IMAGES, SETS, FeatureNetworks, Real, SetFeatures, make_set, real_pictures

log = logging.getLogger(__name__)

HOLES = 64  # pictures inpainted to measure the error at the border
FINDINGS, FIGURES, PAGE = "findings.json", "figures.json", "report.html"


def run(out: Path, corpus: Path) -> list[Finding]:
    """Run all experiments in the folder `out` and return the findings. Raises UserError.

    `corpus`: folder of the corpus that `glide corpus` builds; built if it is missing.
    """
    if not all(read_index(corpus / split) for split in ("train", "tones", "held_out_pairs")):
        emoji.build_corpus(corpus)
    weights = train_all(out, corpus)
    real = real_pictures(out / "corpus" / "held_out")
    own = Real(real.pixels[:IMAGES], real.captions[:IMAGES])
    pictures = {
        name: make_set(name, sampling, weights, own.captions, out / "pictures")
        for name, sampling in SETS.items()
    }
    painted = _inpainting_errors(out, weights)
    log.info("measuring the pictures")
    networks = FeatureNetworks(weights[JUDGE])
    sets = {
        name: networks.features(set_pictures, own.captions)
        for name, set_pictures in pictures.items()
    }
    features = networks.features(real.pixels, real.captions)
    own_features = networks.features(own.pixels, own.captions)
    table = _figures(sets, features)
    votes = judged.votes_of(sets, features, own_features)
    found = judged.findings(sets, features, votes, painted)
    images = {
        "sets.png": sheets.sets_side_by_side(pictures, own),
        "figure-6.png": sheets.figure_6(table),
        "figure-9.png": sheets.figure_9(weights),
        "figure-11.png": sheets.figure_11(weights, real, weights[JUDGE]),
    }
    for name, sheet in images.items():
        storage.put(encode(sheet), out / name)
    standings = judged.standings(votes)
    report = sheets.report(
        table, standings, painted, found, images, len(own.captions), len(real.captions)
    )
    storage.put(report.encode(), out / PAGE)
    figures = {
        "sets": table,
        "elo": {question: _by_name(scores) for question, scores in standings.items()},
        "inpainting": painted,
        "clip_score_of_real": 100 * float(features.cosines.mean()),
    }
    for name, result in ((FIGURES, figures), (FINDINGS, [finding.as_json() for finding in found])):
        storage.put(json.dumps(result, indent=1, ensure_ascii=False).encode(), out / name)
    return found


def _by_name(scores: Mapping[str, Standing]) -> dict[str, dict[str, Any]]:
    return {name: dict(vars(standing)) for name, standing in scores.items()}


def _inpainting_errors(out: Path, weights: Mapping[str, Path]) -> dict[str, Any]:
    errors, _ = cached_result(
        str(out / "inpainting.json"),
        {name: fingerprint(weights[name]) for name in (STRIPPED, LARGE)},
        lambda: bench_inpainting(
            weights[STRIPPED],
            weights[LARGE],
            out / "corpus" / "held_out",
            HOLES,
            precision=fastest_precision(),
        ),
    )
    return errors


def _figures(sets: Mapping[str, SetFeatures], real: SetFeatures) -> dict[str, dict[str, float]]:
    """Scales and metrics of each set, against real pictures."""
    return {
        name: {
            **_scales(SETS[name].options),
            **judged.figures(features, real),
        }
        for name, features in sets.items()
    }


def _scales(options: SampleOptions) -> dict[str, float]:
    assert options.guidance_scale is not None  # set for all SETS
    return {"guidance_scale": options.guidance_scale, "clip_scale": options.clip_scale}
