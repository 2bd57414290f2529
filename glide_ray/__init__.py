"""GLIDE (Nichol et al. 2021): text-to-image diffusion, trained and served on Ray or a laptop.

    import glide_ray
    cascade = glide_ray.load()                    # the shipped weights
    pixels = cascade.generate(["a red apple, 3D render"], [0])[0]      # uint8 (256, 256, 3)

`import glide_ray` does not import torch: the public names are imported at first use.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config.sampling import SampleOptions
    from .errors import UserError
    from .sampling.cascade import Cascade

__all__ = ["Cascade", "SampleOptions", "UserError", "__version__", "load"]

try:
    __version__ = version("glide_ray")
except PackageNotFoundError:  # source tree on sys.path, package not installed
    __version__ = "0"

_MODULES = {
    "Cascade": ".sampling.cascade",
    "SampleOptions": ".config.sampling",
    "UserError": ".errors",
}


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name], __name__), name)


def __dir__() -> list[str]:
    return __all__


def load(base: str = "emoji", **options) -> "Cascade":
    """Load the shipped weights, or those at `base`.

    `options`: keyword arguments of `Cascade.load`. Raises WeightsError.
    """
    from .sampling.cascade import Cascade

    return Cascade.load(base, **options)
