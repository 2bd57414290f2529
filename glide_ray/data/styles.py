"""Styles of the emoji corpus: a table of the artists' sets that it is made from.

A style's words appear in the captions of its pictures: "a red apple, flat icon".
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

    `words`: the style in captions. `pictures`: their number in that version, without aliases and
    hidden ones. `names_of`: the style whose package maps this style's names to code points, if its
    own package does not.
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
        """The words in the form used in keys: "flat-icon"."""
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
# The outline style is kept for fine-tuning: its licence demands that derived works are shared under
# the same terms.
DEFAULT = tuple(words for words in STYLES if words != "outline")


def choose_styles(words: Iterable[str] = ()) -> tuple[Style, ...]:
    """The styles with these names, in the order of STYLES; the default ones if there are no names.

    Raises ConfigError for a name that is not in STYLES.
    """
    known = {name.lower(): name for name in STYLES}
    wanted = [word.strip() for word in words if word.strip()] or DEFAULT
    for word in wanted:
        if word.lower() not in known:
            raise ConfigError(f"There is no style {word!r}; {nearest(word, STYLES)}")
    chosen = {known[word.lower()] for word in wanted}
    return tuple(style for style in STYLES.values() if style.words in chosen)
