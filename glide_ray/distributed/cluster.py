"""Connect this process to Ray: join an existing cluster, or start a small one on this machine."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import ray
import ray.cloudpickle

from ..errors import UserError

# logical CPUs: enough for two training workers and their data tasks, or the three deployments
LAPTOP_CPUS = 4
# a small store is enough: it holds encoded images, not decoded pixels
OBJECT_STORE_BYTES = 384 * 2**20


def connect(cpus: int) -> None:
    """Join the cluster that RAY_ADDRESS names, or start one here with at least `cpus` logical CPUs.

    Logical CPUs only limit how many tasks run at once. Two training workers hold two of them and
    each data task needs a whole one more, so a two-core laptop declares more than it has cores.
    Does nothing when already connected. Raises UserError for a RAY_ADDRESS that cannot be joined.
    """
    if ray.is_initialized():
        return
    environment = _worker_environment()
    if joined():
        try:
            ray.init(log_to_driver=False, logging_level=logging.WARNING)
        except ValueError as error:
            raise UserError(
                f"RAY_ADDRESS={os.environ['RAY_ADDRESS']} is not where a driver joins a cluster "
                f"({str(error).splitlines()[0]}); give HOST:6379, or "
                f"submit the script of jobs/ to the address that begins with http."
            ) from None
        return
    os.environ.update(environment)
    # Ray Data logs a line at the end of every stream.
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    # Ray enables token authentication for a new cluster, as it should; users need no message.
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
    """Whether the cluster existed before `connect`, and so may grow."""
    return bool(os.environ.get("RAY_ADDRESS"))


def takes_gpu(device: str) -> bool:
    """Whether a worker with this `device` setting (auto, cpu or gpu) uses a GPU.

    "auto" means a GPU only if the cluster has one now: Ray does not report whether an autoscaler
    could add one.
    """
    return device == "gpu" or (device == "auto" and bool(ray.cluster_resources().get("GPU")))


def send_with(functions: Iterable[Callable]) -> None:
    """Pickle a user's functions by value: other nodes have no copy of the file defining them."""
    for function in functions:
        module = sys.modules.get(getattr(function, "__module__", None))
        if module is not None and not module.__name__.startswith("glide_ray."):
            # ray.cloudpickle has its own registry, separate from that of the cloudpickle package.
            ray.cloudpickle.register_pickle_by_value(module)


def disconnect() -> None:
    """Disconnect from Ray, and stop a cluster that `connect` started."""
    if ray.is_initialized():
        ray.shutdown()


def _worker_environment() -> dict[str, str]:
    """Environment variables that the raylet, and so every worker, inherits.

    PATH leads to ninja beside the interpreter.
    """
    binaries = [str(Path(sys.executable).parent), *os.environ.get("PATH", "").split(os.pathsep)]
    return {
        "PATH": os.pathsep.join(dict.fromkeys(binaries)),
        # No warning about unused GPUs from every worker on a CPU. With this setting Ray hides no
        # GPU from tasks that request none (see training/samples.py).
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_TRAIN_V2_ENABLED": "1",
        # Seconds that Ray Train waits for workers on lost nodes before it counts the nodes again.
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",
    }
