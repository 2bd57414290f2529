"""The styles of the emoji corpus: one table of the artists' sets that it is made of.

A style's words stand in the captions of its pictures: "a red apple, flat icon".
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import ConfigError, nearest

MICROSOFT = ("Microsoft Corporation", "https://github.com/microsoft/fluentui-emoji", "MIT")
GOOGLE = ("Google Inc", "https://github.com/googlefonts/noto-emoji", "Apache-2.0")


@dataclass(frozen=True)
class Style:
    """One artist's set of pictures, as an npm package of a pinned version.

    `pictures`: how many that version has, aliases and hidden ones left out. `names_of`: the style
    whose package knows the code points of this one's names, where its own does not.
    """

    words: str
    package: str
    version: str
    pictures: int
    author: str
    url: str
    licence: str
    names_of: str = ""

    @property
    def slug(self) -> str:
        """The words as a part of a key: "flat-icon"."""
        return self.words.lower().replace(" ", "-")

    @property
    def source(self) -> tuple[str, str]:
        """Name and version of the package."""
        return self.package, self.version

    @property
    def is_vector(self) -> bool:
        """Whether the package is an Iconify set of SVG; otherwise it has WebP files."""
        return self.package.startswith("@iconify-json/")


STYLES = {
    style.words: style
    for style in (
        Style("3D render", "@lobehub/fluent-emoji-3d", "1.1.0", 3391, *MICROSOFT),
        Style("flat icon", "@iconify-json/fluent-emoji-flat", "1.2.6", 3139, *MICROSOFT),
        Style(
            "soft gradient",
            "@iconify-json/fluent-emoji",
            "1.2.7",
            3120,
            *MICROSOFT,
            names_of="flat icon",
        ),
        Style("Noto", "@iconify-json/noto", "1.2.9", 3729, *GOOGLE),
        Style("blob", "@iconify-json/noto-v1", "1.2.5", 2162, *GOOGLE),
        Style(
            "Twemoji",
            "@iconify-json/twemoji",
            "1.2.5",
            3988,
            "Twitter",
            "https://github.com/jdecked/twemoji",
            "CC-BY-4.0",
        ),
        Style(
            "Firefox",
            "@iconify-json/fxemoji",
            "1.2.2",
            1034,
            "Mozilla",
            "https://github.com/mozilla/fxemoji",
            "Apache-2.0",
        ),
        Style(
            "EmojiOne",
            "@iconify-json/emojione",
            "1.2.3",
            1834,
            "Emoji One",
            "https://github.com/EmojiTwo/emojitwo",
            "CC-BY-4.0",
        ),
        Style(
            "outline",
            "@iconify-json/openmoji",
            "1.2.29",
            4544,
            "OpenMoji",
            "https://github.com/hfg-gmuend/openmoji",
            "CC-BY-SA-4.0",
        ),
    )
}
# The outline style is left for fine-tuning: its licence asks that what is made from it be shared
# alike.
DEFAULT = tuple(words for words in STYLES if words != "outline")


def choose_styles(words: Iterable[str] = ()) -> tuple[Style, ...]:
    """The styles of these names in the table's order, the default ones where there is none.

    Raises ConfigError for a name that is not in the table.
    """
    known = {name.lower(): name for name in STYLES}
    wanted = [word.strip() for word in words if word.strip()] or DEFAULT
    for word in wanted:
        if word.lower() not in known:
            raise ConfigError(f"There is no style {word!r}; {nearest(word, STYLES)}")
    chosen = {known[word.lower()] for word in wanted}
    return tuple(style for style in STYLES.values() if style.words in chosen)
