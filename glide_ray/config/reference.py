"""Reference of all settings as Markdown, for `glide settings` and docs/configuration.md."""

from __future__ import annotations

from collections.abc import Iterable
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from .models import Frozen

TYPES = {
    "str": "text",
    "int": "whole number",
    "float": "number",
    "bool": "true or false",
    "NoneType": "`none`",
}


def reference(configs: Iterable[type[Frozen]]) -> str:
    """Markdown tables of all settings of config classes: name, type, default and description."""
    return "\n\n".join(map(_section, configs)) + "\n"


def _section(config: type[Frozen]) -> str:
    rows = [
        f"| `{name}` | {_type(field.annotation)} | {_default(field)} | "
        f"{(field.description or '').replace('|', chr(92) + '|')} |"
        for name, field in config.model_fields.items()
    ]
    about = " ".join((config.__doc__ or "").split())
    return "\n".join(
        [
            f"## {config.__name__}",
            "",
            about,
            "",
            "| setting | type | default | meaning |",
            "|---|---|---|---|",
            *rows,
        ]
    )


def _type(annotation: Any) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin is Annotated:
        return _type(inner[0])
    if origin in (Union, UnionType):
        return " or ".join(_type(one) for one in inner)
    if origin is tuple:
        if inner[-1] is Ellipsis:
            return f"list of {_type(inner[0])}"
        return " and ".join(_type(one) for one in inner)
    if origin is dict:
        return f"{_type(inner[0])} to {_type(inner[1])}"
    name: str = annotation.__name__
    return TYPES.get(name, name)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return ""
    if isinstance(field.default, BaseModel):
        return _changed(field.default)
    many = isinstance(field.default, tuple)
    shown = ", ".join(map(str, field.default)) if many else field.default
    return "`none`" if shown in (None, "") else f"`{shown}`"


def _changed(config: BaseModel) -> str:
    """Fields of a nested default config that differ from the defaults of its own class."""
    fields = type(config).model_fields
    changed = {
        name: value for name, value in config.model_dump().items() if value != fields[name].default
    }
    return ", ".join(f"{name} `{value}`" for name, value in changed.items()) or "its own"
