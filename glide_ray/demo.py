"""`glide demo`: the whole system once, from a corpus to pictures over HTTP, with models small enough for two CPU cores.

Every stage leaves its result on disk and is skipped when that is there, so an interrupted demo continues.
"""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
from PIL import Image
from tqdm import tqdm

from . import presets, storage
from .config import SAMPLE_PROMPTS as PROMPTS
from .config import Preset, UserError
from .data.splits import is_held_out
from .data.images import centre_crop, decode, encode
from .data.shards import read_shard
from .distributed.corpus import prepare
from .distributed.local import connect, disconnect
from .train.run_folder import read_metrics
from .distributed.train import TrainingResult, train
from .evaluation.report import contact_sheet, loss_curves, show_hole
from .serve_config import ServeConfig

EDIT_PROMPT = "a yellow star, 3D render"


def run(out: Path, report: Callable[[str], None] = tqdm.write) -> None:
    """Make the demo in `out` (corpus beside it). Raises UserError."""
    began = time.monotonic()
    corpus = out.parent / "corpus"
    _heading(report, 1, "corpus: emoji from npm to tar shards, streamed and filtered by Ray Data")
    for part in _once(out / "corpus.json", lambda: [_row(made) for made in prepare(corpus, report=lambda line: report(f"  {line}"))]):
        report(f"  {part['path']}: {part['rows']}; {part['captions']:,} captions, {part['cut']} cut at 128 tokens")

    results = {}
    for number, stage in ((2, "base"), (3, "upsampler")):
        preset = _preset(f"nano-{stage}", corpus)
        _heading(report, number, f"train {preset.model.name}: Ray Train, DeepSpeed ZeRO-{preset.train.zero_stage}, {preset.train.workers} workers")
        results[stage] = train(preset, out / stage)
        report(f"  held-out loss {results[stage].first_held_out:.3f} -> {results[stage].last_held_out:.4f} "
               f"({results[stage].last_held_out / results[stage].first_held_out:.1%} of the first)")
    loss_curves({f"nano-{stage}": read_metrics(result.metrics) for stage, result in results.items()}, out / "loss.png")

    _heading(report, 4, "serve: Ray Serve, asked over HTTP as the OpenAI Images API")
    _once(out / "images.json", lambda: _ask(out, corpus, results))
    disconnect()
    report(_summary(out, (time.monotonic() - began) / 60))


def _preset(name: str, corpus: Path) -> Preset:
    preset = presets.get(name)
    data = preset.data.model_copy(update={"corpus": str(corpus / "train"), "held_out": str(corpus / "held_out")})
    return preset.model_copy(update={"data": data})


def _once(path: Path, make: Callable[[], list | dict]):
    """What the JSON file says, made by `make` where it is not there yet."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        made = make()
        storage.put(json.dumps(made, indent=1).encode(), path)
        return made


def _row(part) -> dict:
    return {"path": part.path, "rows": str(part.rows), "captions": part.captions, "cut": part.cut_captions}


def _heading(report: Callable[[str], None], number: int, text: str) -> None:
    report(f"\n[{number}/4] {text}")


# -- over HTTP --------------------------------------------------------------------------------------------------------

def _ask(out: Path, corpus: Path, results: dict[str, TrainingResult]) -> dict:
    from serve.app import serving    # of the checkout; the command line has put it on the path
    from serve.load import free_port
    connect(4)
    before, known = _picture_to_edit(corpus)
    config = ServeConfig(base=results["base"].weights, upsampler=results["upsampler"].weights, port=free_port())
    bar = tqdm(total=len(PROMPTS) + 1, desc="pictures", unit="picture", dynamic_ncols=True)
    with serving(config) as url, httpx.Client(base_url=url, timeout=300) as client, bar:
        images = []
        for seed, prompt in enumerate(PROMPTS):
            answer = client.post("/v1/images/generations", json={"prompt": prompt, "seed": seed, "size": "256x256"})
            images.append(_png(answer))
            bar.update()
        mask = Image.fromarray(np.where(known, 255, 0).astype(np.uint8))
        mask_png = io.BytesIO()
        Image.merge("LA", (mask, mask)).save(mask_png, "PNG")
        answer = client.post("/v1/images/edits", data={"prompt": EDIT_PROMPT, "seed": "0"},
                             files={"image": ("before.png", encode(before), "image/png"), "mask": ("mask.png", mask_png.getvalue(), "image/png")})
        after_png = _png(answer)
        after = np.asarray(decode(after_png))
        bar.update()
    if not np.array_equal(after[known], before[known]):
        raise UserError("The edit changed pixels that were to be kept; please report this with runs/demo.")
    for name, png in zip([*PROMPTS, "edited"], [*images, after_png], strict=True):       # as they came: each carries its recipe
        storage.put(png, out / "images" / f"{name.replace(',', '').replace(' ', '-')}.png")
    _put(contact_sheet([np.asarray(decode(png)) for png in images], PROMPTS, title="prompt -> 64x64 -> 256x256"), out / "contact-sheet.png")
    _put(contact_sheet([before, show_hole(before, known), after], ["before", f"mask, and the prompt: {EDIT_PROMPT}", "after"],
                       columns=3, title="edit: the known pixels are kept exactly"), out / "edit.png")
    return {"prompts": list(PROMPTS), "edit": EDIT_PROMPT}


def _png(answer: httpx.Response) -> bytes:
    if answer.status_code != 200:
        raise UserError(f"The server answered {answer.status_code}: {answer.json()['error']['message']}")
    return base64.b64decode(answer.json()["data"][0]["b64_json"])


def _picture_to_edit(corpus: Path) -> tuple[np.ndarray, np.ndarray]:
    """A held-out 3D emoji, and a mask that keeps all but a disc in its lower right."""
    for shard in sorted((corpus / "held_out").glob("*.tar")):
        for sample in read_shard(shard):
            if sample.meta["style"] == "3D render" and sample.meta["group"] == "Food & Drink" and is_held_out(sample.meta["emoji"]):
                y, x = np.mgrid[:256, :256]
                return centre_crop(decode(sample.image), 256), (y - 168) ** 2 + (x - 168) ** 2 > 62**2
    raise UserError(f"The held-out corpus in {corpus} has no picture of food; remove {corpus} and run the demo again.")


def _put(image: Image.Image, path: Path) -> None:
    storage.put(encode(np.asarray(image)), path)


def _summary(out: Path, minutes: float) -> str:
    return f"""
Done in {minutes:.1f} minutes. Every part has worked; minutes on a CPU teach the nano models shades and shapes, not yet words.
In {out}:
  contact-sheet.png     {len(PROMPTS)} prompts and their pictures (singly in images/)
  edit.png              before, mask, after
  loss.png              training and held-out loss of both models
  base/, upsampler/     weights.safetensors, metrics.jsonl, and the checkpoints to go on from

Try next:
  .venv/bin/glide generate "a blue heart, 3D render" --seed 3 --out heart.png
  .venv/bin/glide train nano-base --set steps=6000 --out runs/longer
  .venv/bin/glide serve                                                  # then POST to http://127.0.0.1:8000/v1/images/generations"""
