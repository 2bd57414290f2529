"""What a file of weights is, for `glide info FILE`: model, size, sampling, recipe, sources."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from .. import storage
from ..config.models import SHIPPED, AnyModelConfig, ModelConfig, steps_of
from ..models.adapters import read_config
from ..models.cost import architecture
from ..models.released_files import ReleasedModel, identify
from ..models.weights import ADAPTER, WeightsError, load_config, load_metadata
from . import shipped
from .card import Recipe, Source, recipe_in, sources_in

KINDS = {"base": "base model", "upsampler": "upsampler", "clip": "CLIP"}
RESULTS = ("weights.safetensors", "adapter.safetensors")  # of a run, in its folder
SHOWN = ("config", "recipe", "sources", "merges", ADAPTER, "format")  # or not for people
DTYPES = {"F64": "fp64", "F32": "fp32", "F16": "fp16", "BF16": "bf16", "I8": "int8"}


def about(path: str | Path) -> str:
    """A description of a weights file, an adapter, a released .pt file or a CLIP, as lines.

    `path`: local or s3://, the folder of a run or of a public CLIP, or the name of the shipped
    weights. Raises WeightsError, ReleasedError, StorageError.
    """
    if str(path) == SHIPPED:
        pair = shipped.find()
        return "\n\n".join(about(one) for one in (pair.base, pair.upsampler))
    local = Path(path) if not storage.is_remote(path) else storage.fetch(path)
    if local.is_dir():
        results = [local / name for name in RESULTS if (local / name).is_file()]
        if (local / "config.json").is_file() and not results:
            return _text(*_public_clip(local))
        if not results:
            raise WeightsError(
                f"{path} has no {' or '.join(RESULTS)}; give the path of a weights file."
            )
        return "\n\n".join(map(about, results))
    if not local.is_file():
        raise WeightsError(f"There is no file {path}; give a weights file or a preset.")
    if local.suffix in (".pt", ".pth", ".ckpt", ".bin"):
        title, rows = _released(local)
    else:
        title, rows = (_adapter if ADAPTER in load_metadata(local) else _weights)(local)
    end = {"file": f"{local.stat().st_size:,} bytes", "SHA-256": storage.fingerprint(local)}
    return _text(f"{path}: {title}", rows | end)


def _text(title: str, rows: Mapping[str, str]) -> str:
    """The title, and a line for each value; values of several lines continue below each other."""
    lines = [
        f"  {name if not n else '':<12} {line}"
        for name, value in rows.items()
        for n, line in enumerate(value.splitlines() or [""])
    ]
    return "\n".join([title, *lines])


def _weights(path: Path) -> tuple[str, dict[str, str]]:
    config, metadata = load_config(path), load_metadata(path)
    rows = {**_model(config), "parameters": _parameters([path]), **_sampling(config)}
    return f"weights of the {KINDS[config.role]} {config.name}", rows | _metadata(metadata, path)


def _adapter(path: Path) -> tuple[str, dict[str, str]]:
    config, metadata = read_config(path), load_metadata(path)
    ships = ", which ships with glide_ray" if shipped.with_sha256(config.base_sha256) else ""
    rows = {
        "added to": f"the weights with the SHA-256 {config.base_sha256}{ships}",
        "rank": f"{config.rank}, alpha {config.alpha:g}",
        "parameters": _parameters([path]),
    }
    title = f"adapter (LoRA) of the {KINDS[config.role]} {config.base}"
    return title, rows | _metadata(metadata, path)


def _released(path: Path) -> tuple[str, dict[str, str]]:
    model: ReleasedModel = identify(path)
    numbers = sum(tensor.numel() for tensor in model.state.values())
    dtypes = sorted({_precision(tensor.dtype) for tensor in model.state.values()})
    rows = {"parameters": _counted(numbers, len(model.state), dtypes)}
    if model.config is None:
        return f"{model.tower} encoder of a CLIP, under the released names", rows
    rows = {**_model(model.config), **rows, **_sampling(model.config)}
    rows |= _metadata(model.metadata, path)
    rows["to use it"] = f"glide import-released {path}"
    kind = KINDS[model.config.role]
    return f"the {kind} {model.config.name}, under the released names", rows


def _public_clip(folder: Path) -> tuple[str, dict[str, str]]:
    """The folder of a CLIP of `transformers`. Raises WeightsError for another model's."""
    try:
        tree = json.loads((folder / "config.json").read_text())
        pixels = tree["vision_config"].get("image_size", 224)
        width = tree.get("projection_dim", 512)
    except (ValueError, KeyError, AttributeError, TypeError):
        raise WeightsError(
            f"{folder} holds no CLIP that transformers wrote: its config.json has no vision_config."
        ) from None
    files = sorted(folder.glob("*.safetensors"))
    rows = {"pictures": f"{pixels}x{pixels} pixels", "embedding": f"{width} numbers"}
    if files:
        rows |= {"parameters": _parameters(files)}
        rows |= {"file": f"{sum(one.stat().st_size for one in files):,} bytes"}
        rows |= {"SHA-256": ", ".join(map(storage.fingerprint, files))}
    return f"{folder}: public CLIP for --clip, in the form of transformers", rows


