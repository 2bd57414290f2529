"""Pictures for people: contact sheets, edits, loss curves."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..storage import whole

MARGIN, INK, PAPER, HOLE = 12, (30, 30, 30), (255, 255, 255), (70, 190, 90)


def contact_sheet(images: Sequence[np.ndarray], labels: Sequence[str], columns: int = 4, size: int = 192, title: str = "") -> Image.Image:
    """Images uint8 (H, W, 3) in a grid, each with its label below."""
    font, line = ImageFont.load_default(13), 16
    wrapped = [textwrap.wrap(label, size // 7)[:3] for label in labels]
    label_height = line * max((len(lines) for lines in wrapped), default=1) + 4
    top = MARGIN + (line + MARGIN if title else 0)
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (MARGIN + columns * (size + MARGIN), top + rows * (size + label_height + MARGIN)), PAPER)
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((MARGIN, MARGIN), title, INK, ImageFont.load_default(15))
    for n, (pixels, lines) in enumerate(zip(images, wrapped, strict=True)):
        x, y = MARGIN + n % columns * (size + MARGIN), top + n // columns * (size + label_height + MARGIN)
        sheet.paste(Image.fromarray(pixels).resize((size, size), Image.Resampling.BOX if len(pixels) > size else Image.Resampling.NEAREST), (x, y))
        for k, text in enumerate(lines):
            draw.text((x, y + size + 3 + k * line), text, INK, font)
    return sheet


def show_hole(image: np.ndarray, known_mask: np.ndarray) -> np.ndarray:
    """The image with what is not known in green, as the paper's figure 2 shows it."""
    return np.where(known_mask[..., None], image, np.array(HOLE, np.uint8))


def roc_curve(scores: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """What a classifier drops of the rest over what it catches, as a picture (H, W, 3): scores (N,), 0 at its boundary; truth (N,) bool."""
    pyplot = _pyplot()
    from sklearn.metrics import roc_curve as curve
    false, true, _ = curve(truth, scores)
    figure, axis = pyplot.subplots(figsize=(4.4, 4), layout="constrained")
    axis.plot(false, true, linewidth=1.5)
    axis.plot([(scores[~truth] >= 0).mean()], [(scores[truth] >= 0).mean()], "o", label="at the tuned bias")
    axis.plot([0, 1], [0, 1], ":", color="grey", linewidth=1)
    axis.set(xlabel="share dropped of rows without the content", ylabel="share dropped of rows with it", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right")
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[:, :, :3].copy()
    pyplot.close(figure)
    return pixels


def loss_curves(runs: Mapping[str, Sequence[Mapping]], path: str | Path) -> None:
    """Training and held-out loss over steps, one panel a run, to a PNG. `runs`: name -> metrics as `glide train` writes them."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(1, len(runs), figsize=(5.5 * len(runs), 4), squeeze=False, layout="constrained")
    for axis, (name, metrics) in zip(axes[0], runs.items(), strict=True):
        for key, label, style in (("loss", "training", "-"), ("held_out", "held out", "o-")):
            points = [(row["step"], row[key]) for row in metrics if key in row]
            axis.plot(*zip(*points, strict=True), style, label=label, markersize=4, linewidth=1.2)
        first = next(row["held_out"] for row in metrics if "held_out" in row)
        axis.axhline(first / 3, linestyle=":", color="grey", linewidth=1, label="a third of the first held-out value")
        axis.set(title=name, xlabel="step", ylabel="hybrid loss (log scale)", yscale="log")
        axis.grid(alpha=0.3, which="both")
        axis.legend()
    with whole(path) as partial:
        figure.savefig(partial, dpi=110, format="png")
    pyplot.close(figure)


def _pyplot():
    import matplotlib   # only where curves are drawn
    matplotlib.use("Agg")
    from matplotlib import pyplot
    return pyplot
