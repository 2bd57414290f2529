"""`glide doctor`: what this machine has for glide_ray, and what to do about the rest.

Runs where torch, Ray and the other packages are not installed.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from ..errors import UserError
from .arguments import Commands

MIN_PYTHON = (3, 10)
SERVER_PORT = 8000
RAY_PORTS = {8265: "Ray's dashboard", 6379: "Ray's head", 10001: "Ray's client server"}
DISK_BYTES = 2 * 2**30  # a corpus and a small run
STORE_BYTES = 512 * 2**20  # object store of a Ray that a command starts, and its margin


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    `remedy`: empty where all is well. `required`: a remedy here makes the exit status 1.
    """

    name: str
    text: str
    remedy: str = ""
    required: bool = False

    def __str__(self) -> str:
        mark = "ok     " if not self.remedy else "MISSING" if self.required else "note   "
        return f"{mark}  {self.name}: {self.text}" + (f"; {self.remedy}" if self.remedy else "")


def add_commands(commands: Commands) -> None:
    commands.add(
        "doctor",
        run,
        "check Python, compiler, torch, GPU, Ray, ports, disk and optional packages; "
        "exit status 1 if something required is missing",
    )


def run(options) -> None:
    """Print a line for each finding. Raises SystemExit(1) if something required is missing."""
    found = list(findings())
    for one in found:
        print(one)
    if any(one.required and one.remedy for one in found):
        raise SystemExit(1)


def findings() -> Iterator[Finding]:
    """All findings, in the order of the report."""
    yield _python()
    yield from _packages()
    yield from _torch()
    yield from _compiler()
    yield from _ray()
    yield from _ports()
    yield from _space()
    yield _npm()


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    remedy = "" if sys.version_info >= MIN_PYTHON else "install Python 3.10 to 3.13"
    return Finding("Python", f"{version} in {sys.prefix}", remedy, required=True)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _packages() -> Iterator[Finding]:
    """The core's packages, which are required, and those of each extra."""
    try:
        declared = metadata.requires("glide_ray") or []
    except metadata.PackageNotFoundError:
        yield Finding(
            "packages",
            "glide_ray is not installed, only its source is here",
            "run `make setup`, or `pip install --editable .` in the checkout",
            required=True,
        )
        return
    missing: dict[str, list[str]] = {"": []}
    for line in declared:
        [package] = re.findall(r"^[\w.-]+", line)
        extra = next(iter(re.findall(r"""extra == ["']([\w-]+)["']""", line)), "")
        if package != "glide_ray":
            lacking = missing.setdefault(extra, [])
            if _version(package) is None:
                lacking.append(package)
    core = missing.pop("")
    yield Finding(
        "packages of the core",
        f"missing {', '.join(core)}" if core else "installed",
        f"run `pip install {' '.join(core)}`" if core else "",
        required=True,
    )
    for extra, lacking in missing.items():
        if extra not in PURPOSES:
            continue  # of developers
        yield Finding(
            f"extra {extra}",
            f"missing {', '.join(lacking)}" if lacking else "installed",
            f"run `pip install 'glide_ray[{extra}]'` for {PURPOSES[extra]}" if lacking else "",
        )


PURPOSES = {
    "cluster": "training with several workers, serving, curation and evaluation",
    "emoji": "the emoji corpus",
    "clip": "guidance by a public CLIP",
    "judge": "`glide compose`, and features of `glide clean`",
    "language": "English captions in `glide clean`",
    "trackers": "MLflow and Weights & Biases",
}


def _torch() -> Iterator[Finding]:
    """torch, its GPUs and Triton."""
    if _version("torch") is None:
        return  # among the packages of the core
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Finding(
            "torch",
            f"cannot be imported ({str(error).splitlines()[0]})",
            "run `pip install --force-reinstall torch`",
            required=True,
        )
        return
    yield _gpu(torch)
    triton = _version("triton")
    if torch.cuda.is_available():
        yield Finding(
            "Triton",
            triton or "missing",
            "" if triton else "run `pip install triton`; without it GPUs make pictures slower",
        )
    else:
        yield Finding("Triton", triton or "not installed, and needed on GPUs only")


def _gpu(torch) -> Finding:
    version = f"{torch.__version__}, "
    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_properties(n) for n in range(torch.cuda.device_count())]
        names = ", ".join(f"{card.name} with {card.total_memory / 2**30:.0f} GiB" for card in cards)
        return Finding("torch", f"{version}CUDA {torch.version.cuda}, {names}")
    if shutil.which("nvidia-smi"):
        remedy = (
            "update the NVIDIA driver (`nvidia-smi` shows it)"
            if torch.version.cuda
            else "install a CUDA build of torch, see https://pytorch.org/get-started"
        )
        return Finding("torch", f"{version}and it cannot use this machine's GPU", remedy)
    return Finding("torch", f"{version}no GPU: models run on the CPU")


