"""`glide miniature`: the paper's experiments in little, on the emoji corpus with models of 32 pixels that two CPU cores train in an hour.

Every stage leaves its result on disk and is not done again where that is there, so an interrupted run continues. People do not vote here: table 1
has two measures vote in their place, and says so.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from . import presets, storage
from .cascade import Cascade
from .config import BulkConfig, Preset, SampleOptions
from .data import emoji
from .data.filters import Candidate
from .data.images import centre_crop, decode, encode
from .data.shards import write_shards
from .data.sources import find_parts, read_part
from .distributed import originals
from .distributed.evaluate import UNGUIDED, Judges, captions_of, evaluate, sweep
from .distributed.job import once
from .distributed.local import disconnect
from .distributed.train import train
from .evaluation import elo
from .evaluation.elo import Vote
from .evaluation.features import ClipFeatures
from .evaluation.pages import Picture, Section, page
from .evaluation.report import Point, contact_sheet, fronts, show_hole
from .quality import bench_inpainting
from .settings import override
from .storage import fingerprint

PIXELS = ["model.unet.image_size=32", "model.unet.multipliers=1,2,4", "model.unet.attention_sizes=8"]
OFTEN = ["evaluate_every=125", "checkpoint_every=125"]
BASE = [*PIXELS, "model.unet.channels=24", "batch=32", "learning_rate=1e-3", "ema_rates=0.999", *OFTEN]
SMALL = [*PIXELS, "model.unet.channels=16", "batch=32", "learning_rate=1e-3", "ema_rates=0.999", *OFTEN]
CLIP = ["model.clip.image_size=32", "model.clip.patch_size=4", *OFTEN]


@dataclass(frozen=True)
class Model:
    """How one of the models comes about."""

    preset: str
    settings: list[str]
    corpus: str = "train"


MODELS = {
    "base": Model("nano-base", [*BASE, "steps=1500"]),
    "judge": Model("nano-plain-clip", [*CLIP, "steps=250"]),             # never sees noise, and guides nothing
    "clip": Model("nano-clip", [*CLIP, "steps=250"]),                    # sec. 4.4
    "inpaint": Model("nano-base-inpaint", [*BASE, "steps=250", "learning_rate=5e-4"]),
    "small": Model("nano-base", [*SMALL, "steps=600"]),                  # app. C
    "small-filtered": Model("nano-base", [*SMALL, "steps=600"], "without_people"),
}
IMAGES, SCALES, CLIP_SCALES = 192, (1.0, 1.5, 2.0, 3.0, 5.0), (0.003, 0.01, 0.03)
BEST, BY_CLIP = 3.0, 0.01       # scales of tables and figures. From 0.03 on so small a CLIP has noise painted that pleases it
NEAR = 0.02                     # cosine distance of a near-copy
SAMPLING = SampleOptions(sampler="ddim", steps=20)
PROMPTS = ("a red heart, 3D render", "a green apple, 3D render", "a yellow star, flat icon", "a blue book, 3D render", "a smiling face, 3D render",
           "a dog face, flat icon")
INSIDE, SIDE = "a yellow star, 3D render", 32      # what the holes of figure 11 are to be filled with; pixels


@dataclass(frozen=True)
class Finding:
    """One of the paper's, and whether it is found here."""

    text: str
    here: str
    holds: bool


