"""The font of contact sheets and grids.

Pillow's own font has ASCII and little more. DejaVu Sans, which matplotlib brings, has Latin, Greek,
Cyrillic, Arabic and Hebrew letters, arrows and mathematical signs; Chinese, Japanese and Korean
need a font of the system.
"""

from __future__ import annotations

import unicodedata
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from PIL import ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
DEJAVU = "DejaVuSans.ttf"
# File names that Pillow looks for in the folders of Linux, macOS and Windows, DejaVu's first.
SYSTEM = (
    DEJAVU,
    "NotoSansCJK-Regular.ttc",
    "wqy-zenhei.ttc",
    "Arial Unicode.ttf",
    "msyh.ttc",
    "malgun.ttf",
    "arial.ttf",
)


@lru_cache
def fonts(size: int) -> tuple[Font, ...]:
    """All fonts that are there, in pixels of `size`, Pillow's own last."""
    found: list[Font] = []
    for name in (_of_matplotlib(), *SYSTEM):
        try:
            if name:
                found.append(ImageFont.truetype(name, size))
        except OSError:
            continue
    return (*found, ImageFont.load_default(size))


def font_for(texts: str, size: int) -> Font:
    """The font with the fewest characters of `texts` missing, DejaVu Sans if there is a choice."""
    return min(fonts(size), key=lambda font: len(missing(texts, font)))


def readable(text: str, font: Font) -> str:
    """`text` with a stand-in for every character that `font` lacks, instead of an empty box.

    The letter without its accents if the font has that, else the character's code point.
    """
    lacking = missing(text, font)
    return "".join(_stand_in(c, font) if c in lacking else c for c in text)


def missing(text: str, font: Font) -> set[str]:
    """Characters of `text` that `font` would draw as an empty box."""
    return {c for c in set(text) if not c.isspace() and _glyph(font, c) == _glyph(font, "\uffff")}


def _stand_in(character: str, font: Font) -> str:
    plain = unicodedata.normalize("NFKD", character)
    plain = "".join(c for c in plain if not unicodedata.combining(c))
    if plain and not missing(plain, font):
        return plain
    return f"[{ord(character):X}]"


@lru_cache(maxsize=4096)
def _glyph(font: Font, character: str) -> tuple[tuple[int, int], bytes]:
    drawn = font.getmask(character)
    return drawn.size, bytes(drawn)


def _of_matplotlib() -> str | None:
    spec = find_spec("matplotlib")  # importing it takes a second
    if spec is None or spec.origin is None:
        return None
    return str(Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf" / DEJAVU)
