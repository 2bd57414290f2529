"""Apply `key=value` settings to a config; a mistake raises a one-sentence ConfigError."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from ..errors import ConfigError, nearest
from .models import TAGS, Frozen

Config = TypeVar("Config", bound=Frozen)


def override(preset: Config, settings: Iterable[str]) -> Config:
    """Apply `key=value` settings such as `train.steps=500` to a preset or another config.

    A dotted key names a field; a bare key is looked up in `train`, then in `data`. Raises
    ConfigError, with the nearest key for an unknown one.
    """
    tree = preset.model_dump()
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise ConfigError(f"{setting!r} is not of the form key=value, such as train.steps=500.")
        _set(tree, _resolve(tree, key.strip()), value.strip())
    return validate(type(preset), tree)


def validate(kind: type[Config], tree: dict[str, Any]) -> Config:
    """`kind.model_validate(tree)`; raises pydantic's first error as a one-sentence ConfigError."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"] if part not in TAGS) or kind.__name__
        if first["type"] == "extra_forbidden":
            hint = nearest(where, leaves(tree_of(kind)))
            raise ConfigError(f"There is no setting {where!r}; {hint}") from None
        given = "" if isinstance(first["input"], dict) else f" (given: {first['input']!r})"
        message = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"Setting {where}: {message}{given}.") from None


def tree_of(kind: type[Frozen]) -> dict[str, Any]:
    """Field names of a config class as a nested dict, with None at the leaves."""

    def below(annotation: Any) -> dict[str, Any] | None:
        is_config = isinstance(annotation, type) and issubclass(annotation, BaseModel)
        return tree_of(annotation) if is_config else None

    return {name: below(field.annotation) for name, field in kind.model_fields.items()}


def leaves(tree: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of all leaves of a nested dict."""
    names = []
    for key, value in tree.items():
        names += leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key]
    return names


def _resolve(tree: dict[str, Any], key: str) -> list[str]:
    names = leaves(tree)
    for candidate in (key, f"train.{key}", f"data.{key}"):
        if candidate in names:
            return candidate.split(".")
    tail = {name.rsplit(".", 1)[-1]: name for name in names}
    hint = nearest(key, names) if "." in key else nearest(key, tail)
    raise ConfigError(f"There is no setting {key!r}; {hint}")


def _set(tree: dict[str, Any], path: list[str], value: str) -> None:
    for part in path[:-1]:
        tree = tree[part]
    none = value.lower() in ("none", "null")
    if isinstance(tree[path[-1]], (tuple, list)):
        # Prompts contain commas, so a list of them is separated by semicolons.
        separator = ";" if ";" in value else ","
        parts = value.strip("()[]").split(separator)
        tree[path[-1]] = [] if none else [item.strip() for item in parts if item.strip()]
    elif none:
        tree[path[-1]] = None
    else:
        tree[path[-1]] = value
