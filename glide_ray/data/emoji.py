"""The default corpus: emoji of several artists, published as npm packages, with captions from their names and keywords.

The pictures stay in the packages: the user's own npm fetches them, and the shards are written from there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

from ..config import ConfigError
from ..storage import cache_folder, check_writable, is_remote
from .captions import emoji_captions
from .card import LeftOut, read_card, sources, write_card
from .firefox import FIREFOX
from .naming import RENAMED, Names, Thing, base_form, split_tone, squashed, tone_of
from .packages import EmojiError, Package, fetch_packages, find_packages
from .render import in_order, process_pool, render_all, svg_of
from .scenes import write_scenes
from .shards import Sample, begin, finish, read_index, write_shard
from .splits import SCENE_SPLITS, SPLITS, held_out_pairs, is_held_out, share
from .styles import STYLES, Style, choose_styles

NAMES, KEYWORDS = ("unicode-emoji-json", "0.9.0"), ("emojilib", "4.0.3")
AT_ONCE = 16        # pictures a task
UNNAMED, UNRENDERED = "no Unicode name", "did not render"
Report = Callable[[str], None]


def build(out: str | Path, cache: str | Path | None = None, report: Report = lambda line: None, styles: Iterable[str] = (),
          packages: str | Path | None = None, scenes: int = 0) -> dict[str, dict[str, Any]]:
    """Write a folder of shards for each of SPLITS under `out`, local or s3://, and with `scenes` of SCENE_SPLITS, unless they are there.

    `styles`: names of STYLES, the default ones where there is none. `packages`: a folder of npm tarballs, instead of npm.
    Returns the index of each split. Raises EmojiError, and ConfigError where `out` has a corpus of other styles or scenes.
    """
    out, chosen = str(out).rstrip("/"), choose_styles(styles)
    done = {split: index for split in (*SPLITS, *SCENE_SPLITS) if (index := read_index(f"{out}/{split}"))}
    _refuse_other(out, done, chosen, scenes)
    if any(split not in done for split in SPLITS):
        check_writable(out)
        cache = cache or (cache_folder() / "emoji" if is_remote(out) else f"{out}/.packages")
        done |= _write_pictures(out, chosen, cache, packages, [split for split in SPLITS if split not in done], report)
    if scenes and any(split not in done for split in SCENE_SPLITS):
        done |= write_scenes(out, scenes, report)
    return done


def _refuse_other(out: str, done: Iterable[str], styles: Sequence[Style], scenes: int) -> None:
    """Raise ConfigError where what is there was made with other options."""
    wanted = [style.words for style in styles]
    for split in done:
        card = read_card(f"{out}/{split}") or {}
        if card.get("styles") != wanted:
            there = ", ".join(card["styles"]) if card.get("styles") else "of an earlier version"
            raise ConfigError(f"{out} already has a corpus of other styles ({there}); give another folder with --out, the same --styles, "
                              "or remove that one first.")
        if scenes and split in SCENE_SPLITS and card.get("scenes") != scenes:
            raise ConfigError(f"{out} already has {card.get('scenes')} scenes and --scenes asks for {scenes}; remove {out}/{SCENE_SPLITS[0]} "
                              f"and {out}/{SCENE_SPLITS[1]} first, or give another folder with --out.")


# -- what is known of them, as rules over a Candidate (`filters.py`): true for what has the content ---------------------

WEAPONS = {"1f3f9": "bow and arrow", "1f4a3": "bomb", "1f52a": "kitchen knife", "1f52b": "water pistol", "1f531": "trident emblem",
           "1f5e1": "dagger", "1f6e1": "shield", "1f93a": "person fencing", "1f9e8": "firecracker", "1fa83": "boomerang", "1fa93": "axe",
           "2694": "crossed swords"}     # those that emojilib calls weapons, and what bursts, shoots or cuts beside them


def shows_people(candidate) -> bool:
    """Unicode's group: people of every profession and tone, hands, and parts of the body down to a bone."""
    return candidate.meta.get("group") == "People & Body"


def shows_weapon(candidate) -> bool:
    """A weapon, alone or among the objects of a scene."""
    objects = candidate.meta.get("objects") or ()
    return any(code in WEAPONS for code in (candidate.meta.get("emoji"), *(one.get("emoji") for one in objects)))


