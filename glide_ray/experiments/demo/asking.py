"""Third stage of the demo: both models on Ray Serve, called through the OpenAI Images API."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from ... import storage
from ...config.sampling import SampleOptions
from ...config.serving import Scale, ServeConfig, ServedModel
from ...data.images import decode, encode
from ...distributed.cluster import connect
from ...errors import UserError
from ...evaluation.report import show_hole
from ...precision import fastest_precision
from ...pretrained.shipped import Pair
from ...progress import bar
from .figures import (
    BEFORE_AFTER,
    EDIT,
    SCENE,
    SKETCH,
    draw_edit,
    draw_pairs,
    draw_scene,
    draw_sketch,
    draw_sketches,
)
from .plan import Plan
from .results import Result
from .sheet import file_name

CONCURRENT_REQUESTS, ANSWER_SECONDS = 4, 600  # requests in flight, client timeout in seconds
HALF_A_CPU = Scale(cpus=0.5)  # logical CPUs, so that four stages and the ingress fit together


def ask(out: Path, plan: Plan, pair: Pair, tuned: Path, name: str) -> Result:
    """Serve the shipped pair, and the weights `tuned` as model `name`, and request pictures.

    Writes each picture, and BEFORE_AFTER, EDIT, SKETCH and SCENE. Raises UserError if the server
    refuses a request or changes a known pixel.
    """
    from ...bench.load_generator import free_port
    from ...serving.deployment import cpus, serving

    stages = {
        "base_scale": HALF_A_CPU,
        "upsampler_scale": HALF_A_CPU,
        "upsampler": str(pair.upsampler),
    }
    config = ServeConfig(
        base=str(pair.base),
        **stages,
        port=free_port(),
        precision=fastest_precision(),
        more_models={name: ServedModel(base=str(tuned), **stages)},
    )
    connect(cpus(config))
    with (
        serving(config) as url,
        httpx.Client(base_url=url, timeout=ANSWER_SECONDS) as http,
        bar("  pictures", "picture", plan.requests) as progress,
    ):
        models = http.get("/v1/models").json()["data"]
        client = Client(http, out, plan.options, progress.update)
        result = {
            "models": models,
            "pairs": _pairs(client, plan, name),
            "edit": _edit(client, plan),
            "sketches": _sketches(client, plan, name),
            "scene": _scene(client, plan),
        }
    return {**result, "files": [BEFORE_AFTER, EDIT, SKETCH, SCENE, *client.written]}


class Client:
    """Requests pictures and writes each on arrival; its PNG carries its recipe."""

    def __init__(
        self, http: httpx.Client, out: Path, options: SampleOptions, on_picture: Callable[[], Any]
    ):
        fields = options.model_dump(exclude_defaults=True, exclude_none=True)
        self._http, self._on_picture, self._options = http, on_picture, fields
        self.out = out
        self.written: list[str] = []

    def generate(self, name: str, prompt: str, seed: int, model: str | None = None) -> np.ndarray:
        """Generate a picture (S, S, 3) uint8 and write it as `name`. Raises UserError."""
        fields = {"prompt": prompt, "seed": seed, "model": model, **self._options}
        return self._picture(name, self._http.post("/v1/images/generations", json=fields))

    def edit(
        self, name: str, image: np.ndarray, known: np.ndarray, prompt: str, seed: int
    ) -> np.ndarray:
        """Inpaint `image` (S, S, 3) where `known` (S, S) is false.

        Raises UserError if a known pixel comes back changed.
        """
        files = {
            "image": ("image.png", encode(image), "image/png"),
            "mask": ("mask.png", mask_png(known), "image/png"),
        }
        edited = self._from_image("edits", name, files, {"prompt": prompt, "seed": seed})
        if not np.array_equal(edited[known], image[known]):
            raise UserError(
                f"The edit {name!r} changed pixels that were to be kept; please report "
                f"this with {self.out / self.written[-1]}."
            )
        return edited

    def vary(
        self,
        name: str,
        image: np.ndarray,
        prompt: str,
        seed: int,
        strength: float,
        model: str | None = None,
    ) -> np.ndarray:
        """Denoise a picture from `image` (S, S, 3) plus noise, as SDEdit does."""
        fields = {
            "prompt": prompt,
            "seed": seed,
            "strength": strength,
            **({"model": model} if model else {}),
        }
        files = {"image": ("image.png", encode(image), "image/png")}
        return self._from_image("variations", name, files, fields)

    def keep(self, name: str, image: np.ndarray) -> str:
        """Write a picture (H, W, 3) that is not from the server. Returns its relative path."""
        return self._write(name, encode(image))

    def _from_image(
        self, route: str, name: str, files: Mapping[str, Any], fields: Mapping[str, Any]
    ) -> np.ndarray:
        form = {key: str(value) for key, value in {**fields, **self._options}.items()}
        answer = self._http.post(f"/v1/images/{route}", data=form, files=files)
        return self._picture(name, answer)

    def _picture(self, name: str, answer: httpx.Response) -> np.ndarray:
        if answer.status_code != 200:
            raise UserError(
                f"The server answered {answer.status_code}: {answer.json()['error']['message']}"
            )
        png = base64.b64decode(answer.json()["data"][0]["b64_json"])
        self._write(name, png)
        self._on_picture()
        return np.asarray(decode(png))

    def _write(self, name: str, png: bytes) -> str:
        storage.put(png, self.out / path_of(name))
        self.written.append(path_of(name))
        return path_of(name)


def path_of(name: str) -> str:
    """Path of the picture `name`, relative to the demo's folder."""
    return f"pictures/{name}.png"


