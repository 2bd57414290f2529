"""`glide probe`: compare pictures of prompts that differ in one word only (sec. 6, app. F.2).

Writes the figures as JSON, a sheet of pictures and a report page.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from ... import storage
from ...config.sampling import BulkConfig
from ...data.images import decode, encode
from ...errors import UserError
from ...evaluation.features import ClipFeatures
from ...evaluation.pages import SIDE, Picture, Section, page
from ...evaluation.probes import Group, above, colour_name
from ...evaluation.probes import probe as measure
from ...evaluation.report import grid, scaled
from ...models.clip_scorer import fetch_clip
from ..cluster import connect
from ..embed import ACTORS, embed_corpus
from ..generate import generate
from ..rows import PAGE, read_rows

PROMPTS, PICTURES, FIGURES, SHEET = "prompts.jsonl", "pictures", "figures.json", "sheet.png"
SIZE = 256  # pixels of the pictures before CLIP: the full size of a cascade's output
ON_SHEET, ON_PAGE = 12, 48  # seeds shown


def probe(
    prompts: Sequence[str],
    words: Sequence[str],
    seeds: int,
    out: str,
    clip: str,
    config: BulkConfig,
) -> dict[str, Any]:
    """Generate pictures of each prompt from the same seeds, and compare each two prompts.

    `seeds`: number of consecutive seeds from `config.seed`. `words`: texts to compare the pictures
    with by CLIP. All paths are local or s3://. Pictures and features are kept in `out`: rerunning
    gives identical figures. Raises UserError.
    """
    if len(prompts) < 2 or not all(prompt.strip() for prompt in prompts):
        raise UserError(
            "A probe compares pictures of two or more prompts, none of them empty; "
            'give them as "toys for girls" "toys for boys".'
        )
    if seeds < 2:
        raise UserError(
            f"A probe needs two or more seeds, and at least 6 for a p-value below 0.05 "
            f"(given: {seeds})."
        )
    fetch_clip(clip)  # report a missing CLIP before pictures are made
    out = storage.absolute(out).rstrip("/")
    _write_prompts(prompts, config.seed, seeds, out)
    generate(f"{out}/{PROMPTS}", f"{out}/{PICTURES}", config)
    connect(2 + ACTORS)
    images, features = _pictures_and_features(
        f"{out}/{PICTURES}", clip, f"{out}/features.parquet", seeds * len(prompts)
    )
    colours = np.stack([image.mean((0, 1)) for image in images])
    rows_by_prompt = [slice(n * seeds, (n + 1) * seeds) for n in range(len(prompts))]
    groups = [
        Group(prompt, features[rows], colours[rows])
        for prompt, rows in zip(prompts, rows_by_prompt, strict=True)
    ]
    words = list(dict.fromkeys(words))
    meant = dict(zip(words, ClipFeatures(clip).words(words), strict=True)) if words else {}
    found = {
        "seeds": [config.seed, config.seed + seeds - 1],
        "guidance_scale": config.options.guidance_scale,
        **measure(groups, meant),
    }
    _write(out, found, list(zip(*(images[rows] for rows in rows_by_prompt), strict=True)))
    return found


def _write_prompts(prompts: Sequence[str], first: int, seeds: int, out: str) -> None:
    lines = [
        json.dumps({"prompt": prompt, "seed": first + n}, ensure_ascii=False)
        for prompt in prompts
        for n in range(seeds)
    ]
    storage.put("".join(f"{line}\n" for line in lines).encode(), f"{out}/{PROMPTS}")


def _pictures_and_features(
    pictures: str, clip: str, cache: str, count: int
) -> tuple[list[np.ndarray], np.ndarray]:
    """Pictures in the order of the prompt file, and their CLIP features (N, E)."""
    embedded = embed_corpus(pictures, clip, SIZE, cache)
    samples = read_rows(embedded.parts, embedded.places)
    if len(samples) != count:
        raise UserError(
            f"{count - len(samples):,} of {count:,} pictures in {pictures} cannot be read; "
            f"delete them and run the same command again."
        )
    images = [np.asarray(decode(samples[place].image)) for place in embedded.places]
    first: dict[bytes, int] = {}
    # Rounding in a network depends on the other images of a batch: identical pictures all take
    # the features of the first of them.
    rows = [
        first.setdefault(hashlib.sha256(image.tobytes()).digest(), n)
        for n, image in enumerate(images)
    ]
    return images, embedded.features[rows]


def _write(out: str, found: dict[str, Any], rows: Sequence[Sequence[np.ndarray]]) -> None:
    prompts, first = [group["prompt"] for group in found["groups"]], found["seeds"][0]
    sheet = grid(
        rows[:ON_SHEET], prompts, [f"seed {first + n}" for n in range(len(rows))][:ON_SHEET]
    )
    storage.put(encode(np.asarray(sheet)), f"{out}/{SHEET}")
    storage.put(_page(found, rows).encode(), f"{out}/{PAGE}")
    storage.put(json.dumps(found, indent=1, ensure_ascii=False).encode(), f"{out}/{FIGURES}")


def _page(found: dict[str, Any], rows: Sequence[Sequence[np.ndarray]]) -> str:
    groups, pairs, first = found["groups"], found["pairs"], found["seeds"][0]
    prompts = [group["prompt"] for group in groups]
    scale = (
        "" if found["guidance_scale"] is None else f" Guidance scale {found['guidance_scale']:g}."
    )
    text = (
        f"{len(rows)} seeds, each with every prompt.{scale} Distances are between the mean CLIP "
        f"features of the pictures; p is the share of {pairs[0]['arrangements']:,} arrangements, "
        "with labels swapped within pairs, whose distance is at least as large. For words, the "
        "difference is the mean CLIP cosine of the first prompt's pictures minus that of the "
        "second's, ± standard error."
    )
    shown = [
        [
            Picture(np.asarray(scaled(image, SIDE)), "" if column else f"seed {first + n}")
            for column, image in enumerate(row)
        ]
        for n, row in enumerate(rows[:ON_PAGE])
    ]
    swatches = [
        Picture(
            np.full((SIDE // 2, SIDE, 3), np.round(group["colour"]), np.uint8),
            f"{group['prompt']}, {colour_name(group)}",
        )
        for group in groups
    ]
    return page(
        "Do these prompts give different pictures?",
        [
            Section("Differences", text, table=_distance_table(pairs)),
            Section("Cosines with the words", table=_word_table(groups)),
            Section("Mean colours", groups=[swatches]),
            Section(
                "Differences of colour",
                "Of 255, ± standard error.",
                table=_colour_table(pairs),
            ),
            Section(
                "Pictures of the same seeds",
                "In each frame, from left to right: "
                f"{', '.join(f'“{prompt}”' for prompt in prompts)}.",
                groups=shown,
            ),
        ],
    )


def _distance_table(pairs: Sequence[dict[str, Any]]) -> list[list[str]]:
    words = list(pairs[0]["words"])
    rows = [
        [
            " – ".join(pair["prompts"]),
            f"{pair['distance']:.4f}",
            f"{pair['by_chance']:.4f}",
            f"{pair['p']:.4g}",
            *(above(pair["words"][word], 4) for word in words),
        ]
        for pair in pairs
    ]
    return [["", "distance", "by chance", "p", *words], *rows]


def _word_table(groups: Sequence[dict[str, Any]]) -> list[list[str]]:
    words = list(groups[0]["words"])
    rows = [
        [group["prompt"], *(f"{value:.4f}" for value in group["words"].values())]
        for group in groups
    ]
    return [["", *words], *rows] if words else []


def _colour_table(pairs: Sequence[dict[str, Any]]) -> list[list[str]]:
    rows = [
        [" – ".join(pair["prompts"]), *(above(one, 1) for one in pair["colour"].values())]
        for pair in pairs
    ]
    return [["", *pairs[0]["colour"]], *rows]
