"""API keys, from a file and from an environment variable.

The file, written by `glide key`, holds only hashes; the environment variable holds the keys.
"""

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

KEYS_VARIABLE = "GLIDE_API_KEYS"  # format: NAME:KEY,NAME:KEY


class Key(Frozen):
    """Hash and limits of an API key. The key has 256 random bits, so an unsalted hash is safe."""

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    # Maximum images in progress, and images per minute. None: only the server's own limits.
    at_once: int | None = Field(None, gt=0)
    per_minute: int | None = Field(None, gt=0)


def key_sha256(key: str) -> str:
    """SHA-256 of a key, as hexadecimal digits."""
    return hashlib.sha256(key.encode()).hexdigest()


def read_keys(path: str | None, environment: Mapping[str, str] = os.environ) -> dict[str, Key]:
    """API keys by name, from the file and the environment.

    Raises UserError, whose message shows no key.
    """
    keys: dict[str, Key] = {}
    if path:
        try:
            keys = {
                name: Key.model_validate(key)
                for name, key in json.loads(Path(path).read_text()).items()
            }
        except FileNotFoundError:
            raise UserError(
                f"There is no API key file {path}; make one with `glide key NAME --keys {path}`."
            ) from None
        except (ValueError, AttributeError, ValidationError):
            raise UserError(
                f"{path} is not an API key file; write one with `glide key`: "
                f"a JSON object of names, each with the key's sha256."
            ) from None
    for part in filter(None, environment.get(KEYS_VARIABLE, "").split(",")):
        name, colon, key = part.strip().partition(":")
        if not (name and colon and len(key) >= 16):
            raise UserError(
                f"{KEYS_VARIABLE} is malformed; write NAME:KEY,NAME:KEY with keys of at least 16 "
                f"characters."
            )
        keys[name] = Key(sha256=key_sha256(key))
    return keys


def new_key(
    name: str, path: Path, at_once: int | None = None, per_minute: int | None = None
) -> str:
    """Create a random key, add its hash to the file and return the key, which is stored nowhere.

    Raises UserError if the name is taken.
    """
    keys = read_keys(str(path), {}) if path.exists() else {}
    if name in keys:
        raise UserError(
            f"{path} has a key named {name!r}; choose another name, "
            f"or remove that key from the file first."
        )
    key = f"glide-{secrets.token_urlsafe(32)}"
    keys[name] = Key(sha256=key_sha256(key), at_once=at_once, per_minute=per_minute)
    put(
        json.dumps(
            {name: key.model_dump(exclude_none=True) for name, key in keys.items()}, indent=1
        ).encode(),
        path,
    )
    return key
