"""The application by the name that `serve deploy serve/config.yaml` and `serve run serve.app:app`
give it."""

from glide_ray.serving.deployment import app

__all__ = ["app"]
