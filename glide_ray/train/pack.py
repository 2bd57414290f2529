"""Packing of trained weights for release: float16 files with sources and recipe, and a model card.

Reproducible: the same weights always give the same bytes.
"""

from __future__ import annotations

import json
import logging
import struct
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import save
from torch import Tensor

from .. import storage
from ..config.lora import Lora
from ..config.models import SHIPPED, AnyModelConfig, Frozen, ModelConfig
from ..config.training import Preset
from ..data.card import CARD as CORPUS_CARD
from ..data.card import read_card as read_corpus_card
from ..data.patterns import folders
from ..errors import UserError
from ..models.adapters import adding, check_roles, loras_of, read_config
from ..models.weights import check_pair, check_role, load_metadata, load_weights
from ..pretrained import shipped
from ..pretrained.card import (
    Card,
    Figure,
    Recipe,
    Source,
    describe,
    finding,
    read_card,
    recipe_in,
    render,
    sources_in,
    to_metadata,
    total,
    union,
)
from .checkpoint import find_checkpoint
from .partition import export_to

# Limit for both files together, because every copy of the package includes them.
MAX_BYTES = 64_000_000
METRICS = "metrics.jsonl"
log = logging.getLogger(__name__)
NOTHING: Mapping[str, str | int | float | None] = MappingProxyType({})


class PackError(UserError):
    """Weights that cannot be packed."""


class Notes(Frozen):
    """The part of a model card that is not stored in weights files."""

    figures: dict[str, Figure] = {}
    limits: tuple[str, ...] = ()


@dataclass(frozen=True)
class Trained:
    """A model's weights, the sources of its training images, and its training recipe."""

    config: AnyModelConfig
    state: Mapping[str, Tensor]
    sources: tuple[Source, ...]
    recipe: Recipe


# -- reading ---------------------------------------------------------------------------------------


def read_trained(
    path: str | Path,
    corpora: Iterable[str] = (),
    recipe: Mapping[str, str | int | float | None] = NOTHING,
    ema_rate: float | None = None,
) -> Trained:
    """Read the weights in a .safetensors file, or the EMA in the last checkpoint of a run folder.

    Sources are those stored in the file, or those of the run's corpus and of its starting weights;
    `corpora`, folders with a corpus card, replace them. Entries of `recipe` override those of the
    file or run. `ema_rate`: for a run, by default the preset's first rate. Paths are local or
    s3://. Raises UserError.
    """
    if str(path).endswith(".safetensors"):
        found = _read_file(storage.fetch(path))
    else:
        found = _read_run(find_checkpoint(path), ema_rate)
    sources = union(*map(corpus_sources, corpora)) if corpora else found.sources
    return replace(found, sources=sources, recipe={**found.recipe, **recipe})


def _read_file(path: Path) -> Trained:
    metadata = load_metadata(path)
    return Trained(*load_weights(path), sources_in(metadata, path), recipe_in(metadata, path))


def read_merged(weights: str | Path, loras: Sequence[str | Lora]) -> Trained:
    """Read weights, by path or name, and add adapters of them. Raises UserError."""
    added = loras_of(loras)
    role = read_config(added[0].path).role
    check_roles(added, (role,))
    path = shipped.fetch(weights, role)
    found = _read_file(path)
    state = {
        name: tensor.float().contiguous()
        for name, tensor in adding(added, role, path)(dict(found.state)).items()
    }
    sources = [sources_in(load_metadata(storage.fetch(one.path)), one.path) for one in added]
    recipe = {**found.recipe, "adapters": ", ".join(map(str, added))}
    return Trained(found.config, state, union(found.sources, *sources), recipe)


def _read_run(checkpoint: str, ema_rate: float | None) -> Trained:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "weights.safetensors"
        preset, step, rate = export_to(checkpoint, file, ema_rate)
        config, state = load_weights(file)
    train, run = preset.train, checkpoint.rpartition("/checkpoints/")[0] or checkpoint
    recipe: Recipe = {
        "preset": preset.model.name,
        "steps": step,
        "batch": train.batch,
        "images": step * train.batch,
        "seconds": seconds_of(run, train.batch),
        "precision": train.precision,
        "learning rate": train.learning_rate,
        "EMA": f"rate {rate:g}",
    }
    recipe = {name: value for name, value in recipe.items() if value is not None}
    return Trained(config, state, sources_of(preset), recipe)


def sources_of(preset: Preset) -> tuple[Source, ...]:
    """Sources of a run: those of its corpus and of the weights that it started from."""
    corpus, start = corpus_sources(preset.data.corpus), preset.train.start_from
    if not start or not (start == SHIPPED or storage.exists(start)):
        return corpus
    before = shipped.fetch(start, preset.model.role)
    return union(corpus, sources_in(load_metadata(before), before))


def source_metadata(preset: Preset) -> dict[str, str]:
    """The sources of a run as metadata of its weights; {} and a warning if they cannot be read."""
    try:
        found = sources_of(preset)
        if not found:
            log.info(
                f"{preset.data.corpus} has no {CORPUS_CARD}, so the weights name no sources and "
                "licences; `glide clean` writes one"
            )
        return to_metadata(found, {})
    except UserError as error:  # not a reason to lose the weights
        log.warning(f"the weights do not name the sources of their training pictures: {error}")
        return {}


def corpus_sources(corpus: str) -> tuple[Source, ...]:
    """Sources listed in the cards of a corpus's folders; empty for folders without a card.

    Image counts of scene folders are dropped, because scenes are composed from images of other
    folders. Raises PackError.
    """
    return total(*map(_card_sources, folders(corpus)))


