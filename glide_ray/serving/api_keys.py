"""API keys: only their hashes are kept, in a file that `glide key` writes, or keys themselves in the environment."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from pydantic import Field, ValidationError

from ..config.models import Frozen
from ..errors import UserError
from ..storage import put

VARIABLE = "GLIDE_API_KEYS"  # NAME:KEY,NAME:KEY


class Key(Frozen):
    """Who may ask, and for how much. The key is 256 random bits, so that a plain hash keeps it."""

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    at_once: int | None = Field(None, gt=0)  # images being made; None: as many as the server takes
    per_minute: int | None = Field(None, gt=0)  # images


def hashed(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def read_keys(path: str | None, environment: Mapping[str, str] = os.environ) -> dict[str, Key]:
    """The keys by name, of the file and of the environment. Raises UserError, which shows no key."""
    keys = {}
    if path:
        try:
            keys = {
                name: Key.model_validate(key)
                for name, key in json.loads(Path(path).read_text()).items()
            }
        except FileNotFoundError:
            raise UserError(
                f"There is no file of keys {path}; make one with `glide key NAME --keys {path}`."
            ) from None
        except (ValueError, AttributeError, ValidationError):
            raise UserError(
                f"{path} is not a file of keys as `glide key` writes them: a JSON object of names, each with the key's sha256."
            ) from None
    for part in filter(None, environment.get(VARIABLE, "").split(",")):
        name, colon, key = part.strip().partition(":")
        if not (name and colon and len(key) >= 16):
            raise UserError(
                f"{VARIABLE} is not understood; write NAME:KEY,NAME:KEY with keys of 16 characters or more."
            )
        keys[name] = Key(sha256=hashed(key))
    return keys


def new_key(
    name: str, path: Path, at_once: int | None = None, per_minute: int | None = None
) -> str:
    """Draw a key, put its hash into the file and return it: it is nowhere else. Raises UserError where the name is taken."""
    keys = read_keys(str(path), {}) if path.exists() else {}
    if name in keys:
        raise UserError(
            f"{path} has a key named {name!r}; take it out of the file first, or choose another name."
        )
    key = f"glide-{secrets.token_urlsafe(32)}"
    keys[name] = Key(sha256=hashed(key), at_once=at_once, per_minute=per_minute)
    put(
        json.dumps(
            {name: key.model_dump(exclude_none=True) for name, key in keys.items()}, indent=1
        ).encode(),
        path,
    )
    return key