# -- rows ------------------------------------------------------------------------------------------


def _model(config: AnyModelConfig) -> dict[str, str]:
    size, small = config.image_size, config.low_res_size
    pictures = f"{size}x{size} pixels" + (f", from {small}x{small}" if small else "")
    rows = {"pictures": pictures + (", inpainting" if config.inpaint else "")}
    for line in architecture(config):
        name, _, value = line.strip().partition("  ")
        rows[name] = value.strip()
    predicts = f"; predicts {config.unet.prediction}" if isinstance(config, ModelConfig) else ""
    diffusion = config.diffusion
    rows["noise"] = f"{diffusion.schedule} schedule of {diffusion.steps} timesteps{predicts}"
    return rows


def _sampling(config: AnyModelConfig) -> dict[str, str]:
    """Default sampling, and the tuned grids by their numbers of steps."""
    if not isinstance(config, ModelConfig):
        return {}
    sampling = config.sampling
    noise = f", noise scale {sampling.noise_scale:g}" if sampling.noise_scale != 1 else ""
    rows = {
        "sampling": f"{sampling.sampler}, timesteps {sampling.respacing}, guidance scale "
        f"{sampling.guidance_scale:g}{noise}"
    }
    if sampling.tuned_grids:
        rows["tuned grids"] = "\n".join(
            f"{steps_of(grid)} steps: {grid}" for grid in sorted(sampling.tuned_grids, key=steps_of)
        )
    return rows


def _metadata(metadata: Mapping[str, str], path: Path) -> dict[str, str]:
    """Recipe, sources and the rest of a file's metadata."""
    rows = {name: text for name, text in metadata.items() if name not in SHOWN}
    if recipe := recipe_in(metadata, path):
        rows["recipe"] = _recipe(recipe)
    if sources := sources_in(metadata, path):
        rows["sources"] = _sources(sources)
    return rows


def _recipe(recipe: Recipe) -> str:
    return "\n".join(
        f"{name}: {value:,}" if isinstance(value, int) else f"{name}: {value}"
        for name, value in recipe.items()
    )


def _sources(sources: Iterable[Source]) -> str:
    return "\n".join(
        f"{one.name}, {one.author}, {one.licence}" if one.author else f"{one.name}, {one.licence}"
        for one in sources
    )


def _parameters(files: Iterable[Path]) -> str:
    """Numbers in safetensors files, read from their headers."""
    numbers, tensors, dtypes = 0, 0, set()
    for path in files:
        with safe_open(path, "pt") as file:
            for name in file.keys():
                header = file.get_slice(name)
                numbers += math.prod(header.get_shape())
                tensors += 1
                dtypes.add(DTYPES.get(header.get_dtype(), header.get_dtype()))
    return _counted(numbers, tensors, sorted(dtypes))


def _counted(numbers: int, tensors: int, dtypes: Iterable[str]) -> str:
    return f"{numbers / 1e6:,.2f}M in {tensors:,} tensors, {', '.join(dtypes)}"


def _precision(dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    return {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float64": "fp64"}.get(
        name, name
    )