def _card_sources(folder: str) -> tuple[Source, ...]:
    card = read_corpus_card(folder)
    try:
        listed = [Source.model_validate(one) for one in card["sources"]] if card else []
    except (ValueError, KeyError, TypeError):
        raise PackError(
            f"The card of the corpus in {folder} lists no sources that can be read; "
            f"make the corpus again with `glide corpus` or `glide clean`."
        ) from None
    if card and "scenes" in card:
        listed = [source.model_copy(update={"pictures": None}) for source in listed]
    return tuple(listed)


def seconds_of(run: str, batch: int) -> int | None:
    """Training time in seconds, without evaluation, from a run's metrics; None without metrics."""
    try:
        lines = storage.read(f"{run}/{METRICS}").decode().splitlines()
    except storage.MissingError:
        return None
    rows = [json.loads(line) for line in lines if line.endswith("}")]  # the last may be cut off
    paces = {row["step"]: row["images_per_s"] for row in rows if row.get("images_per_s")}
    steps = [0, *sorted(paces)]
    spans = zip(steps, steps[1:], strict=False)
    return round(sum((end - start) * batch / paces[end] for start, end in spans)) or None


# -- writing ---------------------------------------------------------------------------------------


def write_half(trained: Trained, path: str | Path) -> None:
    """Write a float16 weights file, local or s3://, with sources and recipe as metadata.

    Raises PackError if a value overflows float16.
    """
    state = {name: _half(name, tensor) for name, tensor in trained.state.items()}
    write_whole(replace(trained, state=state), path)


def write_whole(trained: Trained, path: str | Path) -> None:
    """As `write_half`, in the number format of the tensors."""
    metadata = {
        "config": trained.config.model_dump_json(),
        **to_metadata(trained.sources, trained.recipe),
    }
    storage.put(_sorted_metadata(save(dict(trained.state), metadata)), path)


def _half(name: str, tensor: Tensor) -> Tensor:
    half = tensor.to(torch.float16) if tensor.is_floating_point() else tensor
    if not half.isfinite().all():
        raise PackError(
            f"{name} has values that float16 does not hold (up to {tensor.abs().max():g}); export "
            "the weights without --half."
        )
    return half.contiguous()


def _sorted_metadata(data: bytes) -> bytes:
    """Sort the metadata of a safetensors file by name; the library writes them unsorted."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def pack(
    base: Trained, upsampler: Trained, folder: str | Path | None = None, notes: Notes | None = None
) -> Card:
    """Write the release: both weights files, `card.json` and `MODEL_CARD.md`. Returns the card.

    `folder`: by default the package's folder of weights. Without `notes`, figures and limits are
    taken from the existing card. Raises PackError if a model has no sources or the files are too
    large, WeightsError if the two models do not match.
    """
    folder = Path(folder or shipped.FOLDER)
    models = {"base": base, "upsampler": upsampler}
    for role, trained in models.items():
        _check(trained, role)
    # Both roles have been checked, and no CLIP has them.
    assert isinstance(base.config, ModelConfig) and isinstance(upsampler.config, ModelConfig)
    check_pair(base.config, upsampler.config)
    with tempfile.TemporaryDirectory() as there:
        files = {role: Path(there) / f"{SHIPPED}-{role}.safetensors" for role in models}
        for role, trained in models.items():
            write_half(trained, files[role])
        _check_size(files.values())
        described = tuple(describe(files[role], models[role].recipe) for role in models)
        card = Card(
            name=SHIPPED,
            files=described,
            sources=union(base.sources, upsampler.sources),
            **dict(notes or _notes_of(folder)),
        )
        for file in files.values():
            storage.put(file, folder / file.name)
    text = card.model_dump_json(indent=1, exclude_defaults=True)
    storage.put(f"{text}\n".encode(), folder / shipped.CARD)
    storage.put(render(card).encode(), folder / shipped.PAGE)
    return card


def _check(trained: Trained, role: str) -> None:
    check_role(trained.config, role, f"The file given as the {role}")
    if not trained.sources:
        raise PackError(
            f"{trained.config.name} does not name the sources of its training pictures; name its "
            f"corpus, a folder with a {CORPUS_CARD}, with --corpus."
        )


def _check_size(files: Iterable[Path]) -> None:
    total = sum(file.stat().st_size for file in files)
    if total > MAX_BYTES:
        raise PackError(
            f"The two files have {total:,} bytes and may have {MAX_BYTES:,}; pack smaller models."
        )


def read_recipe(path: str | Path) -> Recipe:
    """Read a recipe: a JSON object of names and values. Raises StorageError, PackError."""
    try:
        return TypeAdapter(Recipe).validate_json(storage.read(path))
    except ValidationError:
        raise PackError(
            f"{path} is not a JSON object of names and values; write "
            f'{{"seconds": 540, "device": "H100"}}, for example.'
        ) from None


def read_notes(path: str | Path) -> Notes:
    """Read figures and limits from a JSON file. Raises StorageError, PackError."""
    try:
        return Notes.model_validate_json(storage.read(path))
    except ValidationError as error:
        raise PackError(
            f"{path} cannot be read ({finding(error)}); `glide pack --help` shows "
            f"what notes look like."
        ) from None


def _notes_of(folder: Path) -> Notes:
    """Figures and limits of the model card in a folder; empty if it cannot be read."""
    try:
        card = read_card(folder / shipped.CARD)
    except UserError:
        return Notes()
    return Notes(figures=card.figures, limits=card.limits)
