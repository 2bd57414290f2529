"""Specifications of known GPUs, and measurements of this machine's CPU.

All peaks are for dense arithmetic. Where NVIDIA's data sheets (Ampere and later) state 16-bit
peaks with sparsity, which training cannot use, they are halved here. The fp32 peak is that of the
CUDA cores, which PyTorch uses for matrix products; its convolutions use TF32.
"""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import ConfigError, nearest
from ..precision import training_precision

TERA, GIGA = 1e12, 1e9
# GPUs per machine: NVIDIA's HGX and DGX, and the largest AWS instance of each GPU type below.
GPUS_PER_NODE = 8


@dataclass(frozen=True)
class Gpu:
    """Specification of one GPU.

    `memory`: nominal size in bytes. `half`: peak FLOP/s in fp16 and bf16; `single`: in fp32.
    `inside`, `between`: bytes per second, direction and GPU, inside a machine and between
    machines. `pattern`: regular expression for the lower-case `torch.cuda.get_device_name`.
    `bf16`: whether bf16 is supported.
    """

    memory: float
    half: float
    single: float
    inside: float
    between: float
    pattern: str
    bf16: bool = True

    def peak(self, precision: str) -> float | None:
        """Peak FLOP/s in fp32, bf16 or fp16; None if the GPU has no fast arithmetic for it."""
        if precision == "fp32":
            return self.single
        return self.half if precision == "fp16" or self.bf16 else None


def _gpu(
    memory: float,
    half: float,
    single: float,
    link: float,
    network: float,
    pattern: str,
    bf16: bool = True,
) -> Gpu:
    """A Gpu from the units of data sheets.

    `memory` in GB, `half` and `single` in TFLOP/s, `link` in GB/s summed over both directions,
    `network` in Gbit/s of a whole machine with 8 GPUs.
    """
    return Gpu(
        memory * GIGA,
        half * TERA,
        single * TERA,
        link / 2 * GIGA,
        network / 8 / GPUS_PER_NODE * GIGA,
        pattern,
        bf16,
    )