def run(out: Path, say: Callable[[str], None] = tqdm.write) -> list[Finding]:
    """Make all of it in `out`, the corpus beside it. Raises UserError."""
    corpus = out.parent / "corpus"
    emoji.build(corpus, report=say)
    if not (corpus / "without_people" / "index.json").exists():
        samples = (sample for part in find_parts(corpus / "train") for sample in read_part(part))
        write_shards(corpus / "without_people", (sample for sample in samples if not emoji.shows_people(Candidate(sample))))
    for name in MODELS:
        result = train(preset(name, out, corpus), out / name)
        say(f"{name}: held-out loss {result.first_held_out:.3f} -> {result.last_held_out:.4f} in {result.steps:,} steps")
    weights = {name: str(out / name / "weights.safetensors") for name in MODELS}
    reference = str(corpus / "held_out")
    sets = _made(out, weights, reference, say)
    left_out = originals.filter_reference(reference, str(corpus / "train"), str(out / "reference"), weights["judge"], NEAR, say)
    table = evaluate(sets, reference, str(out / "evaluation"), Judges(weights["judge"]), originals.left_out(f"{out}/reference/{originals.LEFT_OUT}"), say=say)
    disconnect()
    pictures = {name: _pictures(path) for name, path in sets.items()}
    seeing = ClipFeatures(weights["judge"])
    votes = _votes(pictures, _pictures(reference), seeing)
    painted = once(str(out / "inpainting.json"), {name: fingerprint(weights[name]) for name in ("base", "inpaint")},
                   lambda: bench_inpainting(Path(weights["base"]), Path(weights["inpaint"]), Path(reference)))
    findings = _findings(table["sets"], pictures, votes, painted, seeing)
    large = [Point(name, row) for name, row in table["sets"].items() if not name.startswith("small")]
    sheets = {"figure-6.png": fronts(large, inception=False), "figure-9.png": _figure_9(weights), "figure-11.png": _figure_11(weights, reference, seeing)}
    for name, sheet in sheets.items():
        storage.put(encode(sheet), out / name)
    storage.put(_page(table, left_out, votes, findings, sheets).encode(), out / "report.html")
    storage.put(json.dumps([vars(finding) for finding in findings], indent=1, ensure_ascii=False).encode(), out / "findings.json")
    return findings


def preset(name: str, out: Path, corpus: Path) -> Preset:
    model = MODELS[name]
    start = [f"start_from={out / 'base' / 'weights.safetensors'}"] if name == "inpaint" else []
    return override(presets.get(model.preset), [*model.settings, *start, f"data.corpus={corpus / model.corpus}", f"data.held_out={corpus / 'held_out'}"])


# -- figure 6 and table 2 ---------------------------------------------------------------------------------------------

def _made(out: Path, weights: Mapping[str, str], reference: str, say: Callable[[str], None]) -> dict[str, str]:
    """The sets of pictures: name -> folder. Those of the small models begin with their names."""
    captions = captions_of(reference)
    config = BulkConfig(base=weights["base"], clip=weights["clip"], options=SAMPLING, precision="fp32")
    sets = sweep(config, SCALES, CLIP_SCALES, captions, IMAGES, str(out / "evaluation"), say)
    for name, scales in (("small", (1.0, BEST)), ("small-filtered", (BEST,))):
        made = sweep(config.model_copy(update={"base": weights[name]}), scales, (), captions, IMAGES, str(out / name), say)
        sets |= {f"{name}-{of}": folder for of, folder in made.items()}
    return sets


# -- table 1 ----------------------------------------------------------------------------------------------------------

def _votes(pictures: Mapping[str, list], real: list, seeing: ClipFeatures) -> dict[str, list[Vote]]:
    """Two measures in the place of people, on the same captions and seeds. Of two pictures the more real is the one that lies nearer to a real picture,
    and the one more like its caption the one that CLIP says."""
    shown = seeing.images([image for image, _ in real])
    score: dict[str, dict[str, np.ndarray]] = {"photorealism": {}, "caption similarity": {}}
    for name in (UNGUIDED, f"clip-{BY_CLIP:g}", f"guidance-{BEST:g}"):
        features = seeing.images([image for image, _ in pictures[name]])
        score["photorealism"][name] = (features @ shown.T).max(1)
        score["caption similarity"][name] = (features * seeing.words([caption for _, caption in pictures[name]])).sum(1)
    return {question: [Vote(one, other, 1.0 if first > second else 0.0 if first < second else 0.5, str(n)) for one in of for other in of if one < other
                       for n, (first, second) in enumerate(zip(of[one], of[other], strict=True))] for question, of in score.items()}


# -- figures 9 and 11 -------------------------------------------------------------------------------------------------

