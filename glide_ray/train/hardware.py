"""What machines can do: GPUs by name, and measurements of this machine's CPU.

Peaks are those of dense arithmetic. NVIDIA's data sheets give the 16-bit ones of Ampere and later with a sparsity that training has none
of, and those are halved here. fp32 is that of the ordinary cores, which PyTorch multiplies matrices with; its convolutions use TF32.
"""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import ConfigError, nearest
from .optimizer import training_precision

TERA, GIGA = 1e12, 1e9
NODE = 8  # GPUs in one machine: NVIDIA's HGX and DGX, and the largest of AWS's instances of each kind below


@dataclass(frozen=True)
class Gpu:
    """`memory` in bytes, as sold; `half` and `single` in FLOP/s, of fp16 and bf16 and of fp32; links in bytes a second and direction, for each
    GPU: `inside` a machine and `between` machines. `pattern` matches what `torch.cuda.get_device_name` says, in lower case."""

    memory: float
    half: float
    single: float
    inside: float
    between: float
    pattern: str
    bf16: bool = True

    def peak(self, precision: str) -> float | None:
        """FLOP/s in fp32, bf16 or fp16; None for a precision that it has no fast arithmetic of."""
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
    """From the units of data sheets: GB, TFLOP/s, GB/s in both directions together, and Gbit/s of a whole machine of 8."""
    return Gpu(
        memory * GIGA,
        half * TERA,
        single * TERA,
        link / 2 * GIGA,
        network / 8 / NODE * GIGA,
        pattern,
        bf16,
    )


# Each line: memory, 16-bit peak, fp32 peak, link, from NVIDIA's data sheet of that GPU; NVLink where it has one, else its PCIe; then the
# network of the machine named (AWS's pages of instance types). The first pattern that matches counts.
GPUS: dict[str, Gpu] = {
    "b200": _gpu(
        180, 2250, 75, 1800, 3200, r"\bb200\b"
    ),  # HGX B200: 4.5 PFLOP/s with sparsity; p6-b200.48xlarge
    "h200-nvl": _gpu(
        141, 835.5, 60, 900, 400, r"\bh200 nvl\b"
    ),  # 1,671 with sparsity; bridges of 2 or 4; a network of 400 assumed
    "h200": _gpu(
        141, 989.5, 67, 900, 3200, r"\bh200\b"
    ),  # H200 SXM: 1,979 with sparsity; p5en.48xlarge
    "h100-pcie": _gpu(
        80, 756.5, 51, 600, 400, r"\bh100 pcie\b"
    ),  # 1,513 with sparsity; a network of 400 assumed
    "h100-nvl": _gpu(
        94, 835.5, 60, 600, 400, r"\bh100 nvl\b"
    ),  # 1,671 with sparsity; a network of 400 assumed
    "h100": _gpu(
        80, 989.5, 67, 900, 3200, r"\bh100\b"
    ),  # H100 SXM: 1,979 with sparsity; p5.48xlarge
    "a100-80gb": _gpu(
        80, 312, 19.5, 600, 400, r"\ba100.*80gb\b"
    ),  # A100 SXM, given without sparsity; p4de.24xlarge
    "a100": _gpu(40, 312, 19.5, 600, 400, r"\ba100\b"),  # A100 SXM 40 GB; p4d.24xlarge
    "l40s": _gpu(
        48, 362, 91.6, 64, 400, r"\bl40s\b"
    ),  # given without sparsity; PCIe 4; g6e.48xlarge
    "l4": _gpu(24, 121, 30.3, 64, 100, r"\bl4\b"),  # 242 with sparsity; PCIe 4; g6.48xlarge
    "a10g": _gpu(
        24, 70, 35, 64, 100, r"\ba10g\b"
    ),  # AWS's own A10: 70 without sparsity; PCIe 4; g5.48xlarge
    "a10": _gpu(
        24, 125, 31.2, 64, 100, r"\ba10\b"
    ),  # given without sparsity; PCIe 4; a network of 100 assumed
    "v100-32gb": _gpu(
        32, 125, 15.7, 300, 100, r"\bv100.*32gb\b", False
    ),  # V100 SXM2; p3dn.24xlarge
    "v100": _gpu(16, 125, 15.7, 300, 25, r"\bv100\b", False),  # V100 SXM2; p3.16xlarge
    "t4": _gpu(16, 65, 8.1, 32, 100, r"\bt4\b", False),  # PCIe 3; g4dn.metal
    "rtx-4090": _gpu(
        24, 165.2, 82.6, 64, 100, r"\brtx 4090\b"
    ),  # Ada white paper, fp32 sums; PCIe 4; a network of 100 assumed
    "rtx-3090": _gpu(
        24, 71, 35.6, 64, 100, r"\brtx 3090\b"
    ),  # Ampere GA102 white paper, fp32 sums; PCIe 4; likewise
}
# Of a GPU's memory, what is planned with. The rest is for CUDA's context, cuDNN, NCCL and what the allocator cannot use. Ours.
USABLE = 0.9
# Of a CPU's. The trainer's figure is of what is in use; glibc's malloc holds up to 1.5 times that (`glide bench plan`).
CPU_USABLE = 1 / 1.5
UTILISATION = 0.35  # the part of a GPU's peak that training is taken to reach, unless it is given. Ours: not measured on one.
CPU_UTILISATION = 0.5  # of what a matrix product reaches on a CPU (`glide bench plan`)
GLOO = (
    0.85 * GIGA
)  # bytes a second between two workers on one machine's CPU: gloo's all-reduce of 100 MB, measured on two cores
PCIE = (
    25 * GIGA
)  # bytes a second of copies between a GPU and its host: PCIe 4 x16 carries 32 at the most. Ours.
HOST_ADAM = (
    1.6 * GIGA
)  # parameters a second that torch's fused AdamW steps on the host: measured on two cores
# What a worker on a CPU has resident before a model is built: Python, PyTorch, DeepSpeed and one step of a tiny model (`glide bench plan`).
CPU_PROCESS = 0.59 * GIGA