# -- pictures ---------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Picture:
    """One picture of a set before it is rendered: its SVG, or the bytes of a WebP."""

    key: str
    style: Style
    version: str
    thing: Thing
    tone: str
    content: str | bytes

    def sample(self, image: bytes) -> Sample:
        """With its image, captions and what is known of it."""
        name = self.thing.name + (f", {self.tone} skin tone" if self.tone else "")
        meta = {"emoji": self.thing.code, "name": self.thing.name, "group": self.thing.group, "style": self.style.words,
                "author": self.style.author, "licence": self.style.licence, "source": f"{self.style.package}@{self.version}"}
        return Sample(self.key, image, "webp", tuple(emoji_captions(name, self.thing.keywords, self.style.words)),
                      meta | ({"tone": self.tone} if self.tone else {}))


def _write_pictures(out: str, styles: Sequence[Style], cache: str | Path, folder: str | Path | None, missing: Sequence[str],
                    report: Report) -> dict[str, dict[str, Any]]:
    """Render and write the splits that are missing. Returns their indices."""
    if find_spec("resvg_py") is None and any(style.package.startswith("@iconify") for style in styles):
        raise EmojiError("resvg-py, which renders the emoji, is not installed; run `pip install resvg-py`.")
    wanted = list(dict.fromkeys([*(style.source for style in styles), *(STYLES[style.names_of].source for style in styles if style.names_of),
                                 NAMES, KEYWORDS]))
    found = {package.name: package for package in (find_packages(folder, wanted) if folder else fetch_packages(cache, wanted, report))}
    left_out = LeftOut()
    pictures = list(read_pictures(styles, found, left_out, report))
    split_of = assign_splits(pictures)
    versions = {package.name: package.version for package in found.values()}
    done, unrendered = {}, LeftOut()
    with process_pool() as pool:
        for split in missing:
            # In the order of a hash: training reads shards in their order, and must not see one set first and then the other.
            chosen = sorted((picture for picture in pictures if split_of[picture.key] == split), key=lambda picture: share(picture.key))
            report(f"rendering {len(chosen):,} pictures for {split}")
            of_split = left_out.copy()
            done[split] = _write_split(f"{out}/{split}", split, styles, versions, _rendered(pool, chosen, (of_split, unrendered)), of_split)
    count, examples = unrendered[UNRENDERED]
    if count:
        report(f"{count} pictures did not render and are left out: {', '.join(examples)}")
    return done


def _write_split(folder: str, split: str, styles: Sequence[Style], versions: Mapping[str, str], samples: Iterator[Sample], left_out: LeftOut
                 ) -> dict[str, Any]:
    """Write the shards, the card and then the index of one split. Returns the index."""
    begin(folder)
    entries, counts = [], dict.fromkeys((style.words for style in styles), 0)
    while batch := list(islice(samples, 1000)):
        for sample in batch:
            counts[sample.meta["style"]] += 1
        entries.append(write_shard(folder, len(entries), batch))
    write_card(folder, {"about": "Emoji pictures with captions; each row's json names its author, licence and source.", "split": split,
                        "styles": [style.words for style in styles], "sources": sources(styles, versions, counts),
                        "rows": sum(counts.values()), "left_out": left_out.as_json()})
    return finish(folder, entries)


def _rendered(pool: ProcessPoolExecutor, pictures: Sequence[Picture], left_out: Iterable[LeftOut]) -> Iterator[Sample]:
    """The pictures as samples, in their order; one that does not render is left out, and counted in each of `left_out`."""
    batches = [pictures[start:start + AT_ONCE] for start in range(0, len(pictures), AT_ONCE)]
    tasks = ([picture.content for picture in batch if isinstance(picture.content, str)] for batch in batches)
    for batch, made in zip(batches, in_order(pool, render_all, tasks), strict=True):
        images = iter(made)
        for picture in batch:
            image = next(images) if isinstance(picture.content, str) else picture.content
            if isinstance(image, bytes):
                yield picture.sample(image)
            else:
                for counts in left_out:
                    counts.add(UNRENDERED, f"{picture.key} ({image[:80]})")


