"""Captions of emoji and of scenes, and the choice of one per image and epoch."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

OF = ("3D render", "flat icon")  # styles that are kinds of pictures: "flat icon of a red apple"
NUMBERS = ("no", "one", "two", "three", "four")
PLURALS = {
    "mouse": "mice",
    "ox": "oxen",
    "goose": "geese",
    "fish": "fish",
    "sheep": "sheep",
    "deer": "deer",
    "bison": "bison",
    "squid": "squid",
    "shrimp": "shrimp",
    "blowfish": "blowfish",
    "moose": "moose",
    "jellyfish": "jellyfish",
    "wolf": "wolves",
    "leaf": "leaves",
    "knife": "knives",
    "scarf": "scarves",
    "potato": "potatoes",
    "tomato": "tomatoes",
    "mango": "mangoes",
    "mosquito": "mosquitoes",
    "cactus": "cacti",
    "die": "dice",
    "tooth": "teeth",
    "foot": "feet",
}
WITHOUT_ARTICLE = (
    "flag of ",
    "keycap",
    "input",
    "people",
    "men ",
    "women ",
    "mount ",
    "statue of ",
    "two ",
    "no ",
    "mx ",
    "mrs",
    "santa ",
)
# What follows the word that decides: "ear of corn", "face with horns", "boy, dark skin tone".
AFTER_HEAD = r",| (?:with|without|of|in|on|at|over|behind|showing|facing|holding|lifting) "
# Last words of names that one says no "a" before.
MASS = frozenset(
    [
        "bread",
        "flatbread",
        "rice",
        "bacon",
        "butter",
        "salt",
        "honey",
        "garlic",
        "popcorn",
        "spaghetti",
        "sushi",
        "oden",
        "fondue",
        "falafel",
        "corn",
        "coral",
        "ice",
        "water",
        "wood",
        "fog",
        "fire",
        "yarn",
        "thread",
        "dna",
        "soap",
        "lotion",
        "camping",
        "cooking",
        "bowling",
        "lacrosse",
        "badminton",
        "hockey",
        "tennis",
        "laughing",
        "love",
        "money",
        "music",
        "tea",
        "sake",
        "construction",
        "landslide",
    ]
)
AN = ("hour", "x")  # beginnings of words before which it is "an", though they begin with no vowel
NO_AN = ("uni", "one", "eu", "ewe", "use", "uk")  # and the other way round


def emoji_captions(name: str, keywords: Sequence[str], style: str) -> list[str]:
    """Several true sentences about one picture.

    "a red apple, 3D render" first, then other wordings, one of them without the style.
    """
    name = name.strip().lower()
    words = [keyword.replace("_", " ").lower() for keyword in keywords]
    useful = [word for word in words if word not in name][:4]
    thing = with_article(name)
    captions = [f"{thing}, {style}", f"{name} emoji, {style}", in_style(thing, style), thing]
    if useful:
        captions.append(f"{name}, {', '.join(useful)}, {style}")
    return captions


def in_style(thing: str, style: str) -> str:
    """ "flat icon of a red apple"; "a red apple in Noto style"."""
    return f"{style} of {thing}" if style in OF else f"{thing} in {style} style"


def with_article(name: str) -> str:
    """ "a " or "an " before a countable name.

    Nothing before plurals, masses, numbers, flags and other proper names.
    """
    first, head = re.split(r"[\s-]", name)[0], re.split(AFTER_HEAD, name)[0]
    is_plural = head.endswith("s") and not head.endswith(("ss", "us", "gas", "lens", "rhinoceros"))
    is_mass = head.split(" ")[-1] in MASS
    is_time = head.endswith(("o’clock", "-thirty"))
    proper = not name[:1].isalpha() or name.startswith(WITHOUT_ARTICLE)
    if is_plural or is_mass or is_time or proper:
        return name
    vowel = first.startswith(AN) or first[0] in "aeiou" and not first.startswith(NO_AN)
    return f"{'an' if vowel else 'a'} {name}"


def plural(name: str) -> str:
    """The name of more than one: "palm tree" -> "palm trees", "maple leaf" -> "maple leaves"."""
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


def choose(
    captions: Sequence[str], key: str, epoch: int, seed: int, empty_rate: float = 0.0
) -> str:
    """One caption of an image for this epoch, or the empty one at `empty_rate` (sec. 4.2).

    Always the same for the same arguments.
    """
    digest = hashlib.sha256(f"{seed}/{epoch}/{key}".encode()).digest()
    if int.from_bytes(digest[:8], "big") / 2**64 < empty_rate:
        return ""
    return captions[int.from_bytes(digest[8:16], "big") % len(captions)]
