"""Network calls as CUDA graphs.

The thousand or so kernel launches of a call are captured once per row count, and replayed as one
launch.
"""

from __future__ import annotations

from bisect import bisect_left

import torch
from torch import Tensor

from ..tensors import Conditioning, ModelOutput, TextFeatures
from .unet import GlideUNet

WARM_UP_CALLS = 3  # calls before a capture: cuDNN tries its algorithms, kernels compile


def row_counts(most: int) -> list[int]:
    """Row counts to capture, up to `most`: powers of two and the points halfway between them.

    At most a third of a call is then padding.
    """
    counts = {
        count
        for power in range(most.bit_length())
        for count in (1 << power, 3 << power >> 1)
        if 0 < count < most
    }
    return sorted(counts | {most})


class GraphRunner:
    """CUDA graphs of `model`, called like the model with `text` encoded, for at most `most` rows.

    Not thread-safe; one stream only. The next call overwrites the output. Rows are padded to the
    next of `row_counts`; a graph is captured at its first use, and `record` captures all of them.
    `text` and `conditioning` are copied only if they are other objects than in the previous call.
    """

    def __init__(self, model: GlideUNet, most: int):
        self.model, self.most, self.counts = model, most, row_counts(most)
        torch.backends.cudnn.benchmark = True  # few shapes, each called many times
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, ModelOutput]] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._inputs: tuple[Tensor, Tensor, Conditioning, TextFeatures] | None = None
        self._last: tuple[Conditioning, TextFeatures] | None = None

    def __call__(
        self, x: Tensor, timestep: Tensor, conditioning: Conditioning, text: TextFeatures
    ) -> ModelOutput:
        rows = len(x)
        # Guidance on a model whose default scale is 1 takes two rows per sample: more than planned.
        if rows > self.most:
            return self.model(x, timestep, conditioning, text)
        count = self.counts[bisect_left(self.counts, rows)]
        if self._inputs is None:
            self._inputs = tuple(
                _room(tensor, self.most) for tensor in (x, timestep, conditioning, text)
            )
        held_x, held_timestep, held_conditioning, held_text = self._inputs
        held_x[:rows].copy_(x)
        held_timestep[:rows].copy_(timestep)
        if self._last is None or conditioning is not self._last[0] or text is not self._last[1]:
            pairs = [
                *zip(_tensors(held_conditioning), _tensors(conditioning), strict=True),
                *zip(_tensors(held_text), _tensors(text), strict=True),
            ]
            for kind in {tensor.dtype for _, tensor in pairs}:  # one launch per dtype
                same_dtype = [
                    (held[:rows], tensor) for held, tensor in pairs if tensor.dtype == kind
                ]
                torch._foreach_copy_(
                    [held for held, _ in same_dtype], [tensor for _, tensor in same_dtype]
                )
            self._last = conditioning, text
        if count not in self._graphs:
            self._graphs[count] = self._record(count)
        graph, output = self._graphs[count]
        graph.replay()
        return output[:rows]

    def record(self) -> None:
        """Capture all missing graphs. A first call must have shown the shapes of the inputs."""
        for count in self.counts:
            if count not in self._graphs:
                self._graphs[count] = self._record(count)

    def _record(self, count: int) -> tuple[torch.cuda.CUDAGraph, ModelOutput]:
        assert self._inputs is not None
        x, timestep, conditioning, text = (tensor[:count] for tensor in self._inputs)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP_CALLS):
                self.model(x, timestep, conditioning, text)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # "thread_local": other threads may use the GPU during the capture.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = self.model(x, timestep, conditioning, text)
        return graph, output


def _room(example, rows: int):
    """Zeros for `rows` rows, shaped like `example`."""

    def empty(tensor: Tensor) -> Tensor:
        return tensor.new_zeros(rows, *tensor.shape[1:])

    return empty(example) if isinstance(example, Tensor) else example.map(empty)


def _tensors(form) -> list[Tensor]:
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    form.map(keep)
    return found
