"""Generated pictures beside real ones, both as a CLIP sees them: figures as JSON, and a page (sec. 5.2)."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from .. import storage
from ..data.sources import Part, find_parts
from ..evaluation import metrics
from ..evaluation.features import ClipFeatures, fetch_clip
from ..evaluation.metrics import Moments
from ..evaluation.pages import Section, page
from ..recipe import fingerprint
from .corpus import PAGE
from .features import ACTORS, embed
from .filter import Looked
from .local import connect

FIGURES, FEATURES = "figures.json", "features-{}.parquet"
SHOWN, WORDS_AT_ONCE = 32, 256


def evaluate(pictures: str, reference: str, out: str, clip: str, report: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Figures of the corpus `pictures`, as bulk generation leaves it, beside the corpus `reference`; both local or s3://, `out` too.

    The features of each are kept in `out` once they are whole: called again after a fault, the other one is looked at, and called again for
    the same pictures nothing is. Raises UserError.
    """
    out, clip_path = storage.absolute(out).rstrip("/"), str(Path(fetch_clip(clip)).resolve())
    seeing = ClipFeatures(clip_path)        # a missing CLIP is said before Ray is started
    sides = {"pictures": (pictures, find_parts(storage.absolute(pictures))), "reference": (reference, find_parts(storage.absolute(reference)))}
    of = {name: _digest(clip_path, parts) for name, (_, parts) in sides.items()}
    try:
        if (before := json.loads(storage.read(f"{out}/{FIGURES}")))["of"] == of:
            return before
    except (storage.MissingError, ValueError, KeyError):
        pass
    connect(2 + ACTORS)
    made, real = (_looked(name, source, parts, clip_path, out, of[name], report) for name, (source, parts) in sides.items())
    figures = {"of": of, "pictures": len(made.names), "reference": len(real.names), **_figures(made, real, seeing)}
    storage.put(_page(figures, pictures, reference, made, real).encode(), f"{out}/{PAGE}")
    storage.put(json.dumps(figures, indent=1).encode(), f"{out}/{FIGURES}")
    return figures


def _digest(clip: str, parts: Sequence[Part]) -> str:
    """Of what a set's features follow from: the CLIP, and which images there are, with their captions."""
    return hashlib.sha256(json.dumps([fingerprint(clip), [[part.url, part.count, part.files] for part in parts]]).encode()).hexdigest()


def _looked(name: str, source: str, parts: Sequence[Part], clip: str, out: str, of: str, report: Callable[[str], None]) -> Looked:
    path = f"{out}/{FEATURES.format(name)}"
    try:
        table = pyarrow.parquet.read_table(io.BytesIO(storage.read(path)))
        if (table.schema.metadata or {}).get(b"of") == of.encode():
            return Looked.of(table, parts)
    except (storage.MissingError, pyarrow.ArrowInvalid):
        pass
    report(f"looking at {source}")
    table, counted = embed(parts, clip)
    for fault in counted.faults:
        report(fault)
    sink = io.BytesIO()
    pyarrow.parquet.write_table(table.replace_schema_metadata({"of": of}), sink)
    storage.put(sink.getvalue(), path)
    return Looked.of(table, parts)


def _figures(made: Looked, real: Looked, seeing: ClipFeatures) -> dict[str, float]:
    """All in the space of the CLIP's features: the Fréchet distance is FID's only where they are Inception's."""
    precision, recall = metrics.precision_recall(real.features, made.features)
    kid, deviation = metrics.kid(real.features, made.features)
    return {"frechet_distance": metrics.frechet_distance(Moments.of(made.features), Moments.of(real.features)), "kid": kid, "kid_deviation": deviation,
            "cmmd": metrics.cmmd(real.features, made.features), "precision": precision, "recall": recall,
            **{f"{name}clip_score": metrics.clip_score(side.features, _words(side.captions, seeing)) for name, side in (("", made), ("reference_", real))}}


def _words(captions: Sequence[str], seeing: ClipFeatures) -> np.ndarray:
    return np.concatenate([seeing.words(captions[start:start + WORDS_AT_ONCE]) for start in range(0, len(captions), WORDS_AT_ONCE)])


def _page(figures: dict[str, Any], pictures: str, reference: str, made: Looked, real: Looked) -> str:
    draws = np.random.default_rng(0)
    lines = [f"{name}: {value:.5g}" for name, value in figures.items() if name != "of"]
    shown = [Section(f"{title}, at random", groups=side.pictures(draws.permutation(len(side.names))[:SHOWN].tolist()))
             for title, side in (("What was made", made), ("The reference", real))]
    return page(f"{pictures} beside {reference}", [Section("Figures", "In the space of the CLIP's features.", lines=lines), *shown])