def _compiler() -> Iterator[Finding]:
    """A compiler and Python's headers, for code that is compiled at its first use.

    Required where DeepSpeed is installed (its CPU collectives), or Triton beside a GPU.
    """
    uses = _version("deepspeed") is not None or bool(shutil.which("nvidia-smi"))
    for name, variable, candidates in (
        ("C compiler", "CC", ("cc", "gcc", "clang")),
        ("C++ compiler", "CXX", ("c++", "g++", "clang++")),
    ):
        given = os.environ.get(variable, "").split()[:1]
        path = next(filter(None, map(shutil.which, given or candidates)), None)
        yield Finding(
            name,
            path or "missing; DeepSpeed, Triton and torch.compile need one",
            "" if path else "run `apt-get install build-essential`, or set " + variable,
            required=uses,
        )
    header = Path(sysconfig.get_path("include"), "Python.h")
    there = header.exists()
    yield Finding(
        "Python.h",
        str(header) if there else f"not in {header.parent}; Triton and DeepSpeed need it",
        "" if there else "run `apt-get install python3-dev`, or that of this Python's version",
        required=uses,
    )


def _ray() -> Iterator[Finding]:
    version, address = _version("ray"), os.environ.get("RAY_ADDRESS")
    if version is None:
        yield Finding("Ray", "not installed; `glide generate`, `edit`, `vary` and `scene` go on")
        return
    yield Finding("Ray", version)
    token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", Path.home() / ".ray" / "auth_token"))
    mode = os.environ.get("RAY_AUTH_MODE")
    if token.is_file() or os.environ.get("RAY_AUTH_TOKEN"):
        where = "RAY_AUTH_TOKEN" if os.environ.get("RAY_AUTH_TOKEN") else str(token)
        text = f"in {where}; glide uses it" if mode in (None, "token") else f"off by {mode=}"
        yield Finding("Ray's token", f"{text}, `ray job submit` where RAY_AUTH_MODE=token is set")
    else:
        yield Finding(
            "Ray's token",
            f"no file {token}",
            "copy it from the cluster's head, or run `ray get-auth-token --generate`"
            if address or mode == "token"
            else "",
        )
    if address:
        yield _cluster(address)


def _cluster(address: str) -> Finding:
    if address.startswith("http"):
        return Finding("RAY_ADDRESS", f"{address}, for `ray job submit`")
    try:
        from ..distributed.cluster import check_address

        check_address(address)
    except UserError as error:
        text, _, remedy = str(error).rstrip(".").partition("; ")
        return Finding("RAY_ADDRESS", text, remedy, required=True)
    return Finding("RAY_ADDRESS", f"{address} answers")


def _ports() -> Iterator[Finding]:
    for port, use in {SERVER_PORT: "`glide serve`", **RAY_PORTS}.items():
        with socket.socket() as attempt:
            taken = attempt.connect_ex(("127.0.0.1", port)) == 0
        if not taken:
            yield Finding(f"port {port}", f"free for {use}")
        elif port == SERVER_PORT:
            yield Finding(
                f"port {port}", f"taken by {_owner(port)}", "serve with `glide serve --port 8001`"
            )
        else:
            yield Finding(f"port {port}", f"taken by {_owner(port)}, as while Ray runs: {use}")


def _owner(port: int) -> str:
    """The program that listens on a port of this machine, as far as this user may know it."""
    try:
        import psutil

        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port:
                process = psutil.Process(connection.pid)
                return f"{process.name()} (process {process.pid})"
    except Exception:  # psutil is missing, or refuses another user's process
        pass
    return "another program"


def _space() -> Iterator[Finding]:
    here = Path.cwd()
    for name, folder, least, remedy in (
        ("disk", here, DISK_BYTES, "make room, or work in another folder"),
        (
            "/dev/shm",
            Path("/dev/shm"),
            STORE_BYTES,
            "in a container, start it with --shm-size=2g; Ray uses the slower /tmp without it",
        ),
    ):
        if folder.is_dir():
            free = shutil.disk_usage(folder).free
            yield Finding(
                name,
                f"{free / 2**30:.1f} GiB free in {folder}",
                "" if free >= least else remedy,
                required=folder == here,
            )


def _npm() -> Finding:
    beside = Path(sys.executable).parent / "npm"
    found = str(beside) if beside.exists() else shutil.which("npm")
    return Finding(
        "npm",
        found or "missing",
        ""
        if found
        else "run `pip install 'glide_ray[emoji]'` for the emoji corpus; pictures need no npm",
    )
