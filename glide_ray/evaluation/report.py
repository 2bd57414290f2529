"""Pictures and tables for people: contact sheets, grids, curves, metric plots, text tables."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ..storage import atomic_write
from .fonts import font_for, readable

UNGUIDED = "classifier-free guidance", 1.0  # guidance scale 1
MARGIN, INK, PAPER, HOLE = 12, (30, 30, 30), (255, 255, 255), (70, 190, 90)
TEXT, TITLE = 12, 14  # pixels of the font


def on_square(image: np.ndarray) -> np.ndarray:
    """The image uint8 (H, W, 3), centred on a white square."""
    side = max(image.shape[:2])
    canvas = np.full((side, side, 3), 255, np.uint8)
    top, left = (side - image.shape[0]) // 2, (side - image.shape[1]) // 2
    canvas[top : top + image.shape[0], left : left + image.shape[1]] = image
    return canvas


def contact_sheet(
    images: Sequence[np.ndarray],
    labels: Sequence[str],
    columns: int = 4,
    size: int = 192,
    title: str = "",
) -> Image.Image:
    """Images uint8 (H, W, 3) in a grid, each with its label below."""
    font, line = font_for("".join(labels), TEXT), 16
    wrapped = [textwrap.wrap(readable(label, font), size // 7)[:3] for label in labels]
    label_height = line * max((len(lines) for lines in wrapped), default=1) + 4
    top = MARGIN + (line + MARGIN if title else 0)
    rows = -(-len(images) // columns)
    sheet = Image.new(
        "RGB",
        (MARGIN + columns * (size + MARGIN), top + rows * (size + label_height + MARGIN)),
        PAPER,
    )
    draw = ImageDraw.Draw(sheet)
    if title:
        large = font_for(title, TITLE)
        draw.text((MARGIN, MARGIN), readable(title, large), INK, large)
    for n, (pixels, lines) in enumerate(zip(images, wrapped, strict=True)):
        x, y = (
            MARGIN + n % columns * (size + MARGIN),
            top + n // columns * (size + label_height + MARGIN),
        )
        sheet.paste(scaled(pixels, size), (x, y))
        for k, text in enumerate(lines):
            draw.text((x, y + size + 3 + k * line), text, INK, font)
    return sheet


def grid(
    rows: Sequence[Sequence[np.ndarray]],
    columns: Sequence[str],
    names: Sequence[str],
    size: int = 128,
) -> Image.Image:
    """A table of images uint8 (H, W, 3): row names on the left, column names above."""
    font, line = font_for("".join([*columns, *names]), TEXT), 16
    wrapped = [textwrap.wrap(readable(column, font), size // 7)[:3] for column in columns]
    names = [readable(name, font) for name in names]
    left, top = (
        2 * MARGIN + round(max(map(font.getlength, names))),
        MARGIN + line * max(map(len, wrapped)) + 4,
    )
    sheet = Image.new(
        "RGB", (left + len(columns) * (size + MARGIN), top + len(rows) * (size + MARGIN)), PAPER
    )
    draw = ImageDraw.Draw(sheet)
    for n, lines in enumerate(wrapped):
        draw.text((left + n * (size + MARGIN), MARGIN), "\n".join(lines), INK, font)
    for k, (images, name) in enumerate(zip(rows, names, strict=True)):
        y = top + k * (size + MARGIN)
        draw.text((MARGIN, y + size // 2), name, INK, font, anchor="lm")
        for n, pixels in enumerate(images):
            sheet.paste(scaled(pixels, size), (left + n * (size + MARGIN), y))
    return sheet


def stairs(images: Sequence[np.ndarray], labels: Sequence[str], height: int = 160) -> Image.Image:
    """Images uint8 (H, W, 3) in a column, `height` pixels high, each with its label below."""
    font, line = font_for("".join(labels), TEXT), 16
    labels = [readable(label, font) for label in labels]
    shown = [Image.fromarray(pixels) for pixels in images]
    shown = [
        image.resize((round(image.width * height / image.height), height), Image.Resampling.BOX)
        for image in shown
    ]
    widths = [*(image.width for image in shown), *map(font.getlength, labels)]
    step = height + line + 2 * MARGIN
    sheet = Image.new("RGB", (round(max(widths)) + 2 * MARGIN, MARGIN + step * len(shown)), PAPER)
    for n, (image, label) in enumerate(zip(shown, labels, strict=True)):
        y = MARGIN + n * step
        sheet.paste(image, (MARGIN, y))
        ImageDraw.Draw(sheet).text((MARGIN, y + height + 3), label, INK, font)
    return sheet


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """A text table for a terminal: first column left-aligned, the others right-aligned."""
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
            ]
        )
        for row in rows
    )


def number(value: float | None) -> str:
    """A figure as shown in tables; empty for None."""
    return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def scaled(pixels: np.ndarray, size: int) -> Image.Image:
    """A square picture at another size; if enlarged, its pixels become squares."""
    return Image.fromarray(pixels).resize(
        (size, size), Image.Resampling.BOX if len(pixels) > size else Image.Resampling.NEAREST
    )


def show_hole(image: np.ndarray, known_mask: np.ndarray) -> np.ndarray:
    """The image with unknown pixels in green, as in the paper's figure 2."""
    return np.where(known_mask[..., None], image, np.array(HOLE, np.uint8))


