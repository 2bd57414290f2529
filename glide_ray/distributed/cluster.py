"""Ray for one process: join the cluster at hand, or start a small one fit for a laptop."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import ray
import ray.cloudpickle

from ..errors import UserError

LAPTOP_CPUS = 4  # two trainers and their data, or the three deployments
OBJECT_STORE_BYTES = 384 * 2**20  # bytes of images, not pixels, pass through it: little is enough


def connect(cpus: int) -> None:
    """Join the cluster that RAY_ADDRESS names, or start one here with at least `cpus` logical CPUs.

    Logical CPUs only admit tasks: two trainers hold two of them while data tasks want a whole one of their own, so on
    a two-core laptop more are declared than there are cores. Does nothing when already connected.
    """
    if ray.is_initialized():
        return
    environment = _worker_environment()
    if joined():
        try:
            ray.init(log_to_driver=False, logging_level=logging.WARNING)
        except ValueError as error:
            raise UserError(
                f"RAY_ADDRESS={os.environ['RAY_ADDRESS']} is not where a driver joins a cluster ({str(error).splitlines()[0]}); give HOST:6379, or "
                f"submit the script of jobs/ to the address that begins with http."
            ) from None
        return
    os.environ.update(environment)
    # Ray turns token authentication on for a new cluster by itself, which is as it should be and no news to the user.
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # a line at the end of every stream
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(
        logging.ERROR
    )
    ray.init(
        address="local",
        num_cpus=max(cpus, LAPTOP_CPUS, os.cpu_count() or 1),
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.WARNING,
    )


def joined() -> bool:
    """Whether the cluster is one that was there before, and may grow; not one of `connect`'s own."""
    return bool(os.environ.get("RAY_ADDRESS"))


def takes_gpu(device: str) -> bool:
    """Whether a worker of this `device`, auto, cpu or gpu, takes a GPU. Of a cluster that has none yet Ray does not say whether it can have some."""
    return device == "gpu" or (device == "auto" and bool(ray.cluster_resources().get("GPU")))


def send_with(functions: Iterable[Callable]) -> None:
    """Let a user's own functions travel to the workers by value: other nodes have no copy of the file that they stand in."""
    for function in functions:
        module = sys.modules.get(getattr(function, "__module__", None))
        if module is not None and not module.__name__.startswith("glide_ray."):
            ray.cloudpickle.register_pickle_by_value(
                module
            )  # Ray's own copy of cloudpickle knows nothing of the other's list


def disconnect() -> None:
    """End what `connect` started."""
    if ray.is_initialized():
        ray.shutdown()


def _worker_environment() -> dict[str, str]:
    """Inherited by the raylet and so by every worker: they find the checkout's `serve/`, and ninja beside the interpreter."""
    root = str(Path(__file__).resolve().parents[2])
    paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    binaries = [str(Path(sys.executable).parent), *os.environ.get("PATH", "").split(os.pathsep)]
    return {
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)),
        "PATH": os.pathsep.join(dict.fromkeys(binaries)),
        # One line a warning about unused GPUs per worker helps nobody on a CPU.
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_TRAIN_V2_ENABLED": "1",
        # How long Ray Train waits for workers on nodes that are gone before it counts the nodes again.
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",
    }
