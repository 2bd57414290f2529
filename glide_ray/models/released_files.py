"""Import and export of published checkpoints as files, with their configs."""

from __future__ import annotations

import gzip
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from pydantic import TypeAdapter
from torch import Tensor

from ..config import presets
from ..config.models import AnyModelConfig, ClipModelConfig, ModelConfig
from ..data.tokenizer import ClipTokenizer
from ..storage import atomic_write
from .checkpoint_file import ReleasedError, listed, read_checkpoint
from .released import (
    clip_from_released,
    clip_names,
    clip_to_released,
    from_released,
    names_and_shapes,
    to_released,
)
from .weights import config_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Imported:
    """A model from published or exported checkpoint files."""

    config: AnyModelConfig
    state: dict[str, Tensor]
    metadata: dict[str, str]  # for our weights file: merges of CLIP, recipe, sources


def import_files(
    paths: Sequence[str | Path],
    vocabulary: str | Path | None = None,
    config: AnyModelConfig | None = None,
) -> Imported:
    """Read published checkpoint files, or those that `export_files` wrote.

    `paths`: the file of one U-Net, or those of both CLIP encoders; the published CLIP also needs
    its `vocabulary` (bpe_simple_vocab_16e6.txt.gz). The model is that of `config`; else that of the
    NAME.glide.json beside a file; else the published one that is nearest. Tensors that belong to
    no layer, such as a step, are left out, with a line in the log. Raises ReleasedError.
    """
    return _import_states({Path(path): read_checkpoint(path) for path in paths}, vocabulary, config)


def _import_states(
    states: Mapping[Path, dict[str, Tensor]],
    vocabulary: str | Path | None = None,
    config: AnyModelConfig | None = None,
) -> Imported:
    """`import_files` of state dicts by the paths of their files."""
    metadata: dict[str, str] = {}
    origin = "the preset"
    beside = next((one for path in states if (one := settings_of(path)).is_file()), None)
    if config is None and beside is not None:
        origin, (config, metadata) = beside.name, _read_settings(beside)
    towers = {_tower(state): (path, state) for path, state in states.items()}
    if None not in towers:
        return _import_clip(towers, config, metadata, vocabulary)
    if len(states) > 1:
        raise ReleasedError("Give one UNet at a time, or the two encoders of CLIP together.")
    ((path, state),) = states.items()
    unet = _recognise(state) if config is None else config
    if not isinstance(unet, ModelConfig):
        raise ReleasedError(f"{path} is a UNet, and {unet.name} a CLIP; give the right preset.")
    weights = _of_model(state, set(names_and_shapes(unet.unet)[0].values()), path)
    try:
        return Imported(unet, from_released(weights, unet.unet), metadata)
    except ReleasedError as error:
        known = (
            f"is none of the six published checkpoints (--preset NAME gives another shape); "
            f"{unet.name} is nearest, but"
            if config is None
            else f"does not fit {unet.name} of {origin}"
        )
        raise ReleasedError(f"{path} {known}: {error}") from None


@dataclass(frozen=True)
class ReleasedModel:
    """What a file under the released names holds.

    `config`: of a U-Net; None for an encoder of CLIP, whose `tower` is image or text.
    """

    config: ModelConfig | None
    tower: str | None
    state: dict[str, Tensor]
    metadata: dict[str, str]


def identify(path: Path) -> ReleasedModel:
    """The model in a published or exported file. Raises ReleasedError for any other."""
    state = read_checkpoint(path)
    if tower := _tower(state):
        return ReleasedModel(None, tower, state, {})
    model = _import_states({path: state})
    assert isinstance(model.config, ModelConfig)
    return ReleasedModel(model.config, None, model.state, model.metadata)


def _import_clip(
    towers: Mapping[str | None, tuple[Path, dict[str, Tensor]]],
    config: AnyModelConfig | None,
    metadata: dict[str, str],
    vocabulary: str | Path | None,
) -> Imported:
    """The CLIP of both encoders, by tower. Raises ReleasedError."""
    if set(towers) != {"image", "text"}:
        there = next(iter(towers))
        raise ReleasedError(
            f"{towers[there][0]} is CLIP's {there} encoder alone; give the image and the text "
            f"encoder together."
        )
    clip = released_clip() if config is None else config
    if not isinstance(clip, ClipModelConfig):
        raise ReleasedError(
            f"{towers['image'][0]} is a CLIP, and {clip.name} none; give the right preset."
        )
    if clip.clip.tokenizer == "clip" and "merges" not in metadata:
        if vocabulary is None:
            raise ReleasedError(
                "The published CLIP reads captions by a vocabulary of its own; give its file "
                "bpe_simple_vocab_16e6.txt.gz, which is published beside its code, with "
                "--vocabulary."
            )
        metadata = {**metadata, "merges": read_merges(vocabulary)}
    expected = clip_names(clip.clip)
    image, text = (
        _of_model(state, set(expected[tower].values()), path)
        for tower in ("image", "text")
        for path, state in [towers[tower]]
    )
    return Imported(clip, clip_from_released(image, text, clip.clip), metadata)


