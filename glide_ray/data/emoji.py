"""The default corpus: emoji of several artists, published as npm packages, with captions.

The pictures are not part of glide_ray: the user's own npm fetches the packages, and the shards are
made from them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..object_cache import cache_folder
from ..storage import check_writable, is_remote, no_empty_folders
from .card import LeftOut, counts_of, read_card, sources, write_card
from .credits import Credits
from .packages import EmojiError, Package, fetch_packages, find_packages
from .render import in_order, process_pool, render_all
from .scene_shards import check_room, write_scenes
from .sets import SourcePicture, assign_splits, needed_packages, read_pictures
from .shards import Sample, begin, finish, read_index, write_shard
from .splits import SCENE_SPLITS, SPLITS, share
from .styles import Style, choose_styles

log = logging.getLogger(__name__)

PICTURES_PER_TASK = 16
UNRENDERED = "did not render"
ABOUT = "Emoji pictures with captions; each row's json names its author, licence and source."


def build_corpus(
    out: str | Path,
    cache: str | Path | None = None,
    styles: Iterable[str] = (),
    packages: str | Path | None = None,
    scenes: int = 0,
    splits: Iterable[str] = SPLITS,
) -> dict[str, dict[str, Any]]:
    """Write the corpus as folders of shards under `out`, local or s3://; skip those that exist.

    One folder for each of `splits` and, if `scenes` > 0 (the number of scenes), for each of
    SCENE_SPLITS. `styles`: names from STYLES, by default DEFAULT. `packages`: a folder of npm
    tarballs to use instead of npm. `cache`: folder for the packages that npm fetches. Returns the
    index of each split. Raises EmojiError, SceneError, and ConfigError if `out` has a corpus of
    other styles or another number of scenes.
    """
    out, chosen = str(out).rstrip("/"), choose_styles(styles)
    indices = {split: read_index(f"{out}/{split}") for split in (*SPLITS, *SCENE_SPLITS)}
    done = {split: index for split, index in indices.items() if index}
    _refuse_other(out, done, chosen, scenes)
    compose = scenes and any(split not in done for split in SCENE_SPLITS)
    if compose:
        check_room(out, scenes)
    if missing := [split for split in splits if split not in done]:
        with no_empty_folders(out):
            check_writable(out)
            found = _packages(out, cache, packages, chosen)
        done |= _write_pictures(out, chosen, missing, found)
    if compose:
        done |= write_scenes(out, scenes)
    return done


def _refuse_other(out: str, done: Iterable[str], styles: Sequence[Style], scenes: int) -> None:
    """Raise ConfigError if the splits that exist were made with other options."""
    wanted = [style.words for style in styles]
    for split in done:
        card = read_card(f"{out}/{split}") or {}
        existing_styles = card.get("styles")
        if existing_styles != wanted:
            kind = (
                f"with the styles {', '.join(existing_styles)}"
                if existing_styles
                else "of another kind"
            )
            raise ConfigError(
                f"{out} already has a corpus {kind}, and others are asked for; name "
                "the same with --styles, give another folder with --out, or remove "
                "that one first."
            )
        if scenes and split in SCENE_SPLITS and card.get("scenes") != scenes:
            both = " and ".join(f"{out}/{name}" for name in SCENE_SPLITS)
            raise ConfigError(
                f"{out} already has {card.get('scenes')} scenes, and --scenes asks "
                f"for {scenes}; remove {both} first, or give another folder with "
                "--out."
            )


# -- rules for `filters.Candidate`: true if it has the content -------------------------------------

# Code points of the emoji that emojilib calls weapons, and others that explode, shoot or cut.
WEAPONS = {
    "1f3f9": "bow and arrow",
    "1f4a3": "bomb",
    "1f52a": "kitchen knife",
    "1f52b": "water pistol",
    "1f531": "trident emblem",
    "1f5e1": "dagger",
    "1f6e1": "shield",
    "1f93a": "person fencing",
    "1f9e8": "firecracker",
    "1fa83": "boomerang",
    "1fa93": "axe",
    "2694": "crossed swords",
}


def shows_people(candidate) -> bool:
    """Whether Unicode's group is people (of all professions and tones), hands and body parts."""
    return candidate.meta.get("group") == "People & Body"