def gpu_named(name: str) -> Gpu:
    """The GPU of a name in the table. Raises ConfigError with the nearest for an unknown one."""
    key = name.lower().replace("_", "-").replace(" ", "-")
    if key not in GPUS:
        raise ConfigError(f"There is no GPU {name!r} in the table; {nearest(key, [*GPUS, 'cpu'])}")
    return GPUS[key]


def find_gpu(device_name: str) -> Gpu | None:
    """The GPU that `torch.cuda.get_device_name` names, such as "NVIDIA H100 80GB HBM3"; None for one that is not in the table."""
    words = re.sub(r"[-_]", " ", device_name.lower())
    return next((gpu for gpu in GPUS.values() if re.search(gpu.pattern, words)), None)


def peak_flops(device_name: str, precision: str) -> float | None:
    """FLOP/s of dense arithmetic in fp32, bf16 or fp16 that the data sheet of a GPU gives; None where nothing is known of it."""
    gpu = find_gpu(device_name)
    return gpu.peak(precision) if gpu else None


def measured_peak(dtype: torch.dtype, device: str = "cpu", seconds: float = 0.2) -> float:
    """FLOP/s of a large matrix product on this machine, with as many threads as PyTorch has now: the best of those that `seconds` have room for."""
    size = 1024 if device == "cpu" else 8192
    a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))

    def once() -> float:
        began = time.perf_counter()
        a @ b
        if device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    once()  # the first chooses a kernel, and may have to compile it
    best, end = once(), time.perf_counter() + seconds
    while time.perf_counter() < end:
        best = min(best, once())
    return 2 * size**3 / best


def available_memory() -> float:
    """Bytes of memory that this machine can still give, or that the container's limit leaves."""
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max":
            free = min(free, int(limit) - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    except (OSError, KeyError, ValueError):  # no Linux, or no control groups
        pass
    return float(free)


def cpu_budget(workers: int = 1) -> float:
    """Bytes of tensors that each of so many workers on this machine may plan with."""
    return max(0.0, (available_memory() / workers - CPU_PROCESS) * CPU_USABLE)


# -- what a run is planned for ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """What a worker runs on: `budget` bytes to plan with, `flops` that training reaches, `link` bytes a second in one direction."""

    name: str
    budget: float
    flops: float
    link: float
    device: str = "cuda"
    single: float | None = None  # FLOP/s in fp32, where `flops` are of another precision
    note: str = ""  # where `flops` come from


def find_machine(
    kind: str | None,
    workers: int,
    precision: str,
    utilisation: float | None = None,
    tflops: float | None = None,
    link: float | None = None,
) -> Machine:
    """The machine of a GPU in the table, or "cpu" for the one at hand; None takes what is here. `precision` may be "auto".

    `utilisation` is the part of the peak that training reaches; `tflops`, in TFLOP/s, and `link`, in GB/s, are of one worker, as measured.
    Raises ConfigError.
    """
    if (
        any(given is not None and given <= 0 for given in (utilisation, tflops, link))
        or (utilisation or 0) > 1
    ):
        raise ConfigError(
            "A plan wants a utilisation above 0 and at most 1, and FLOP/s and GB/s above 0."
        )
    if kind is None:
        here = find_gpu(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
        kind = next((name for name, gpu in GPUS.items() if gpu is here), "cpu")
    on_cpu = kind.lower() == "cpu"
    part = utilisation or (CPU_UTILISATION if on_cpu else UTILISATION)
    note = (
        "as given"
        if tflops
        else f"{part:.0%} of {'what a matrix product reaches' if on_cpu else 'its peak'}"
    )
    note += "" if tflops or utilisation else ", assumed"
    if on_cpu:
        dtype = torch.bfloat16 if training_precision(precision, "cpu") == "bf16" else torch.float32
        flops, single = (
            tflops * TERA if tflops else measured_peak(number) * part / workers
            for number in (dtype, torch.float32)
        )
        return Machine(
            "cpu", cpu_budget(workers), flops, link * GIGA if link else GLOO, "cpu", single, note
        )
    gpu, precision = gpu_named(kind), training_precision(precision, "cuda")
    peak = gpu.peak(precision)
    if peak is None:
        raise ConfigError(
            f"Setting train.precision: {kind} has no {precision} arithmetic; use fp16."
        )
    sent = link * GIGA if link else gpu.inside if workers <= NODE else gpu.between
    return Machine(
        kind.lower(),
        gpu.memory * USABLE,
        tflops * TERA if tflops else peak * part,
        sent,
        "cuda",
        gpu.single * part,
        note,
    )