def roc_curve(scores: np.ndarray, truth: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """ROC curve of a classifier that drops rows of a data set, as a picture (H, W, 3).

    `scores` (N,): decision boundary at 0. `truth` (N,) bool: rows that have the content to drop.
    `counts` (N,): rows of the data set that each of them stands for.
    """
    pyplot = _pyplot()
    from sklearn.metrics import roc_curve as curve

    false, true, _ = curve(truth, scores, sample_weight=counts)
    figure, axis = pyplot.subplots(figsize=(4.4, 4), layout="constrained")
    axis.plot(false, true, linewidth=1.5)
    axis.plot(
        [np.average(scores[~truth] >= 0, weights=counts[~truth])],
        [np.average(scores[truth] >= 0, weights=counts[truth])],
        "o",
        label="at the tuned bias",
    )
    axis.plot([0, 1], [0, 1], ":", color="grey", linewidth=1)
    axis.set(
        xlabel="share dropped of rows without the content",
        ylabel="share dropped of rows with it",
        xlim=(-0.02, 1.02),
        ylim=(-0.02, 1.02),
    )
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right")
    return _pixels(figure)


@dataclass(frozen=True)
class Point:
    """A set of pictures in the plots.

    `figures`: its metrics by name, and `model`, `guidance_scale` and `clip_scale` where known.
    """

    name: str
    figures: Mapping[str, Any]

    @property
    def guidance(self) -> tuple[str, float] | None:
        """Kind and scale of guidance; None if unknown."""
        if clip := self.figures.get("clip_scale"):
            return "CLIP guidance", clip
        scale = self.figures.get("guidance_scale")
        return None if scale is None else (UNGUIDED[0], scale)


def fronts(points: Sequence[Point], inception: bool, network: str = "CLIP") -> np.ndarray:
    """Figure 6 as a picture (H, W, 3), with a line for each model and kind of guidance.

    Panels: FID over IS, precision over recall, CLIP score over FID. Each of a model's lines starts
    at its unguided set. `inception`: whether the metrics are FID and IS, or the same measures on
    features of another `network`.
    """
    pyplot = _pyplot()
    fid, score = f"Fréchet distance ({network})", f"exp. of mutual information ({network})"
    if inception:
        fid, score = "FID", "IS"
    panels = (
        ("inception_score", score, "frechet_distance", fid),
        ("recall", "recall", "precision", "precision"),
        ("frechet_distance", fid, "clip_score", "CLIP score"),
    )
    figure, axes = pyplot.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    for axis, (across, across_label, up, up_label) in zip(axes, panels, strict=True):
        there = [
            point for point in points if None not in (point.figures[across], point.figures[up])
        ]
        _plot_points(axis, there, across, up)
        axis.set(xlabel=across_label, ylabel=up_label)
        axis.grid(alpha=0.3)
    axes[1].legend()  # the panel in which every set has a point
    return _pixels(figure)


def _plot_points(axis, points: Sequence[Point], across: str, up: str) -> None:
    """Plot the figure `up` over `across`: lines of guided sets, squares for all other sets."""
    for kind, line in _lines(points).items():
        axis.plot(
            [point.figures[across] for point in line],
            [point.figures[up] for point in line],
            "o-",
            label=kind,
            markersize=4,
            linewidth=1.3,
        )
    for point in points:
        place = point.figures[across], point.figures[up]
        if point.guidance is None:
            axis.plot([place[0]], [place[1]], "s", label=point.name, markersize=5)
        axis.annotate(
            f"{point.guidance[1]:g}" if point.guidance else "",
            place,
            textcoords="offset points",
            xytext=(4, 4),
            fontsize=8,
            color="grey",
        )


def _lines(points: Sequence[Point]) -> dict[str, list[Point]]:
    """Points of each model and kind of guidance, in the order of their scales."""
    guided = [(point.guidance, point) for point in points if point.guidance]
    models = list(dict.fromkeys(point.figures.get("model", "") for _, point in guided))
    lines: dict[str, list[Point]] = {}
    for model in models:
        own = [pair for pair in guided if pair[1].figures.get("model", "") == model]
        unguided = [point for guidance, point in own if guidance == UNGUIDED]
        rest = [pair for pair in own if pair[0] != UNGUIDED]
        for kind in sorted({guidance[0] for guidance, _ in rest}) or [UNGUIDED[0]]:
            of_kind = [pair for pair in rest if pair[0][0] == kind]
            line = [point for _, point in sorted(of_kind, key=lambda pair: pair[0][1])]
            lines[f"{kind}, {model}" if len(models) > 1 else kind] = unguided + line
    return lines


def loss_curves(runs: Mapping[str, Sequence[Mapping]], path: str | Path) -> None:
    """Plot training and held-out loss over steps to a PNG, one panel per run.

    `runs`: name -> metrics as written by `glide train`.
    """
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(
        1, len(runs), figsize=(5.5 * len(runs), 4), squeeze=False, layout="constrained"
    )
    for axis, (name, metrics) in zip(axes[0], runs.items(), strict=True):
        for key, label, style in (("loss", "training", "-"), ("held_out", "held out", "o-")):
            points = [(row["step"], row[key]) for row in metrics if key in row]
            axis.plot(*zip(*points, strict=True), style, label=label, markersize=4, linewidth=1.2)
        values = [row[key] for row in metrics for key in ("loss", "held_out") if key in row]
        scale = "log" if max(values) > 10 * min(values) > 0 else "linear"
        axis.set(title=name, xlabel="step", ylabel="hybrid loss", yscale=scale)
        axis.grid(alpha=0.3, which="both")
        axis.legend()
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=110, format="png")
    pyplot.close(figure)


def _pixels(figure) -> np.ndarray:
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[:, :, :3].copy()
    _pyplot().close(figure)
    return pixels


def _pyplot():
    import matplotlib  # imported only for plotting

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
