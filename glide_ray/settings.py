"""`key=value` settings onto a config, what users type checked and refused in a sentence, and a reference of all settings."""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Iterable
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from .config import TAGS, ConfigError, Frozen, nearest
from .storage import is_remote

Config = TypeVar("Config", bound=Frozen)


def override(preset: Config, settings: Iterable[str]) -> Config:
    """Apply `key=value` settings such as `train.steps=500` to a preset, or to another config.

    A dotted key names a field; a bare one is looked up in `train`, then `data`. Raises ConfigError with the nearest key.
    """
    tree = preset.model_dump()
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise ConfigError(f"{setting!r} is not of the form key=value, such as train.steps=500.")
        _set(tree, _resolve(tree, key.strip()), value.strip())
    return validate(type(preset), tree)


def validate(kind: type[Frozen], tree: dict[str, Any]):
    """`kind.model_validate(tree)` with pydantic's report turned into one sentence. Raises ConfigError."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"] if part not in TAGS) or kind.__name__
        if first["type"] == "extra_forbidden":
            raise ConfigError(f"There is no setting {where!r}; {nearest(where, leaves(tree_of(kind)))}") from None
        given = "" if isinstance(first["input"], dict) else f" (given: {first['input']!r})"
        raise ConfigError(f"Setting {where}: {first['msg'].removeprefix('Value error, ')}{given}.") from None


def tree_of(kind: type[Frozen]) -> dict[str, Any]:
    """The field names of a config class as a nested dict, with None at the leaves."""
    return {name: tree_of(field.annotation) if isinstance(field.annotation, type)
            and issubclass(field.annotation, BaseModel) else None for name, field in kind.model_fields.items()}


def leaves(tree: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of all leaves of a nested dict."""
    return [name for key, value in tree.items()
            for name in (leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key])]


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
        parts = value.strip("()[]").split(";" if ";" in value else ",")      # prompts hold commas
        tree[path[-1]] = [] if none else [item.strip() for item in parts if item.strip()]
    elif none:
        tree[path[-1]] = None
    else:
        tree[path[-1]] = value


# -- the reference ----------------------------------------------------------------------------------------------------

def reference(kinds: Iterable[type[Frozen]]) -> str:
    """All settings of some config classes, in Markdown: name, kind, default, and what the class's source says beside the field."""
    parts = []
    for kind in kinds:
        rows = [f"| `{name}` | {_kind(field.annotation)} | {_default(field)} | {_beside(kind).get(name, '')} |" for name, field in kind.model_fields.items()]
        parts.append("\n".join([f"## {kind.__name__}", "", " ".join((kind.__doc__ or "").split()), "",
                                "| setting | kind | default | |", "|---|---|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def _beside(kind: type[Frozen]) -> dict[str, str]:
    """The comment at the end of each field's line."""
    classes = [one for one in reversed(kind.__mro__) if issubclass(one, Frozen)]
    lines = (re.match(r"    (\w+): [^#]*?(?:#\s*(.*))?$", line) for one in classes for line in inspect.getsource(one).splitlines())
    return {line[1]: (line[2] or "").replace("|", "\\|") for line in lines if line and line[1] in kind.model_fields}


def _kind(annotation: Any) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin is Annotated:
        return _kind(inner[0])
    if origin in (Union, UnionType):
        return " or ".join(_kind(one) for one in inner)
    if origin is tuple:
        return f"list of {_kind(inner[0])}" if inner[-1] is Ellipsis else " and ".join(_kind(one) for one in inner)
    if origin is dict:
        return f"{_kind(inner[0])} to {_kind(inner[1])}"
    names = {"str": "text", "int": "whole number", "float": "number", "bool": "true or false", "NoneType": "`none`"}
    return names.get(annotation.__name__, annotation.__name__)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return ""
    if isinstance(field.default, BaseModel):
        changed = {name: value for name, value in field.default.model_dump().items() if value != type(field.default).model_fields[name].default}
        return ", ".join(f"{name} `{value}`" for name, value in changed.items()) or "its own"
    shown = ", ".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
    return "`none`" if shown in (None, "") else f"`{shown}`"


def local_path(text: str) -> Path:
    """A type of argparse: pathlib makes a folder named s3: of a URL."""
    if is_remote(text):
        raise argparse.ArgumentTypeError(f"{text} is not on this machine; give a local path")
    return Path(text)


def positive(text: str) -> int:
    """A type of argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 upwards")
    return int(text)
