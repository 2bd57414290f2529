"""Precisions of weights and activations by name, and the resolution of `auto`.

| use | `auto` on a GPU | `auto` on a CPU | refused |
|---|---|---|---|
| sampling (`resolve_precision`) | fp16 | faster of bf16 and fp32; fp32 if portable | |
| training with DeepSpeed (`training_precision`) | fp16 | faster of bf16 and fp32 | fp16 on a CPU |
| training in one process (`single_precision`) | bf16 | faster of bf16 and fp32 | fp16 |
"""

from __future__ import annotations

import time
from functools import lru_cache

import torch
import torch.nn.functional as F

from .errors import ConfigError, nearest

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NAMES = ("auto", *DTYPES)
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}  # per number


def resolve_precision(precision: str, device: str, portable: bool = False) -> str:
    """fp32, bf16 or fp16 for a precision that may be "auto".

    `device`: "cpu" or "cuda". `auto` is fp16 on a GPU, as in the paper; on a CPU it is the faster
    of bf16 and fp32, or with `portable` always fp32, so that every CPU computes the same picture.
    Raises ConfigError for another name.
    """
    if precision not in NAMES:
        raise ConfigError(f"There is no precision {precision!r}; {nearest(precision, NAMES)}")
    if precision != "auto":
        return precision
    if device == "cuda":
        return "fp16"
    return "fp32" if portable else fastest_on_cpu()


def training_precision(precision: str, device: str) -> str:
    """Precision of training with DeepSpeed: fp32, bf16 or fp16.

    Raises ConfigError for fp16 on a CPU, which DeepSpeed does not support.
    """
    if precision == "fp16" and device != "cuda":
        raise ConfigError(
            "Setting train.precision: fp16 needs a GPU; use bf16, fp32 or auto on a CPU."
        )
    return resolve_precision(precision, device)


def single_precision(precision: str, device: str) -> str:
    """Precision of training in one process: fp32 or bf16. Raises ConfigError for fp16."""
    if precision == "fp16":
        raise ConfigError(
            "Setting train.precision: fp16 and its loss scaling need DeepSpeed, under Ray Train; "
            "use bf16, fp32 or auto in one process."
        )
    return (
        "bf16" if precision == "auto" and device == "cuda" else resolve_precision(precision, device)
    )


def fastest_precision() -> str:
    """The fastest sampling precision of this machine's GPU, or of its CPU if it has no GPU."""
    return resolve_precision("auto", "cuda" if torch.cuda.is_available() else "cpu")


@lru_cache
def fastest_on_cpu() -> str:
    """bf16 if convolutions on this CPU are faster in it than in fp32, else fp32.

    bf16 is faster with AMX or AVX-512 BF16. Measured once per process, in 0.1 s.
    """

    def seconds(dtype: torch.dtype) -> float:
        x = torch.ones(4, 64, 32, 32, dtype=dtype).to(memory_format=torch.channels_last)
        weight = torch.ones(64, 64, 3, 3, dtype=dtype).to(memory_format=torch.channels_last)
        times = []
        for _ in range(5):
            began = time.perf_counter()
            F.conv2d(x, weight, padding=1)
            times.append(time.perf_counter() - began)
        return min(times)

    return "bf16" if seconds(torch.bfloat16) < 0.8 * seconds(torch.float32) else "fp32"
