"""The weights that ship with the package, verified against their card before use.

Wherever a path of weights is accepted, the name `emoji` is too; the role selects the base model or
the upsampler.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from .. import storage
from ..config.models import SHIPPED
from ..errors import UserError, nearest
from ..models.weights import WeightsError, load_config
from .card import Card, CardError, Weights, read_card

log = logging.getLogger(__name__)

FOLDER = Path(__file__).resolve().parent
CARD, PAGE = "card.json", "MODEL_CARD.md"
REMEDY = (
    "reinstall glide_ray (in a checkout: `git checkout -- glide_ray/pretrained`), or give "
    "weights of your own with --base and --upsampler"
)


@dataclass(frozen=True)
class Pair:
    """Local files of a base model and its upsampler."""

    base: Path
    upsampler: Path


def find(name: str = SHIPPED) -> Pair:
    """The shipped weights called `name`; each file's SHA-256 is verified once per process.

    Raises WeightsError for another name, and if a file is missing or altered.
    """
    if name != SHIPPED:
        raise WeightsError(
            f"No weights called {name!r} ship with glide_ray; {nearest(name, [SHIPPED])}"
        )
    card = shipped_card()
    return Pair(_checked(card.file("base")), _checked(card.file("upsampler")))


def shipped_card() -> Card:
    """The card of the shipped weights. Raises WeightsError if it is missing or broken."""
    path = FOLDER / CARD
    try:
        return read_card(path)
    except storage.MissingError:
        raise WeightsError(
            f"The card of the weights that ship with glide_ray, {path}, is missing; {REMEDY}."
        ) from None
    except CardError:
        raise WeightsError(
            f"The card of the weights that ship with glide_ray, {path}, cannot be read; {REMEDY}."
        ) from None


def locate(weights: str | Path, role: str) -> Path | str:
    """The path of weights given by name; a path is returned unchanged.

    `role`: base, upsampler or clip. Raises WeightsError for an unknown name, with the nearest one.
    """
    if str(weights) == SHIPPED:
        if role == "clip":
            raise WeightsError("No CLIP ships with glide_ray; give the path of its weights.")
        return getattr(find(), role)
    _check_name(weights)
    return weights


def fetch(weights: str | Path, role: str) -> Path:
    """A local file of weights given by name, local path or s3:// URL.

    Raises WeightsError, StorageError.
    """
    return storage.fetch(locate(weights, role))


def absolute(weights: str | Path) -> str:
    """The same weights for another node or working directory: their name, or an absolute path.

    Raises WeightsError for an unknown name.
    """
    if str(weights) == SHIPPED:
        return SHIPPED
    _check_name(weights)
    return storage.absolute(weights)


def name_of(path: str | Path) -> str:
    """`emoji` for a shipped file, the path itself for any other."""
    return SHIPPED if Path(path).parent == FOLDER else str(path)


def with_sha256(sha256: str) -> Path | None:
    """The shipped file with this SHA-256, or None."""
    try:
        found = [one for one in shipped_card().files if one.sha256 == sha256]
        return _checked(found[0]) if found else None
    except UserError:
        return None


def upsampler_for(base: str | Path) -> str | None:
    """The default upsampler of a base model: the shipped one if its input size fits, else None.

    For a base model that is not the shipped one, logs a warning about the choice. Raises
    WeightsError.
    """
    if str(base) == SHIPPED:
        return SHIPPED
    path = locate(base, "base")
    config = load_config(storage.fetch(path) if storage.is_remote(path) else path)
    if config.role != "base":  # loading it as a base model raises later
        return None
    shipped = load_config(find().upsampler)
    if config.image_size != shipped.low_res_size:
        log.warning(
            f"pictures keep the {config.image_size} pixels of {config.name}: no upsampler was "
            f"given, and the one that ships with glide_ray enlarges {shipped.low_res_size}"
        )
        return None
    log.warning(
        f"no upsampler was given: pictures are enlarged by {shipped.name}, which ships with "
        f"glide_ray"
    )
    return SHIPPED


def _check_name(weights: str | Path) -> None:
    """Raise WeightsError if `weights` looks like a name but is neither known nor a file."""
    path = Path(weights)
    if path.name == str(weights) and not path.suffix and not path.exists():
        raise WeightsError(
            f"There is no weights file {weights}, and no weights of that name ship "
            f"with glide_ray; {nearest(str(weights), [SHIPPED])}"
        )


def _checked(weights: Weights) -> Path:
    path = FOLDER / weights.name
    if not path.is_file():
        raise WeightsError(f"{path}, which ships with glide_ray, is missing; {REMEDY}.")
    if (sha256 := storage.fingerprint(path)) != weights.sha256:
        raise WeightsError(
            f"{path}, which ships with glide_ray, has been altered: its SHA-256 begins with "
            f"{sha256[:16]}, the card's with {weights.sha256[:16]}; {REMEDY}."
        )
    return path
