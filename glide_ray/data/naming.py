"""Content of an emoji picture: name, group and keywords, found by its code points or its name.

The sets name their pictures by code points or in their own words; Unicode's table joins them.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SKIN_TONES = {
    "1f3fb": "light",
    "1f3fc": "medium-light",
    "1f3fd": "medium",
    "1f3fe": "medium-dark",
    "1f3ff": "dark",
}
VARIATION_SELECTOR = "fe0f"
# Names in the sets -> Unicode's names, where the variants of `_forms` do not lead there.
RENAMED = {
    "blond-haired-person": "person: blond hair",
    "keycap-pound": "keycap #",
    "man-with-chinese-cap": "person with skullcap",
    "man-in-suit-levitating": "person in suit levitating",
    "laptop-computer": "laptop",
    "exclamation-mark": "red exclamation mark",
    "question-mark": "red question mark",
    "smiling-cat-face-with-heart-eyes": "smiling cat with heart-eyes",
    "up-text-button": "UP! button",
    "up-exclamation-button": "UP! button",
    "on-exclamation-arrow": "ON! arrow",
    "flag-for-macau-sar-china": "flag Macao SAR China",
    "flag-for-macedonia": "flag North Macedonia",
    "flag-for-swaziland": "flag Eswatini",
    "flag-for-turkey": "flag Türkiye",
    "flag-for-heard-and-mcdonald-islands": "flag Heard & McDonald Islands",
    "flag-for-south-georgia-and-south-sandwich-islands": (
        "flag South Georgia & South Sandwich Islands"
    ),
}
_SPOKEN = (
    (r"^(flag|family) (?!in )", r"\1 of "),
    (r"^(\w+) (\w+ hair|beard)$", r"\1 with \2"),
    (r"^(\w+) bald$", r"bald \1"),
    (r"^(kiss|couple with heart) (\w+), (\w+)$", r"\1, \2 and \3"),
)
_TONE = "(medium-light|medium-dark|light|medium|dark)"
_LONG_TONE, _SHORT_TONE = re.compile(f"-{_TONE}-skin-tone"), re.compile(f"-{_TONE}$")


@dataclass(frozen=True)
class Thing:
    """An emoji without skin tone: base form of its code points, name, group and keywords."""

    code: str
    name: str
    group: str
    keywords: tuple[str, ...]


def base_form(code: str) -> str:
    """Code points without skin tones and variation selectors.

    The same for an emoji in all packages and skin tones.
    """
    return "-".join(
        point.zfill(4)
        for point in code.split("-")
        if point not in SKIN_TONES and point != VARIATION_SELECTOR
    )


def tone_of(code: str) -> str:
    """Skin tones among code points: "", "dark", or "light and dark" for two people."""
    return _tones([SKIN_TONES[point] for point in code.split("-") if point in SKIN_TONES])


class Names:
    """Unicode's names of emoji, from `unicode-emoji-json`, with the keywords of `emojilib`."""

    def __init__(self, names: Mapping[str, Any], keywords: Mapping[str, Sequence[str]]):
        self._things: dict[str, Thing] = {}
        self._codes: dict[str, str] = {}
        for emoji, about in names.items():
            code = base_form("-".join(f"{ord(character):04x}" for character in emoji))
            self._things[code] = Thing(
                code,
                _spoken(about["name"]),
                about["group"],
                tuple(" ".join(word.split()) for word in keywords.get(emoji, ())),
            )
            self._codes[_squash(about["name"])] = code
        # The name of the character may differ from the name of the emoji: U+1F4EF is POSTAL HORN
        # and "postal horn", but U+267B is BLACK UNIVERSAL RECYCLING SYMBOL and "recycling symbol".
        for code in self._things:
            if "-" not in code and (name := unicodedata.name(chr(int(code, 16)), "")):
                self._codes.setdefault(_squash(name), code)

    def by_code(self, code: str) -> Thing | None:
        return self._things.get(base_form(code))

    def by_name(
        self,
        names: Iterable[str],
        taken: frozenset[str] = frozenset(),
        renamed: Mapping[str, str] = RENAMED,
    ) -> Thing | None:
        """The emoji meant by one of a picture's names, such as "fox-face" or "flag-for-peru".

        `taken`: squashed names of the set's pictures; a variant of a name must not be one of them.
        `renamed`: Unicode's names for names that the set uses instead. None if no name is known.
        """
        for name in names:
            for number, form in enumerate(_forms(renamed.get(name, name))):
                code = self._codes.get(form)
                if code and (number == 0 or form not in taken):
                    return self._things[code]
        return None


def split_tone(name: str, short: bool = False) -> tuple[str, str]:
    """Split a picture's name from its skin tone: "boy-dark-skin-tone" -> "boy", "dark".

    `short`: the name may also end in the bare tone, like "boy-dark".
    """
    if tones := _LONG_TONE.findall(name):
        return _LONG_TONE.sub("", name), _tones(tones)
    tones = []
    while short and (found := _SHORT_TONE.search(name)):
        name, tones = name[: found.start()], [found[1], *tones]
    return name, _tones(tones)


def squashed(names: Iterable[str]) -> frozenset[str]:
    """Names in the form used for comparison: letters and digits only."""
    return frozenset(map(_squash, names))


def _spoken(name: str) -> str:
    """Unicode's name as used in a sentence: "flag Peru" -> "flag of Peru"."""
    for pattern, spoken in _SPOKEN:
        name = re.sub(pattern, spoken, name)
    return name


def _tones(tones: Sequence[str]) -> str:
    return " and ".join(dict.fromkeys(tones))


def _squash(name: str) -> str:
    """Lower-case letters and digits without accents, "&" and "and"."""
    plain = unicodedata.normalize(
        "NFKD", name.lower().replace("#", "hash").replace("*", "asterisk")
    )
    plain = re.sub(r"\band\b", "", plain.replace("-", " ").replace("_", " "))
    return re.sub(r"[^a-z0-9]", "", plain.encode("ascii", "ignore").decode())


def _forms(name: str) -> list[str]:
    """The squashed name, followed by variants that another set might use."""
    form = _squash(name)
    forms = [
        form,
        form.removesuffix("face"),
        f"{form}face",
        f"{form}button",
        form.removeprefix("heavy"),
        f"person{form}",
    ]
    if form.startswith("flagfor"):
        forms += [f"flag{form.removeprefix('flagfor')}"]
        forms += [form.removeprefix("flagfor")] if form.endswith("flag") else []
    return list(dict.fromkeys(forms))
