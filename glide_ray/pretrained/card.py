"""Model card of weights: training pictures and their authors, recipe, measured figures, limits.

A weights file stores its own `sources` and `recipe` in its metadata, as JSON. The shipped weights
have their whole card beside them: `card.json`, and as a page `MODEL_CARD.md`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, TypeAdapter, ValidationError

from ..config.models import Frozen
from ..errors import UserError
from ..models.weights import WeightsError, load_metadata, load_weights
from ..storage import fingerprint, read

Recipe = dict[str, str | int | float | None]  # name -> value, such as steps, seconds, device
Text = Annotated[str, BeforeValidator(lambda given: "" if given is None else given)]


class CardError(UserError):
    """A model card that cannot be read."""


class Source(BaseModel):
    """A set of training pictures and its author. Unknown fields are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    package: str
    version: Text = ""
    style: Text = ""
    author: Text = ""
    url: Text = ""
    licence: str
    pictures: int | None = None

    @property
    def name(self) -> str:
        return f"{self.package}@{self.version}" if self.version else self.package


class Weights(Frozen):
    """One weights file: role, size and training recipe."""

    name: str
    role: str  # base, upsampler or clip
    model: str
    pixels: int  # side of its pictures
    parameters: int
    bytes: int
    sha256: str
    recipe: Recipe = {}


class Figure(Frozen):
    """A measured value, its 95% interval, and the command that measures it."""

    value: float
    interval: tuple[float, float] | None = None
    command: str = ""


class Card(Frozen):
    """Everything known about a set of weights files."""

    name: str
    files: tuple[Weights, ...]
    sources: tuple[Source, ...] = ()
    figures: dict[str, Figure] = {}
    limits: tuple[str, ...] = ()

    def file(self, role: str) -> Weights:
        """The weights file of a role. Raises CardError."""
        for entry in self.files:
            if entry.role == role:
                return entry
        raise CardError(
            f"The card of {self.name} names no weights of the role {role!r}; "
            f"write it again with `glide pack`."
        )


# -- reading -----------------------------------------------------------------------------------


def read_card(path: str | Path) -> Card:
    """A `card.json`, local or s3://. Raises MissingError, CardError."""
    try:
        return Card.model_validate_json(read(path))
    except ValidationError as error:
        raise CardError(
            f"{path} is not a model card that this version reads ({finding(error)}); "
            f"write it again with `glide pack`."
        ) from None


def card_of(path: str | Path) -> Card:
    """The card of one local weights file, from that file only. Raises WeightsError."""
    metadata = load_metadata(path)
    weights = describe(path, recipe_in(metadata, path))
    return Card(name=weights.model, files=(weights,), sources=sources_in(metadata, path))


def describe(path: str | Path, recipe: Recipe) -> Weights:
    """The card entry of a local weights file. Raises WeightsError."""
    (config, state), path = load_weights(path), Path(path)
    parameters = sum(tensor.numel() for tensor in state.values())
    return Weights(
        name=path.name,
        role=config.role,
        model=config.name,
        pixels=config.image_size,
        parameters=parameters,
        bytes=path.stat().st_size,
        sha256=fingerprint(path),
        recipe=recipe,
    )


def sources_in(metadata: Mapping[str, str], path: str | Path) -> tuple[Source, ...]:
    """The sources in the metadata of the weights file at `path`, if any. Raises WeightsError."""
    return _parse(tuple[Source, ...], metadata.get("sources", "[]"), "sources", path)


def recipe_in(metadata: Mapping[str, str], path: str | Path) -> Recipe:
    """The recipe in the metadata of the weights file at `path`, if any. Raises WeightsError."""
    return _parse(Recipe, metadata.get("recipe", "{}"), "recipe", path)


def _parse(kind: Any, text: str, what: str, path: str | Path) -> Any:
    try:
        return TypeAdapter(kind).validate_json(text)
    except ValidationError as error:
        raise WeightsError(
            f"The {what} in {path} cannot be read ({finding(error)}); export the weights again."
        ) from None


def finding(error: ValidationError) -> str:
    """The first validation error: its location and message."""
    found = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in found["loc"])
    return f"{place}: {found['msg']}" if place else found["msg"]


# -- sources -----------------------------------------------------------------------------------


def union(*several: Iterable[Source]) -> tuple[Source, ...]:
    """Every source once, with its largest number of pictures in any list, sorted by style."""
    return _merged(several, max)


