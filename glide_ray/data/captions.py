"""Captions of emoji, wording for captions of scenes, and the choice of a caption per epoch."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

# styles that name a kind of picture: "flat icon of a red apple", not "in flat icon style"
OF = ("3D render", "flat icon")
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
# Start of what follows the head noun, which decides whether a name takes an article:
# "ear of corn", "face with horns", "boy, dark skin tone".
AFTER_HEAD = r",| (?:with|without|of|in|on|at|over|behind|showing|facing|holding|lifting) "
# Mass nouns: a name that ends in one takes no "a".
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
AN = ("hour", "x")  # starts of words that take "an" despite their first consonant
NO_AN = ("uni", "one", "eu", "ewe", "use", "uk")  # starts of words that take "a" despite a vowel


def emoji_captions(name: str, keywords: Sequence[str], style: str) -> list[str]:
    """Several true captions of one picture.

    The first is like "a red apple, 3D render". Other wordings follow: one without the style and,
    if there are keywords that the name does not contain, one with up to four of them.
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
    """A thing with its style: "flat icon of a red apple", "a red apple in Noto style"."""
    return f"{style} of {thing}" if style in OF else f"{thing} in {style} style"


def with_article(name: str) -> str:
    """Put "a" or "an" before a countable name.

    No article before plurals, mass nouns, times, numbers, flags and other proper names.
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
    """Plural of a name: "palm tree" -> "palm trees", "maple leaf" -> "maple leaves"."""
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
    """Random caption of an image for this epoch, or "" with probability `empty_rate` (sec. 4.2).

    Deterministic: a hash of `seed`, `epoch` and `key` decides.
    """
    digest = hashlib.sha256(f"{seed}/{epoch}/{key}".encode()).digest()
    if int.from_bytes(digest[:8], "big") / 2**64 < empty_rate:
        return ""
    return captions[int.from_bytes(digest[8:16], "big") % len(captions)]
