"""Connect this process to Ray: join an existing cluster, or start a small one on this machine."""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

import ray
import ray.cloudpickle
from ray._common.tls_utils import load_certs_from_env
from ray._private.grpc_utils import init_grpc_channel
from ray._private.utils import read_ray_address
from ray._raylet import AuthenticationTokenLoader, Config
from ray.core.generated.gcs_service_pb2 import GetClusterIdRequest
from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub

from ..errors import UserError
from ..interrupts import kept_sigterm
from ..progress import write_line
from .noise import keep_off_terminal

# logical CPUs: enough for two training workers and their data tasks, or the three deployments
LAPTOP_CPUS = 4
# a small store is enough: it holds encoded images, not decoded pixels
OBJECT_STORE_BYTES = 384 * 2**20
ANSWER_SECONDS = 10.0  # seconds in which the head of a cluster has to answer
SLOW_START = "Ray has not started yet; a busy machine takes up to a minute."


def connect(cpus: int) -> None:
    """Join the cluster that RAY_ADDRESS names, or start one here with at least `cpus` logical CPUs.

    Logical CPUs only limit how many tasks run at once. Two training workers hold two of them and
    each data task needs a whole one more, so a two-core laptop declares more than it has cores.
    Does nothing when already connected. Raises UserError for a RAY_ADDRESS that cannot be joined,
    within ANSWER_SECONDS, and for a Ray that does not start.
    """
    if ray.is_initialized():
        return
    keep_off_terminal()
    # Users need no message that a new cluster has a token, or that a file shows no progress bars.
    for name in ("_private.authentication.authentication_token_setup", "data._internal.progress"):
        logging.getLogger(f"ray.{name}").setLevel(logging.ERROR)
    if is_connected():
        _join(os.environ["RAY_ADDRESS"])
    else:
        _use_token()
        _start(max(cpus, LAPTOP_CPUS, os.cpu_count() or 1))


def _use_token() -> bool:
    """Set RAY_AUTH_MODE=token if it is not set and Ray finds a token; whether it did so."""
    if "RAY_AUTH_MODE" in os.environ or not AuthenticationTokenLoader.instance().has_token(
        ignore_auth_mode=True
    ):
        return False
    os.environ["RAY_AUTH_MODE"] = "token"
    Config.initialize("")  # Ray read its environment at import
    return True


def _join(address: str) -> None:
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    target = check_address(address)
    try:
        with kept_sigterm():
            ray.init(target, log_to_driver=False, logging_level=logging.WARNING)
    except ValueError as error:
        raise UserError(
            f"RAY_ADDRESS={address} is not where a driver joins a cluster "
            f"({_first_line(error)}); give HOST:6379, or "
            f"submit the script of jobs/ to the address that begins with http."
        ) from None
    except (ConnectionError, RuntimeError, OSError) as error:
        raise UserError(
            f"The cluster at RAY_ADDRESS={address} cannot be joined ({_first_line(error)}); run "
            f"this on one of its nodes, with the same versions of Python and Ray."
        ) from None


def check_address(address: str) -> str:
    """Return `address`, with "auto" resolved, after its Ray head has accepted this client.

    Uses the token that Ray finds if the head wants one, and only then: a driver in token mode
    refuses the messages of a head that has no token, and the head then destroys its actors.

    `address`: HOST:PORT, ray://HOST:PORT or auto; anything else is left to Ray. Raises UserError
    within ANSWER_SECONDS for each attempt; Ray's own attempts take minutes.
    """
    target = (read_ray_address() or address) if address == "auto" else address
    if not re.fullmatch(r"(ray://)?[^/]+:\d+", target):
        return target
    import grpc  # after Ray, whose extra a message should name where both are missing

    try:
        if target.startswith("ray://"):  # this client sends its token and receives no calls
            _use_token()
            with init_grpc_channel(target.removeprefix("ray://")) as channel:
                grpc.channel_ready_future(channel).result(ANSWER_SECONDS)
        elif _accepts(target, with_token=False):
            if os.environ.get("RAY_AUTH_MODE") == "token":
                raise UserError(
                    f"The cluster at RAY_ADDRESS={address} has no token, so this process may not "
                    f"want one; unset RAY_AUTH_MODE, or start its head with RAY_AUTH_MODE=token."
                )
        else:
            token_mode = _use_token() or os.environ.get("RAY_AUTH_MODE") == "token"
            if not token_mode or not _accepts(target, with_token=True):
                raise UserError(
                    f"The cluster at RAY_ADDRESS={address} wants its token; copy ~/.ray/auth_token "
                    f"from its head to this machine, or set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN."
                )
    except (grpc.RpcError, grpc.FutureTimeoutError):
        raise _no_cluster_error(address) from None
    return target


def _accepts(target: str, with_token: bool) -> bool:
    """Whether the head at HOST:PORT answers a client that sends its token, or none.

    Raises grpc.RpcError if no head answers.
    """
    import grpc

    if with_token:
        channel = init_grpc_channel(target)
    elif os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
        certificate, key, authority = load_certs_from_env()
        credentials = grpc.ssl_channel_credentials(authority, key, certificate)
        channel = grpc.secure_channel(target, credentials)
    else:
        channel = grpc.insecure_channel(target)
    with channel:
        try:
            head = NodeInfoGcsServiceStub(channel)
            head.GetClusterId(GetClusterIdRequest(), timeout=ANSWER_SECONDS)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                return False
            raise
    return True


def _no_cluster_error(address: str) -> UserError:
    return UserError(
        f"No Ray cluster answers at RAY_ADDRESS={address}; check the address and the head, or "
        f"unset RAY_ADDRESS to start Ray on this machine."
    )


def _start(cpus: int) -> None:
    os.environ.update(_worker_environment())
    # Ray Data logs a line at the end of every stream.
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    patience = threading.Timer(ANSWER_SECONDS, lambda: write_line(SLOW_START))
    patience.daemon = True
    patience.start()
    try:
        with kept_sigterm():
            ray.init(
                address="local",
                num_cpus=cpus,
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.WARNING,
            )
    except Exception as error:  # Ray raises bare Exceptions, too
        raise UserError(
            f"Ray does not start on this machine ({_first_line(error)}); `glide doctor` checks "
            f"what it needs, and Ray's logs are in {_log_folder()}."
        ) from None
    finally:
        patience.cancel()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300].rstrip(".:")


def _log_folder() -> str:
    return os.path.join(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "session_latest", "logs")


def is_connected() -> bool:
    """Whether the cluster existed before `connect`, and so may grow."""
    return bool(os.environ.get("RAY_ADDRESS"))


def uses_gpu(device: str) -> bool:
    """Whether a worker with this `device` setting (auto, cpu or gpu) uses a GPU.

    "auto" means a GPU only if the cluster has one now: Ray does not report whether an autoscaler
    could add one.
    """
    return device == "gpu" or (device == "auto" and bool(ray.cluster_resources().get("GPU")))


def ship_modules(functions: Iterable[Callable]) -> None:
    """Pickle a user's functions by value: other nodes have no copy of the file defining them."""
    for function in functions:
        module = sys.modules.get(getattr(function, "__module__", ""))
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