# Arguments: memory, 16-bit peak, fp32 peak, link (all from NVIDIA's data sheet of the GPU; NVLink,
# or PCIe without it), network of the named machine (AWS's pages of instance types), pattern.
# The first matching pattern wins.
GPUS: dict[str, Gpu] = {
    # HGX B200: 4.5 PFLOP/s with sparsity; p6-b200.48xlarge
    "b200": _gpu(180, 2250, 75, 1800, 3200, r"\bb200\b"),
    # H200 NVL: 1,671 TFLOP/s with sparsity; NVLink bridges of 2 or 4; network of 400 assumed
    "h200-nvl": _gpu(141, 835.5, 60, 900, 400, r"\bh200 nvl\b"),
    # H200 SXM: 1,979 TFLOP/s with sparsity; p5en.48xlarge
    "h200": _gpu(141, 989.5, 67, 900, 3200, r"\bh200\b"),
    # H100 PCIe: 1,513 TFLOP/s with sparsity; network of 400 assumed
    "h100-pcie": _gpu(80, 756.5, 51, 600, 400, r"\bh100 pcie\b"),
    # H100 NVL: 1,671 TFLOP/s with sparsity; network of 400 assumed
    "h100-nvl": _gpu(94, 835.5, 60, 600, 400, r"\bh100 nvl\b"),
    # H100 SXM: 1,979 TFLOP/s with sparsity; p5.48xlarge
    "h100": _gpu(80, 989.5, 67, 900, 3200, r"\bh100\b"),
    # A100 SXM 80 GB: data sheet peak without sparsity; p4de.24xlarge
    "a100-80gb": _gpu(80, 312, 19.5, 600, 400, r"\ba100.*80gb\b"),
    # A100 SXM 40 GB; p4d.24xlarge
    "a100": _gpu(40, 312, 19.5, 600, 400, r"\ba100\b"),
    # Data sheet peak without sparsity; PCIe 4; g6e.48xlarge
    "l40s": _gpu(48, 362, 91.6, 64, 400, r"\bl40s\b"),
    # 242 TFLOP/s with sparsity; PCIe 4; g6.48xlarge
    "l4": _gpu(24, 121, 30.3, 64, 100, r"\bl4\b"),
    # AWS's variant of the A10: 70 TFLOP/s without sparsity; PCIe 4; g5.48xlarge
    "a10g": _gpu(24, 70, 35, 64, 100, r"\ba10g\b"),
    # Data sheet peak without sparsity; PCIe 4; network of 100 assumed
    "a10": _gpu(24, 125, 31.2, 64, 100, r"\ba10\b"),
    # V100 SXM2 32 GB; p3dn.24xlarge
    "v100-32gb": _gpu(32, 125, 15.7, 300, 100, r"\bv100.*32gb\b", False),
    # V100 SXM2 16 GB; p3.16xlarge
    "v100": _gpu(16, 125, 15.7, 300, 25, r"\bv100\b", False),
    # PCIe 3; g4dn.metal
    "t4": _gpu(16, 65, 8.1, 32, 100, r"\bt4\b", False),
    # Ada white paper, with fp32 accumulation; PCIe 4; network of 100 assumed
    "rtx-4090": _gpu(24, 165.2, 82.6, 64, 100, r"\brtx 4090\b"),
    # Blackwell white paper, with fp32 accumulation; PCIe 5; network of 100 assumed
    "rtx-5090": _gpu(32, 209.5, 104.8, 128, 100, r"\brtx 5090\b"),
    "rtx-5080": _gpu(16, 112.6, 56.3, 128, 100, r"\brtx 5080\b"),
    # Ada white paper, with fp32 accumulation; PCIe 4; network of 100 assumed
    "rtx-4080": _gpu(16, 97.5, 48.7, 64, 100, r"\brtx 4080\b"),
    "rtx-4070": _gpu(12, 58.3, 29.2, 64, 100, r"\brtx 4070\b"),
    # Data sheets, without sparsity; PCIe 4; network of 100 assumed
    "rtx-6000-ada": _gpu(48, 364.2, 91.1, 64, 100, r"\brtx 6000 ada\b"),
    "a6000": _gpu(48, 154.8, 38.7, 64, 100, r"\ba6000\b"),
    "a40": _gpu(48, 149.7, 37.4, 64, 100, r"\ba40\b"),
    # Ampere GA102 and GA106, with fp32 accumulation; PCIe 4; network of 100 assumed
    "rtx-3080": _gpu(10, 59.5, 29.8, 64, 100, r"\brtx 3080\b"),
    "rtx-3060": _gpu(12, 25.5, 12.7, 64, 100, r"\brtx 3060\b"),
    # AMD's data sheet: peaks without sparsity, 7 links of 128 GB/s; network of 400 assumed
    "mi300x": _gpu(192, 1307.4, 163.4, 896, 400, r"\bmi300x\b"),
    # Ampere GA102 white paper, with fp32 accumulation; PCIe 4; network of 100 assumed
    "rtx-3090": _gpu(24, 71, 35.6, 64, 100, r"\brtx 3090\b"),
}
# Usable fraction of GPU memory; the rest is for the CUDA context, cuDNN, NCCL and fragmentation in
# the allocator. Our estimate, not from a source.
USABLE_GPU_MEMORY = 0.9
# Usable fraction of CPU memory: the plan counts bytes in use, and glibc's malloc holds up to 1.5
# times as much (`glide bench plan`).
USABLE_CPU_MEMORY = 1 / 1.5
# Default fraction of a GPU's peak that training reaches. Our estimate: not measured on a GPU.
UTILISATION = 0.35
# Seconds to launch an operation on a GPU, by PyTorch without CUDA graphs. A plain training loop of
# `filtered-base` with 16 images takes 0.188 s on an H100 (docs/benchmarks.md, "On a GPU") for its
# 4,112 operations, more than the arithmetic needs.
LAUNCH_SECONDS = 0.188 / 4112
# Bytes per second that a worker uploads. Our assumption: one stream to S3.
UPLOAD_BYTES_PER_S = 0.09 * GIGA
# Default fraction of a matrix product's FLOP/s that training reaches on a CPU (`glide bench plan`).
CPU_UTILISATION = 0.5
# Bytes per second between two workers on one CPU machine: gloo all-reduce of 100 MB, measured on
# two cores.
GLOO_BYTES_PER_S = 0.85 * GIGA
# Bytes per second between a GPU and its host. Our estimate: PCIe 4 x16 carries at most 32 GB/s.
PCIE_BYTES_PER_S = 25 * GIGA
# Parameters per second that torch's fused AdamW updates on the host, measured on two cores.
HOST_ADAM = 1.6 * GIGA
# Resident bytes of a CPU worker before its model is built: Python, PyTorch, DeepSpeed and one step
# of a tiny model (`glide bench plan`).
CPU_PROCESS = 0.59 * GIGA


def find_key(name: str) -> str:
    """The name of a GPU as the table writes it."""
    return name.lower().replace("_", "-").replace(" ", "-")


def gpu_named(name: str) -> Gpu:
    """The GPU with this name in the table. Raises ConfigError, which suggests the nearest name."""
    key = find_key(name)
    if key not in GPUS:
        raise ConfigError(
            f"There is no GPU {name!r} in the table; {nearest(key, [*GPUS, 'cpu'])} For another "
            "one, give --memory and --tflops."
        )
    return GPUS[key]


def find_gpu(device_name: str) -> Gpu | None:
    """The GPU for a name from `torch.cuda.get_device_name`, such as "NVIDIA H100 80GB HBM3".

    None if it is not in the table.
    """
    words = re.sub(r"[-_]", " ", device_name.lower())
    return next((gpu for gpu in GPUS.values() if re.search(gpu.pattern, words)), None)


def peak_flops(device_name: str, precision: str) -> float | None:
    """Peak FLOP/s of a GPU for dense arithmetic in fp32, bf16 or fp16, from its data sheet.

    None if the GPU is not in the table, or has no fast arithmetic in that precision.
    """
    gpu = find_gpu(device_name)
    return gpu.peak(precision) if gpu else None


