"""Captions: of emoji from their names and keywords, of scenes, and the choice of one per image and epoch."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

PICTURE_KINDS = ("3D render", "flat icon")      # styles that one says "of": "flat icon of a red apple"
NUMBERS = ("no", "one", "two", "three", "four")
PLURALS = {"mouse": "mice", "ox": "oxen", "goose": "geese", "fish": "fish", "sheep": "sheep", "deer": "deer",
           "bison": "bison", "squid": "squid", "shrimp": "shrimp", "blowfish": "blowfish", "moose": "moose",
           "jellyfish": "jellyfish", "wolf": "wolves", "leaf": "leaves", "knife": "knives", "scarf": "scarves",
           "potato": "potatoes", "tomato": "tomatoes", "mango": "mangoes", "mosquito": "mosquitoes",
           "fly": "flies", "cactus": "cacti", "die": "dice", "tooth": "teeth", "foot": "feet"}
WITHOUT_ARTICLE = ("flag", "keycap", "input", "people", "men ", "women ", "mount ", "statue of ", "two ", "mx ",
                   "mrs", "santa ")
MASS = frozenset("bread flatbread rice bacon butter salt honey garlic popcorn spaghetti sushi oden fondue falafel corn "
                 "coral ice water wood fog fire yarn thread dna soap lotion camping cooking bowling lacrosse badminton "
                 "hockey tennis laughing love money music tea "
                 "sake construction landslide".split())


def emoji_captions(name: str, keywords: Sequence[str], style: str) -> list[str]:
    """Several true sentences about one picture: "a red apple, 3D render" first, then other wordings, one without the style."""
    name = name.strip().lower()
    useful = [word for word in (keyword.replace("_", " ").lower() for keyword in keywords) if word not in name][:4]
    thing = with_article(name)
    captions = [f"{thing}, {style}", f"{name} emoji, {style}", in_style(thing, style), thing]
    if useful:
        captions.append(f"{name}, {', '.join(useful)}, {style}")
    return captions


def in_style(thing: str, style: str) -> str:
    """"flat icon of a red apple"; "a red apple in Noto style"."""
    return f"{style} of {thing}" if style in PICTURE_KINDS else f"{thing} in {style} style"


def with_article(name: str) -> str:
    """"a " or "an " before a countable name; nothing before plurals, masses, numbers, flags and other proper names."""
    first, last = re.split(r"[\s-]", name)[0], re.split(r"[ ,]", name)[-1]
    plural = name.endswith("s") and not name.endswith(("ss", "us")) and last not in ("gas", "lens")
    if not name[:1].isalpha() or plural or name.startswith(WITHOUT_ARTICLE) or last in MASS and " of " not in name:
        return name
    vowel = first.startswith(("hour", "x")) or first[0] in "aeiou" and not first.startswith(("uni", "one", "eu", "ewe", "use"))
    return f"{'an' if vowel else 'a'} {name}"


def plural(name: str) -> str:
    """The name of more than one: "star" -> "stars", "palm tree" -> "palm trees", "maple leaf" -> "maple leaves"."""
    first, _, last = name.rpartition(" ")
    if last in PLURALS:
        many = PLURALS[last]
    elif last.endswith(("s", "x", "ch", "sh", "z")):
        many = f"{last}es"
    elif last.endswith("y") and last[-2:-1] not in "aeiou":
        many = f"{last[:-1]}ies"
    else:
        many = f"{last}s"
    return f"{first} {many}".strip()


def choose(captions: Sequence[str], key: str, epoch: int, seed: int, empty_rate: float = 0.0) -> str:
    """One caption of an image for this epoch, or the empty one at `empty_rate` (sec. 4.2): always the same for the same arguments."""
    digest = hashlib.sha256(f"{seed}/{epoch}/{key}".encode()).digest()
    if int.from_bytes(digest[:8], "big") / 2**64 < empty_rate:
        return ""
    return captions[int.from_bytes(digest[8:16], "big") % len(captions)]
