"""Self-contained HTML reports: tables, bars, and labelled pictures in groups.

Each report is one file that loads nothing from elsewhere.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jinja2 import Environment
from PIL import Image

from ..data.images import ImageError, decode, encode

SIDE = 112  # default width of a picture on the page, in pixels


@dataclass(frozen=True)
class Picture:
    """A picture with a label. `image`: uint8 (H, W, 3), or None if it cannot be shown."""

    image: np.ndarray | None
    label: str = ""

    @property
    def source(self) -> str | None:
        return (
            None
            if self.image is None
            else "data:image/webp;base64," + base64.b64encode(encode(self.image, "webp")).decode()
        )


@dataclass(frozen=True)
class Section:
    """Content under one heading; a section without any is left out."""

    title: str
    text: str = ""
    table: Sequence[Sequence[str]] = ()  # first row: heading
    bars: Sequence[tuple[str, float]] = ()
    lines: Sequence[str] = ()
    groups: Sequence[Sequence[Picture]] = ()
    width: int = SIDE

    def is_number(self, column: int) -> bool:
        """Whether all cells of a column of the table are whole numbers."""
        cells = [row[column].replace(",", "") for row in self.table[1:]]
        return bool(cells) and all(map(str.isdigit, cells))

    @property
    def longest(self) -> float:
        return max((abs(value) for _, value in self.bars), default=0) or 1


def page(title: str, sections: Sequence[Section]) -> str:
    """The report as HTML."""
    shown = [
        section
        for section in sections
        if section.table or section.bars or section.lines or section.groups
    ]
    return _TEMPLATE.render(title=title, sections=shown)


def thumbnail(data: bytes, side: int = SIDE) -> np.ndarray | None:
    """An image file's bytes as pixels (H, W, 3) that fit into `side` x `side`; None if broken.

    A small image is enlarged by a whole factor, so that its pixels become squares.
    """
    try:
        image = decode(data)
    except ImageError:
        return None
    image.thumbnail((side, side), Image.Resampling.BOX)
    times = side // max(image.size)
    return np.asarray(
        image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    )


def histogram(values: np.ndarray, bins: int = 12) -> list[tuple[str, int]]:
    """Bars (range, count) of whole numbers, at most `bins`; one per value if there are few."""
    values = np.asarray(values)
    values = values[~np.isnan(values.astype(float))]
    if not len(values):
        return []
    different, counts = np.unique(values, return_counts=True)
    if len(different) <= bins:
        return [
            (f"{int(value):,}", int(count)) for value, count in zip(different, counts, strict=True)
        ]
    edges = np.unique(np.linspace(values.min(), values.max() + 1, bins + 1).round().astype(int))
    counts, _ = np.histogram(values, edges)
    return [
        (f"{low:,} to {high - 1:,}", int(count))
        for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True)
    ]


_TEMPLATE = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string("""\
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title><style>
body { font: 14px/1.4 system-ui, sans-serif; color: #222; \
max-width: 1110px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 20px } h2 { font-size: 16px; margin: 2em 0 .4em } \
p { margin: .3em 0 .8em; color: #555 }
table { border-collapse: collapse } td { padding: 1px 10px 1px 0; vertical-align: middle } \
.number, .figures .number { text-align: right; font-variant-numeric: tabular-nums }
.bars td:first-child { min-width: 150px; max-width: 460px; overflow-wrap: anywhere }
.bars .number { min-width: 56px }
.wide { overflow-x: auto } \
.figures th { text-align: left; vertical-align: bottom; font-weight: 600; \
padding: 2px 12px 2px 0 } \
.figures td { padding: 2px 12px 2px 0 } \
.figures td:not(.number) { min-width: 7em } \
.figures td, .figures tr:not(:first-child) th { vertical-align: top }
.bar { background: #4a7fb5; height: 12px; min-width: 1px }
.groups { display: flex; flex-wrap: wrap; gap: 10px } \
.group { display: flex; flex-wrap: wrap; gap: 8px; padding: 6px; \
border: 1px solid #ddd; border-radius: 4px }
figure { margin: 0; overflow-wrap: anywhere; font-size: 11px; color: #555 } \
figure img { display: block; max-width: 100%; margin-bottom: 3px } \
figcaption { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 6; \
overflow: hidden }
.none { height: 60px; display: grid; place-items: center; background: #eee }
</style></head><body><h1>{{ title }}</h1>
{% for section in sections %}
<h2>{{ section.title }}</h2>
{% if section.text %}<p>{{ section.text }}</p>{% endif %}
{% if section.lines %}<ul>\
{% for line in section.lines %}<li>{{ line }}</li>{% endfor %}</ul>{% endif %}
{% if section.table %}<div class="wide"><table class="figures">\
{% for row in section.table %}{% set heading = loop.first %}
<tr>{% for cell in row %}{% set tag = "th" if heading or loop.first else "td" %}\
<{{ tag }}{% if section.is_number(loop.index0) %} class="number"{% endif %}>\
{{ cell }}</{{ tag }}>{% endfor %}</tr>
{% endfor %}</table></div>{% endif %}
{% if section.bars %}<table class="bars">{% for name, value in section.bars %}
<tr><td>{{ name }}</td><td class="number">{{ "{:,}".format(value) }}</td>
<td>{% if value %}<div class="bar" style="width:calc(min(420px, 40vw) * \
{{ (value / section.longest) | round(4) }})"></div>{% endif %}</td></tr>
{% endfor %}</table>{% endif %}
{% if section.groups %}<div class="groups">{% for group in section.groups %}\
<div class="group">{% for picture in group %}
<figure style="width:{{ section.width }}px">{% if picture.source %}\
<img src="{{ picture.source }}" alt="">{% else %}<div class="none">no picture</div>{% endif %}
<figcaption title="{{ picture.label }}">{{ picture.label }}</figcaption></figure>\
{% endfor %}</div>{% endfor %}</div>{% endif %}
{% endfor %}
</body></html>
""")