def total(*several: Iterable[Source]) -> tuple[Source, ...]:
    """Every source once, with the sum of its pictures over all lists, sorted by style."""
    return _merged(several, sum)


def _merged(
    several: Iterable[Iterable[Source]], count: Callable[[list[int]], int]
) -> tuple[Source, ...]:
    found: dict[Source, list[int]] = {}
    for source in (source for sources in several for source in sources):
        key = source.model_copy(update={"pictures": None})
        found.setdefault(key, []).append(source.pictures or 0)
    merged = [
        source.model_copy(update={"pictures": count(pictures) or None})
        for source, pictures in found.items()
    ]
    return tuple(sorted(merged, key=lambda source: (source.style.lower(), source.name)))


def licences(sources: Iterable[Source]) -> list[str]:
    """Every licence once, sorted."""
    return sorted({source.licence for source in sources})


def credits(sources: Iterable[Source]) -> list[dict[str, str]]:
    """Attribution of each package and licence, once: name, author, licence, URL."""
    found = {
        (source.name, source.licence): {
            "package": source.name,
            "author": source.author,
            "licence": source.licence,
            "url": source.url,
        }
        for source in sources
    }
    return [{key: value for key, value in found[name].items() if value} for name in sorted(found)]


def to_metadata(sources: Iterable[Source], recipe: Recipe) -> dict[str, str]:
    """Sources and recipe as metadata of a weights file; an empty one is left out."""
    listed = [source.model_dump(exclude_defaults=True) for source in sources]
    given = {"sources": listed, "recipe": recipe}
    return {name: json.dumps(value, ensure_ascii=False) for name, value in given.items() if value}


# -- the page ----------------------------------------------------------------------------------


def render(card: Card) -> str:
    """The card as Markdown."""
    parts = [f"# {card.name}", _about(card), _files(card)]
    if card.sources:
        parts += ["## Data", _data(card)]
    if any(entry.recipe for entry in card.files):
        parts += ["## Training", _training(card)]
    if card.figures:
        parts += ["## Figures", _figures(card)]
    if card.limits:
        parts += ["## Limits", "\n".join(f"- {limit}" for limit in card.limits)]
    return "\n\n".join(parts) + "\n"


def _about(card: Card) -> str:
    kinds = {
        "base": "a base model that makes pictures of {0}x{0} pixels from words",
        "upsampler": "an upsampler that enlarges pictures to {0}x{0} pixels",
        "clip": "a CLIP for pictures of {0}x{0} pixels",
    }
    text = " and ".join(kinds[entry.role].format(entry.pixels) for entry in card.files)
    return f"{text[0].upper()}{text[1:]}, in the manner of GLIDE (Nichol et al. 2021)."


def _files(card: Card) -> str:
    return _table(
        ("file", "model", "parameters", "bytes", "SHA-256"),
        (
            (
                f"`{entry.name}`",
                entry.model,
                f"{entry.parameters / 1e6:,.2f}M",
                f"{entry.bytes:,}",
                f"`{entry.sha256}`",
            )
            for entry in card.files
        ),
    )


def _data(card: Card) -> str:
    rows = [
        (
            entry.style,
            _value(entry.pictures),
            entry.author,
            entry.licence,
            f"[{entry.name}]({entry.url})" if entry.url else entry.name,
        )
        for entry in card.sources
    ]
    heads = ("style", "pictures", "author", "licence", "source")
    first = 0 if any(entry.style for entry in card.sources) else 1  # only emoji have styles
    return (
        "The weights were trained on these works. Name their authors and licences where you "
        "pass the weights on.\n\n" + _table(heads[first:], (row[first:] for row in rows))
    )


def _training(card: Card) -> str:
    names = dict.fromkeys(name for entry in card.files for name in entry.recipe)
    rows = ((name, *(_value(entry.recipe.get(name)) for entry in card.files)) for name in names)
    return _table(("", *(entry.model for entry in card.files)), rows)


def _figures(card: Card) -> str:
    rows = (
        (
            name,
            f"{entry.value:.4g}",
            f"{entry.interval[0]:.4g} to {entry.interval[1]:.4g}" if entry.interval else "",
            f"`{entry.command}`" if entry.command else "",
        )
        for name, entry in card.figures.items()
    )
    return _table(("what", "value", "95% interval", "command"), rows)


def _value(value: str | int | float | None) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    cells = ([cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