def _of_model(state: Mapping[str, Tensor], expected: set[str], path: Path) -> dict[str, Tensor]:
    """The tensors of a state dict without those outside of all modules in `expected`.

    Raises ReleasedError for integers among them, as in quantised weights.
    """
    modules = {name.split(".")[0] for name in expected}
    kept = {name: tensor for name, tensor in state.items() if name.split(".")[0] in modules}
    # With no module in common, it is another model, and the first missing key says so.
    if (others := sorted(set(state) - set(kept))) and kept:
        log.warning(f"{path}: left out, because they are no weights of the model: {listed(others)}")
    for name, tensor in kept.items():
        if not tensor.is_floating_point():
            raise ReleasedError(
                f"{path} holds {name} in {str(tensor.dtype).removeprefix('torch.')}: it is "
                f"quantised; give the checkpoint in fp16, bf16 or fp32."
            )
    return kept


def export_files(
    state: Mapping[str, Tensor],
    config: AnyModelConfig,
    path: Path,
    metadata: Mapping[str, str] = MappingProxyType({}),
) -> list[Path]:
    """Write our weights under the released names; returns the paths of the .pt files.

    One .pt file, or for CLIP two: -image-enc and -text-enc. Beside each, NAME.glide.json has the
    config and the `metadata` of the weights, for `import_files`.
    """
    if isinstance(config, ModelConfig):
        parts = {path: to_released(state, config.unet)}
    else:
        scale = state["log_scale"].double().exp().item()  # no tensor of the released form
        clip = config.clip.model_copy(update={"scale": scale})
        config = config.model_copy(update={"clip": clip})
        parts = dict(
            zip(
                (path.with_stem(f"{path.stem}-{tower}-enc") for tower in ("image", "text")),
                clip_to_released(state),
                strict=True,
            )
        )
    others = {name: value for name, value in metadata.items() if name != "config"}
    settings = {"config": config.model_dump(mode="json"), "metadata": others}
    for target, tensors in parts.items():
        with atomic_write(settings_of(target)) as partial:
            partial.write_text(json.dumps(settings, indent=1, ensure_ascii=False) + "\n")
        with atomic_write(target) as partial:
            torch.save({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
    return list(parts)


def settings_of(path: Path) -> Path:
    """The file with the config of an exported .pt file."""
    return path.with_suffix(".glide.json")


def _read_settings(path: Path) -> tuple[AnyModelConfig, dict[str, str]]:
    """Config and metadata that `export_files` wrote. Raises ReleasedError."""
    try:
        tree = json.loads(path.read_text())
        metadata = TypeAdapter(dict[str, str]).validate_python(tree["metadata"])
        return config_of(tree["config"]), metadata
    except (KeyError, TypeError, ValueError):  # also errors of pydantic and ConfigError
        raise ReleasedError(
            f"{path} is not what `glide export-released` writes; delete it, or export again."
        ) from None


def released_clip() -> ClipModelConfig:
    """Config of the published noised CLIP (its config.yaml)."""
    config = presets.get("noised-clip-b").model
    assert isinstance(config, ClipModelConfig)
    return config.model_copy(
        update={
            "clip": config.clip.model_copy(
                update={"vocabulary": 65536, "scale": 100.0, "tokenizer": "clip"}
            )
        }
    )


def read_merges(path: str | Path) -> str:
    """The merges in CLIP's vocabulary file, one per line. Raises ReleasedError."""
    try:
        lines = (
            gzip.decompress(Path(path).read_bytes())
            .decode()
            .split("\n")[1 : ClipTokenizer.MERGES + 1]
        )
    except (OSError, EOFError, ValueError):
        raise ReleasedError(
            f"{path} is not CLIP's vocabulary; give bpe_simple_vocab_16e6.txt.gz as it was "
            f"published."
        ) from None
    if len(lines) < ClipTokenizer.MERGES or not all(len(line.split()) == 2 for line in lines):
        raise ReleasedError(
            f"{path} is not CLIP's vocabulary; give bpe_simple_vocab_16e6.txt.gz as it was "
            f"published."
        )
    return "\n".join(lines)


def _tower(state: Mapping[str, Tensor]) -> str | None:
    return (
        "image"
        if "blocks.input.patch_proj" in state
        else "text"
        if "blocks.input.w_voc" in state
        else None
    )


def _recognise(state: Mapping[str, Tensor]) -> ModelConfig:
    """The published model that shares the most keys and sizes with a state dict."""
    configs = [
        presets.get(f"filtered-{kind}{task}").model
        for kind in ("base", "upsampler")
        for task in ("", "-inpaint")
    ]
    candidates = [config for config in configs if isinstance(config, ModelConfig)]

    def shared(config: ModelConfig) -> int:
        names, shapes = names_and_shapes(config.unet)
        return sum(
            released in state and state[released].numel() == shapes[ours].numel()
            for ours, released in names.items()
        )

    return max(candidates, key=shared)