def assign_splits(pictures: Iterable[Picture]) -> dict[str, str]:
    """Key -> split of each picture. Skin tones go where their thing goes, those of `train` into `tones`."""
    pictures = list(pictures)
    styles: dict[str, dict[str, None]] = {}
    for picture in pictures:
        if not picture.tone:
            styles.setdefault(picture.thing.code, {})[picture.style.words] = None
    held_out = {code: held_out_pairs(code, list(of)) for code, of in styles.items()}
    return {picture.key: "held_out" if is_held_out(picture.thing.code)
            else "held_out_pairs" if picture.style.words in held_out.get(picture.thing.code, ())
            else "tones" if picture.tone else "train" for picture in pictures}


# -- sets -------------------------------------------------------------------------------------------------------------

def read_pictures(styles: Iterable[Style], packages: Mapping[str, Package], left_out: LeftOut, report: Report) -> Iterator[Picture]:
    """Every picture of the sets that Unicode names, once each; what is left out is counted."""
    names = Names(packages[NAMES[0]].json("data-by-emoji.json"), packages[KEYWORDS[0]].json("emoji-en-US.json"))
    for style in styles:
        package = packages[style.package]
        codes_of = packages[STYLES[style.names_of].package] if style.names_of else package
        read = _icons(style, package, codes_of, names, left_out) if style.package.startswith("@iconify") else _files(style, package, names, left_out)
        found = list(read)
        if package.version != style.version:
            report(f"{style.package} is version {package.version}, not {style.version}: {len(found):,} pictures with names "
                   f"of the {style.pictures:,} that there are in the other.")
        seen: set[tuple[str, str]] = set()
        for picture in found:
            if (what := (picture.thing.code, picture.tone)) in seen:
                left_out.add("a second picture of the same thing", picture.key)
            else:
                seen.add(what)
                yield picture


def _files(style: Style, package: Package, names: Names, left_out: LeftOut) -> Iterator[Picture]:
    """Pictures of a package of WebP files that are called by their code points."""
    for file, image in package.files(re.compile(r"package/assets/[^/]+\.webp")):
        code = Path(file).stem.replace("_", "-").lower()    # the tags of a region's flag are joined by _
        key = f"{style.slug}-{code}"
        if thing := names.by_code(code):
            yield Picture(key, style, package.version, thing, tone_of(code), image)
        else:
            left_out.add(UNNAMED, key)


def _icons(style: Style, package: Package, codes_of: Package, names: Names, left_out: LeftOut) -> Iterator[Picture]:
    """Pictures of an Iconify set. `codes_of`: the package that has the code points of its names."""
    icons = package.json("icons.json")
    codes, others = _codes(codes_of), _aliases(icons)
    taken, renamed = squashed(icons["icons"]), FIREFOX if style.words == "Firefox" else RENAMED
    for name, icon in icons["icons"].items():
        key = f"{style.slug}-{name}"
        if icon.get("hidden"):
            left_out.add("hidden by the set's maker", key)
            continue
        bare, tone = split_tone(name, short=style.package.startswith("@iconify-json/fluent"))
        thing = next(filter(None, map(names.by_code, codes.get(name, ()))), None)
        if thing is not None:
            tone = next(filter(None, map(tone_of, codes[name])), "")
        elif thing := names.by_name([name, *others.get(name, ())], taken, renamed):
            tone = ""       # what looks like one belongs to the name: "police-car-light"
        else:
            thing = names.by_name([bare], taken, renamed)
        if thing is None:
            left_out.add(UNNAMED, key)
            continue
        yield Picture(key, style, package.version, thing, tone, svg_of(icon, icons))
    for name in icons.get("aliases", {}):
        left_out.add("another name of a picture", f"{style.slug}-{name}")


def _codes(package: Package) -> dict[str, list[str]]:
    """Name of a picture -> the code points that it stands for."""
    codes: dict[str, list[str]] = {}
    for code, name in package.json("chars.json").items():
        codes.setdefault(name, []).append(code)
    return codes


def _aliases(icons: Mapping[str, Any]) -> dict[str, list[str]]:
    """Name of a picture -> its other names; a mirrored or turned one is another picture."""
    others: dict[str, list[str]] = {}
    for name, alias in icons.get("aliases", {}).items():
        if alias.keys() == {"parent"}:
            others.setdefault(alias["parent"], []).append(name)
    return others
