"""Import path of the application for Ray Serve.

Used by `serve deploy serve/config.yaml` and `serve run serve.app:app`.
"""

from glide_ray.serving.deployment import app

__all__ = ["app"]