def mask_png(known: np.ndarray) -> bytes:
    """Known pixels (H, W) as the API's mask: a PNG that is transparent where to paint."""
    alpha = Image.fromarray(np.where(known, 255, 0).astype(np.uint8))
    buffer = io.BytesIO()
    Image.merge("LA", (alpha, alpha)).save(buffer, "PNG")
    return buffer.getvalue()


# -- requests --------------------------------------------------------------------------------------


def _pairs(client: Client, plan: Plan, tuned: str) -> list[Result]:
    """Pictures of the same prompts and seeds by the shipped and by the fine-tuned model."""
    requests = [
        (f"{when}-{file_name(prompt)}", prompt, seed, model)
        for seed, prompt in enumerate(plan.pairs)
        for when, model in (("before", None), ("after", tuned))
    ]
    with ThreadPoolExecutor(CONCURRENT_REQUESTS) as pool:
        images = list(pool.map(lambda request: client.generate(*request), requests))
    draw_pairs(client.out, plan.pairs, images[::2], images[1::2])
    return [
        {
            "prompt": prompt,
            "seed": seed,
            **{when: path_of(f"{when}-{file_name(prompt)}") for when in ("before", "after")},
        }
        for seed, prompt in enumerate(plan.pairs)
    ]


def _edit(client: Client, plan: Plan) -> Result:
    """Generate a picture, then inpaint its right half."""
    (first, first_seed), (prompt, seed) = plan.edit
    before = client.generate("edit-before", first, first_seed)
    known = left_part(len(before), 1 / 2)
    after = client.edit("edit-after", before, known, prompt, seed)
    hole = client.keep("edit-hole", show_hole(before, known))
    draw_edit(client.out, before, known, after, (first, prompt))
    return {
        "first": first,
        "prompt": prompt,
        "before": path_of("edit-before"),
        "hole": hole,
        "after": path_of("edit-after"),
        "kept": int(known.sum()),
    }


def _sketches(client: Client, plan: Plan, tuned: str) -> list[Result]:
    """Pictures that start from drawings."""
    rows, figure_rows = [], []
    for sketch in plan.sketches:
        drawing = draw_sketch(sketch.drawing)
        answers = [
            client.vary(
                f"sketch-{file_name(prompt)}",
                drawing,
                prompt,
                0,
                strength,
                tuned if from_tuned else None,
            )
            for prompt, strength, from_tuned in sketch.answers
        ]
        figure_rows.append((drawing, answers))
        rows.append(
            {
                "drawing": client.keep(f"sketch-{sketch.drawing}", drawing),
                "answers": [
                    {
                        "prompt": prompt,
                        "strength": strength,
                        "file": path_of(f"sketch-{file_name(prompt)}"),
                    }
                    for prompt, strength, _ in sketch.answers
                ],
            }
        )
    draw_sketches(client.out, plan.sketches, figure_rows)
    return rows


def _scene(client: Client, plan: Plan) -> list[Result]:
    """A picture that grows to the right.

    At S pixels high, each edit sees the last S/8 columns and inpaints the 7/8 S beside them.
    """
    strip = client.generate("scene-0", plan.scene[0], 1)
    strips, size, seen = [strip], len(strip), len(strip) // 8
    for number, prompt in enumerate(plan.scene[1:], 1):
        window = np.full_like(strip[:, :size], 255)
        window[:, :seen] = strip[:, -seen:]
        known = left_part(size, 1 / 8)
        edited = client.edit(f"scene-edit-{number}", window, known, prompt, number + 1)
        strip = np.concatenate([strip[:, :-seen], edited], axis=1)
        strips.append(strip)
    draw_scene(client.out, strips, plan.scene)
    return [
        {"prompt": prompt, "file": client.keep(f"scene-{number}", strip)}
        for number, (prompt, strip) in enumerate(zip(plan.scene, strips, strict=True))
    ]


def left_part(size: int, share: float) -> np.ndarray:
    """Mask (size, size), true in the left `share` of the columns."""
    return np.broadcast_to(np.arange(size) < share * size, (size, size))