def _figure_9(weights: Mapping[str, str]) -> np.ndarray:
    """Rows as the paper has them: the large model, the small one, the small one of the filtered corpus, and that one guided by CLIP."""
    guided, clip = SAMPLING.model_copy(update={"guidance_scale": BEST}), SAMPLING.model_copy(update={"guidance_scale": 1.0, "clip_scale": BY_CLIP})
    rows = (("base", guided, "large"), ("small", guided, "small"), ("small-filtered", guided, "small, filtered"), ("small-filtered", clip, "small, filtered, CLIP"))
    images, labels = [], []
    for name, options, label in rows:
        cascade = Cascade.load(weights[name], precision="fp32", clip=weights["clip"])
        images += cascade.generate(list(PROMPTS), list(range(len(PROMPTS))), options)
        labels += [f"{label}: {prompt}" for prompt in PROMPTS]
    return np.asarray(contact_sheet(images, labels, columns=len(PROMPTS), size=128))


def _figure_11(weights: Mapping[str, str], reference: str, seeing: ClipFeatures, count: int = 6, tries: int = 8) -> np.ndarray:
    """Real pictures with a hole, filled by CLIP guidance, by the fine-tuned model, and implicitly; the best of several by CLIP each, as in app. D."""
    y, x = np.mgrid[:SIDE, :SIDE]
    known = (y - SIDE / 2) ** 2 + (x - SIDE / 2) ** 2 > (SIDE / 3) ** 2
    plain = SAMPLING.model_copy(update={"guidance_scale": BEST})
    ways = {"CLIP guidance": ("base", SAMPLING.model_copy(update={"guidance_scale": 1.0, "clip_scale": BY_CLIP})),
            "fine-tuned": ("inpaint", plain), "implicit": ("base", plain)}
    cascades = {name: Cascade.load(weights[model], precision="fp32", clip=weights["clip"] if name == "CLIP guidance" else None)
                for name, (model, _) in ways.items()}
    images, labels = [], []
    real = _pictures(reference)
    for picture, _ in real[len(real) // (2 * count)::len(real) // count][:count]:
        before = centre_crop(picture, SIDE)
        images += [show_hole(before, known)]
        labels += [f"the hole, and: {INSIDE}"]
        for name, (_, options) in ways.items():
            made = [cascades[name].edit(before, known, INSIDE, seed, options) for seed in range(tries)]
            images.append(made[int(np.argmax(_cosines(made, [INSIDE] * tries, seeing)))])
            labels.append(name)
    return np.asarray(contact_sheet(images, labels, columns=1 + len(ways), size=128))


# -- what holds -------------------------------------------------------------------------------------------------------

def _findings(sets: Mapping[str, Mapping[str, float]], pictures: Mapping[str, list], votes: Mapping[str, Sequence[Vote]], painted: Mapping[str, Any],
              seeing: ClipFeatures) -> list[Finding]:
    best, clips = f"guidance-{BEST:g}", [f"clip-{scale:g}" for scale in CLIP_SCALES]
    free = [UNGUIDED if scale == 1 else f"guidance-{scale:g}" for scale in SCALES]
    cosines = {name: _cosines([image for image, _ in of], [caption for _, caption in of], seeing) for name, of in pictures.items()}

    def gain(one: str, other: str) -> tuple[float, float]:
        """Of the CLIP score, picture by picture from the same noise, and its standard error."""
        apart = 100 * (cosines[one] - cosines[other])
        return float(apart.mean()), float(apart.std() / len(apart) ** 0.5)

    found = []

    def add(text: str, holds: bool, here: str) -> None:
        found.append(Finding(text, here, bool(holds)))
    up, error = gain(best, UNGUIDED)
    add("Classifier-free guidance brings pictures nearer to their captions (sec. 4.2, fig. 6).", up > 2 * error,
        f"CLIP score {up:+.2f} (standard error {error:.2f}) from no guidance to scale {BEST:g}")
    add("It trades diversity for fidelity: precision rises and recall falls (fig. 6).",
        sets[best]["precision"] > sets[UNGUIDED]["precision"] and sets[best]["recall"] < sets[UNGUIDED]["recall"],
        f"precision {sets[UNGUIDED]['precision']:.3f} to {sets[best]['precision']:.3f}, recall {sets[UNGUIDED]['recall']:.3f} to {sets[best]['recall']:.3f}")
    nearest = min(free, key=lambda name: sets[name]["frechet_distance"])
    add("The distance to real pictures is least at a small scale, 1.5, and grows with more (table 2, fig. 6).", nearest == "guidance-1.5",
        "; ".join(f"{name} {sets[name]['frechet_distance']:.4f}" for name in free))
    strongest, freest = max(clips, key=lambda name: sets[name]["clip_score"]), max(free, key=lambda name: sets[name]["clip_score"])
    add("CLIP guidance can raise the CLIP score more than classifier-free guidance (fig. 6).", sets[strongest]["clip_score"] > sets[freest]["clip_score"],
        f"{strongest} {sets[strongest]['clip_score']:.2f}, {freest} {sets[freest]['clip_score']:.2f}")
    for question, of in votes.items():
        table = elo.standings(of)
        add(f"Classifier-free guidance is preferred to CLIP guidance, and that to none, in {question} (table 1; people voted there, a measure here).",
            list(table) == [best, f"clip-{BY_CLIP:g}", UNGUIDED],
            "; ".join(f"{name} {standing.score:+.0f} ({standing.low:+.0f} to {standing.high:+.0f})" for name, standing in table.items()))
    scale, size = gain(f"small-guidance-{BEST:g}", "small-unguided"), gain(UNGUIDED, "small-unguided")
    add("Guidance gains more than a larger model (app. C, table 4).", scale[0] > size[0],
        f"CLIP score of the small model {scale[0]:+.2f} ({scale[1]:.2f}) by guidance, {size[0]:+.2f} ({size[1]:.2f}) by the larger one")
    border = painted["ddim"]
    add("A model that is fine-tuned for it joins what it paints to what is there better than implicit inpainting (sec. 4.3, fig. 11).",
        border["border_gain"] > 2 * border["gain_standard_error"],
        f"error at the hole's border {border['border_explicit']:.4f} to {border['border_implicit']:.4f} "
        f"(gain {border['border_gain']:.4f}, standard error {border['gain_standard_error']:.4f})")
    return found


def _cosines(images: Sequence, captions: Sequence[str], seeing: ClipFeatures) -> np.ndarray:
    shown = seeing.images([Image.fromarray(image) if isinstance(image, np.ndarray) else image for image in images])
    return (shown * seeing.words(list(captions))).sum(1)


def _pictures(source: str) -> list[tuple]:
    """(image, caption) of a corpus, in its order, at the models' size."""
    return [(Image.fromarray(centre_crop(decode(sample.image), SIDE)), sample.captions[0]) for part in find_parts(source) for sample in read_part(part)]


def _page(table: Mapping[str, Any], left_out: Mapping[str, Any], votes: Mapping[str, Sequence[Vote]], findings: Sequence[Finding], sheets: Mapping[str, np.ndarray]) -> str:
    standings = {question: elo.standings(of) for question, of in votes.items()}
    columns = ("frechet_distance", "filtered_frechet_distance", "frechet_infinity", "kid", "precision", "recall", "clip_score")
    return page("The paper in miniature", [
        Section("What holds at this scale", "Models of 32 pixels and some minutes of two CPU cores each; all figures are of a small CLIP's features.",
                table=[["the paper", "here", ""], *([finding.text, finding.here, "holds" if finding.holds else "does not hold"] for finding in findings)]),
        Section("Figure 6: both kinds of guidance", f"{IMAGES} pictures a point.", groups=[[Picture(sheets["figure-6.png"])]], width=1040),
        Section("Table 1: Elo", "People voted in the paper. Here two measures vote, on the same captions and seeds: how near a picture is to a real one, and CLIP's "
                "cosine with the caption.", table=[["", *standings], *([name, *(f"{of[name].score:+.1f} ({of[name].low:+.1f} to {of[name].high:+.1f})"
                                                                              for of in standings.values())] for name in next(iter(standings.values())))]),
        Section("Table 2: distance to real pictures", f"No FID: of the features of a small CLIP. Filtered: without the {left_out['names']} of {left_out['images']} "
                f"held-out images that lie within {left_out['distance']:g} of a training image.",
                table=[["", *(name.replace("_", " ") for name in columns)],
                       *([name, *(f"{row[column]:.4g}" for column in columns)] for name, row in table["sets"].items())]),
        Section("Figure 9: large and small models", "Not chosen: seeds 0 to 5.", groups=[[Picture(sheets["figure-9.png"])]], width=880),
        Section("Figure 11: inpainting", "The best of 8 by CLIP each.", groups=[[Picture(sheets["figure-11.png"])]], width=600)])
