"""Contents and size of the demo. Tests use smaller numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ...config.sampling import SampleOptions
from ...data.styles import DEFAULT

STYLE = "outline"  # for fine-tuning: the shipped weights have not seen it
THINGS = (
    "a red apple",
    "a red heart",
    "a grinning face",
    "a tangerine",
    "a sunflower",
    "a dog face",
    "a mushroom",
    "a rocket",
)


@dataclass(frozen=True)
class Sketch:
    """A drawing of `figures.DRAWINGS` by name, and the pictures made from it.

    `answers`: (prompt, strength, whether to use the fine-tuned model) of each picture.
    """

    drawing: str
    answers: tuple[tuple[str, float, bool], ...]


@dataclass(frozen=True)
class Plan:
    """Prompts, sampling options and fine-tuning settings of the demo.

    `sheet_options`: sampling of the sheet; `options`: sampling by the server; `settings`: overrides
    for fine-tuning, as `glide train --set` takes them.
    """

    things: tuple[str, ...] = THINGS
    styles: tuple[str, ...] = DEFAULT
    sheet_options: SampleOptions = SampleOptions()

    # Overrides of the shipped base model's preset. 130 steps of 64 images take about three minutes
    # on two cores. A moderate learning rate teaches the style and keeps what the model knows.
    settings: tuple[str, ...] = (
        "steps=130",
        "batch=64",
        "workers=2",
        "zero_stage=2",
        "learning_rate=3e-4",
        "warmup_steps=20",
        "constant_steps=none",
        "ema_rates=0.98",
        "held_out_images=64",
        "cache_gib=0.25",
        "log_every=4",
        "evaluate_every=45",
        "checkpoint_every=90",
        "keep_last=1",
        "sample_every=none",
        "trackers=",
    )

    options: SampleOptions = SampleOptions()
    pairs: tuple[str, ...] = tuple(f"{thing}, {STYLE}" for thing in THINGS)
    # (prompt, seed) of the picture, and of the edit that inpaints its right half.
    edit: tuple[tuple[str, int], tuple[str, int]] = (
        ("a red apple, 3D render", 4),
        ("a green apple, 3D render", 3),
    )
    sketches: tuple[Sketch, ...] = (
        Sketch(
            "mushroom",
            (
                ("a mushroom, flat icon", 0.7, False),
                ("a mushroom, 3D render", 0.8, False),
                (f"a mushroom, {STYLE}", 0.8, True),
            ),
        ),
        Sketch(
            "fish",
            (
                ("a tropical fish, flat icon", 0.7, False),
                ("a tropical fish, 3D render", 0.8, False),
                (f"a tropical fish, {STYLE}", 0.8, True),
            ),
        ),
    )
    scene: tuple[str, ...] = (
        "a red apple, flat icon",
        "a red heart, flat icon",
        "a grinning face, flat icon",
        "a tangerine, flat icon",
    )

    @property
    def requests(self) -> int:
        """Number of pictures requested from the server."""
        answers = sum(len(sketch.answers) for sketch in self.sketches)
        return 2 * len(self.pairs) + 2 + answers + len(self.scene)

    def asked(self) -> dict[str, Any]:
        """Everything that the server's answers depend on, except the models."""
        return {
            "options": self.options.model_dump(),
            "pairs": self.pairs,
            "edit": self.edit,
            "sketches": [asdict(sketch) for sketch in self.sketches],
            "scene": self.scene,
        }