def measured_peak(dtype: torch.dtype, device: str = "cpu", seconds: float = 0.2) -> float:
    """FLOP/s of a large matrix product on this machine: the fastest repetition within `seconds`.

    Uses PyTorch's current number of threads.
    """
    size = 1024 if device == "cpu" else 8192
    a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))

    def once() -> float:
        began = time.perf_counter()
        a @ b
        if device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    once()  # warm-up: kernel selection, and possibly compilation
    best, end = once(), time.perf_counter() + seconds
    while time.perf_counter() < end:
        best = min(best, once())
    return 2 * size**3 / best


def available_memory() -> float:
    """Bytes of free memory on this machine, or within the container's limit if that is less."""
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max":
            free = min(free, int(limit) - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    except (OSError, KeyError, ValueError):  # not Linux, or no cgroups
        pass
    return float(free)


def cpu_budget(workers: int = 1) -> float:
    """Memory budget in bytes for the tensors of each of `workers` workers on this machine."""
    return max(0.0, (available_memory() / workers - CPU_PROCESS) * USABLE_CPU_MEMORY)


# -- the machine of a worker -----------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """Resources of one worker.

    `budget`: bytes of memory to plan with. `flops`: FLOP/s that training reaches. `link`: bytes
    per second in one direction. `single`: FLOP/s in fp32, if `flops` are for another precision.
    `flops_origin`: origin of `flops`.
    """

    name: str
    budget: float
    flops: float
    link: float
    device: str = "cuda"
    single: float | None = None
    flops_origin: str = ""
    launch: float = 0.0  # seconds to launch an operation; 0 on a CPU


def find_machine(
    kind: str | None,
    workers: int,
    precision: str,
    utilisation: float | None = None,
    tflops: float | None = None,
    link: float | None = None,
    memory: float | None = None,
) -> Machine:
    """The machine to plan for, from the name of a GPU in the table, or "cpu" for this machine.

    `kind` None detects this machine's GPU, or else takes "cpu". `precision` may be "auto".
    `utilisation`: fraction of the peak that training reaches. `tflops` (TFLOP/s) and `link`
    (GB/s): measured values of one worker, which replace the estimates. `memory` (GB): of a GPU; a
    GPU outside the table needs `memory` and `tflops`. Raises ConfigError.
    """
    if (
        any(given is not None and given <= 0 for given in (utilisation, tflops, link, memory))
        or (utilisation or 0) > 1
    ):
        raise ConfigError(
            "The utilisation must lie above 0 and at most at 1, and FLOP/s, GB/s and GB above 0."
        )
    if kind is None:
        here = find_gpu(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
        kind = next((name for name, gpu in GPUS.items() if gpu is here), "cpu")
    on_cpu = kind.lower() == "cpu"
    part = utilisation or (CPU_UTILISATION if on_cpu else UTILISATION)
    flops_origin = (
        "as given"
        if tflops
        else f"{part:.0%} of {'the speed of a large matrix product' if on_cpu else 'its peak'}"
    )
    flops_origin += "" if tflops or utilisation else ", assumed"
    flops, link_speed = tflops * TERA if tflops else None, link * GIGA if link else None
    if on_cpu:
        return _cpu_machine(workers, precision, part, flops, link_speed, flops_origin)
    size = memory * GIGA if memory else None
    return _gpu_machine(kind, workers, precision, part, flops, link_speed, size, flops_origin)


def _cpu_machine(
    workers: int,
    precision: str,
    part: float,
    flops: float | None,
    link: float | None,
    flops_origin: str,
) -> Machine:
    low = torch.bfloat16 if training_precision(precision, "cpu") == "bf16" else torch.float32
    reached, single = (
        flops or measured_peak(dtype) * part / workers for dtype in (low, torch.float32)
    )
    return Machine(
        "cpu", cpu_budget(workers), reached, link or GLOO_BYTES_PER_S, "cpu", single, flops_origin
    )


def _gpu_machine(
    kind: str,
    workers: int,
    precision: str,
    part: float,
    flops: float | None,
    link: float | None,
    memory: float | None,
    flops_origin: str,
) -> Machine:
    precision = training_precision(precision, "cuda")
    if find_key(kind) not in GPUS and memory and flops:  # PCIe 4; network of 100 Gbit/s assumed
        gpu = _gpu(0, flops / TERA / part, flops / TERA / part, 64, 100, "")
    else:
        gpu = gpu_named(kind)
    peak = gpu.peak(precision)
    if peak is None:
        raise ConfigError(
            f"Setting train.precision: {kind} has no {precision} arithmetic; use fp16."
        )
    return Machine(
        kind.lower(),
        (memory or gpu.memory) * USABLE_GPU_MEMORY,
        flops or peak * part,
        link or (gpu.inside if workers <= GPUS_PER_NODE else gpu.between),
        "cuda",
        gpu.single * part,
        flops_origin,
        LAUNCH_SECONDS,
    )