def shows_weapon(candidate) -> bool:
    """Whether it shows a weapon, alone or among the objects of a scene."""
    objects = candidate.meta.get("objects") or ()
    codes = [candidate.meta.get("emoji"), *(one.get("emoji") for one in objects)]
    return any(code in WEAPONS for code in codes)


# -- shards ----------------------------------------------------------------------------------------


def _packages(
    out: str,
    cache: str | Path | None,
    folder: str | Path | None,
    styles: Sequence[Style],
) -> dict[str, Package]:
    """All packages that the styles are read from, by name. Raises EmojiError."""
    if find_spec("resvg_py") is None and any(style.is_vector for style in styles):
        raise EmojiError(
            "resvg-py, which renders the emoji, is not installed; "
            "run `pip install 'glide_ray[emoji]'`."
        )
    wanted = needed_packages(styles)
    cache = cache or (cache_folder() / "emoji" if is_remote(out) else f"{out}/.packages")
    found = find_packages(folder, wanted) if folder else fetch_packages(cache, wanted)
    return {package.name: package for package in found}


def _write_pictures(
    out: str,
    styles: Sequence[Style],
    missing: Sequence[str],
    packages: Mapping[str, Package],
) -> dict[str, dict[str, Any]]:
    """Render and write the missing splits. Returns the index of each."""
    left_out, unrendered, done = LeftOut(), LeftOut(), {}
    pictures = list(read_pictures(styles, packages, left_out))
    split_of = assign_splits(pictures)
    versions = {name: package.version for name, package in packages.items()}
    # Sort by a hash: training reads shards in order, and must not see one set after the other.
    pictures.sort(key=lambda picture: share(picture.key))
    with process_pool() as pool:
        for split in missing:
            chosen = [picture for picture in pictures if split_of[picture.key] == split]
            log.info(f"rendering {len(chosen):,} pictures for {split}")
            of_split = left_out.copy()
            rendered = _rendered(pool, chosen, (of_split, unrendered))
            entries, counts, credits = _write_shards(f"{out}/{split}", rendered)
            write_card(
                f"{out}/{split}",
                {
                    "about": ABOUT,
                    "split": split,
                    "styles": [style.words for style in styles],
                    "sources": sources(styles, versions, counts),
                    **counts_of(credits),
                    "left_out": of_split.as_json(),
                },
            )
            done[split] = finish(f"{out}/{split}", entries)
    count, examples = unrendered[UNRENDERED]
    if count:
        log.info(f"{count} pictures did not render and are left out: {', '.join(examples)}")
    return done


def _write_shards(
    folder: str, samples: Iterator[Sample]
) -> tuple[list[dict[str, Any]], dict[str, int], Credits]:
    """Write shards of 1000 rows. Returns their index entries, rows by style, and by licence."""
    begin(folder)
    credits = Credits()
    entries: list[dict[str, Any]] = []
    counts: dict[str, int] = {}
    while batch := list(islice(samples, 1000)):
        for sample in batch:
            credits.add(sample.meta)
            counts[sample.meta["style"]] = counts.get(sample.meta["style"], 0) + 1
        entries.append(write_shard(folder, len(entries), batch))
    return entries, counts, credits


def _rendered(
    pool: ProcessPoolExecutor, pictures: Sequence[SourcePicture], left_out: Iterable[LeftOut]
) -> Iterator[Sample]:
    """The pictures as samples, in order.

    Pictures that do not render are left out and counted in each of `left_out`.
    """
    batches = [
        pictures[start : start + PICTURES_PER_TASK]
        for start in range(0, len(pictures), PICTURES_PER_TASK)
    ]
    tasks = ([one.content for one in batch if isinstance(one.content, str)] for batch in batches)
    for batch, rendered in zip(batches, in_order(pool, render_all, tasks), strict=True):
        images = iter(rendered)
        for picture in batch:
            image = next(images) if isinstance(picture.content, str) else picture.content
            if isinstance(image, bytes):
                yield picture.sample(image)
                continue
            for counts in left_out:
                counts.add(UNRENDERED, f"{picture.key} ({image[:80]})")
