"""GlideUNet: the text-conditional ADM U-Net (sec. 4.1), for all four variants of the model.

Base, upsampler, and the inpainting variant of each: they differ only in their input channels, which
the config determines.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from copy import deepcopy
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..config.models import DiffusionConfig, UNetConfig
from ..tensors import Conditioning, ModelOutput, TextFeatures
from .layers import (
    AttentionBlock,
    Downsample,
    GroupNorm,
    PixelHead,
    ResBlock,
    Upsample,
    timestep_embedding,
)
from .text import TextBlock, TextTransformer


class Stage(nn.Module):
    """A residual block, attention at some resolutions, and a resampling residual block or none."""

    def __init__(
        self, block: ResBlock, attention: AttentionBlock | None, resample: ResBlock | None = None
    ):
        super().__init__()
        self.block = block
        self.attention = attention
        self.resample = resample

    def forward(
        self, x: Tensor, embedding: Tensor, key: Tensor | None, value: Tensor | None
    ) -> Tensor:
        x = self.block(x, embedding)
        if self.attention is not None:
            x = self.attention(x, key, value)
        return x if self.resample is None else self.resample(x, embedding)


class GlideUNet(nn.Module):
    """The U-Net of one config.

    `diffusion`: the noise process, to convert v or x_0 to eps; not used if the network predicts
    eps.
    """

    def __init__(self, config: UNetConfig, diffusion: DiffusionConfig | None = None):
        super().__init__()
        self.config = config
        self._diffusion = diffusion or DiffusionConfig()
        self._signal_noise_cache: dict[torch.device, Tensor] = {}  # cache of `_signal_and_noise`
        self.activation_checkpointing = False
        # Format of the activations; None: the faster one, see `_fast_format`.
        self.memory_format: torch.memory_format | None = None
        # Joined weight and bias of all blocks' embedding layers, see `fuse`.
        self._embeddings: tuple[Tensor, Tensor] | None = None
        embedding = 4 * config.channels
        self.text = TextTransformer(config.text, pooled=embedding)
        self.time_in = nn.Linear(config.channels, embedding)
        self.time_out = nn.Linear(embedding, embedding)

        channels = config.channels * config.multipliers[0]
        patch_area = config.patch**2
        self.stem = nn.Conv2d(config.in_channels * patch_area, channels, 3, padding=1)
        self.down, skips = self._down_path()
        channels = skips[-1]
        self.middle = nn.ModuleList(
            [
                Stage(self._residual(channels, channels), self._attention(channels)),
                Stage(self._residual(channels, channels), None),
            ]
        )
        self.up = self._up_path(skips)
        channels = config.channels * config.multipliers[0]
        self.out_norm = GroupNorm(config.groups, channels)
        # Outputs: 3 channels of eps, v or x_0, and 3 of the variance interpolation.
        self.out = nn.Conv2d(channels, 6 * patch_area, 3, padding=1)
        self.pixel_head = (
            PixelHead(config.in_channels, config.pixel_channels, embedding)
            if config.pixel_channels
            else None
        )
        self.initialise()

    # -- construction ---------------------------------------------------------------------------

    def _residual(
        self, channels: int, out_channels: int, resample: type[Upsample | Downsample] | None = None
    ) -> ResBlock:
        config = self.config
        return ResBlock(
            channels, out_channels, 4 * config.channels, config.groups, config.dropout, resample
        )

    def _attention(self, channels: int) -> AttentionBlock:
        config = self.config
        return AttentionBlock(channels, config.head_channels, config.text.width, config.groups)

    def _stage_attention(self, level: int, channels: int) -> AttentionBlock | None:
        """Attention at this level, if the config has it at the level's image size."""
        size = self.config.image_size // self.config.patch // 2**level
        return self._attention(channels) if size in self.config.attention_sizes else None

    def _down_path(self) -> tuple[nn.ModuleList, list[int]]:
        """(stages, channels of the stem's and of each stage's output, all skip connections)."""
        config = self.config
        channels = config.channels * config.multipliers[0]
        stages, skips = nn.ModuleList(), [channels]
        for level, multiplier in enumerate(config.multipliers):
            width = config.channels * multiplier
            for _ in range(config.blocks):
                stages.append(
                    Stage(self._residual(channels, width), self._stage_attention(level, width))
                )
                channels = width
                skips.append(channels)
            if level < len(config.multipliers) - 1:
                stages.append(Stage(self._residual(channels, channels, Downsample), None))
                skips.append(channels)
        return stages, skips

    def _up_path(self, skips: list[int]) -> nn.ModuleList:
        """Stages; one block more per level than downwards, each with a skip connection."""
        config, channels, skips = self.config, skips[-1], list(skips)
        stages = nn.ModuleList()
        for level, multiplier in reversed(list(enumerate(config.multipliers))):
            width = config.channels * multiplier
            for index in range(config.blocks + 1):
                block = self._residual(channels + skips.pop(), width)
                attention = self._stage_attention(level, width)
                upsamples = level and index == config.blocks
                resample = self._residual(width, width, Upsample) if upsamples else None
                stages.append(Stage(block, attention, resample))
                channels = width
        return stages

    # -- initialisation -------------------------------------------------------------------------

    @torch.no_grad()
    def initialise(self) -> None:
        """Draw every parameter.

        The release leaves its position and padding embeddings uninitialised.
        """
        if self.stem.weight.is_meta:
            return
        for module in self.modules():
            # PyTorch's defaults, with which ADM was trained.
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5))
                bound = 1 / math.sqrt(module.weight[0].numel())
                if module.bias is not None:
                    nn.init.uniform_(module.bias, -bound, bound)
            elif isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
        for table in (self.text.token.weight, self.text.position, self.text.padding):
            nn.init.normal_(table, std=0.02)  # as in GPT-2
        # Residual branches start small, as in GPT-2.
        depth = math.sqrt(2 * max(1, len(self.text.blocks)))
        for block in self.text.modules():
            if isinstance(block, TextBlock):
                block.out.weight.div_(depth)
                block.mlp_out.weight.div_(depth)
        for module in self.modules():  # every U-Net block starts as the identity
            if isinstance(module, ResBlock):
                _zero(module.out_conv)
            elif isinstance(module, AttentionBlock):
                _zero(module.out)
        _zero(self.out)  # the first prediction is eps = 0
        if self.pixel_head is not None:
            _zero(self.pixel_head.out_conv)
        for channels in self._conditioning_channels():
            nn.init.zeros_(self.stem.weight[:, channels])  # sec. 4.3

    def _conditioning_channels(self) -> list[slice]:
        """Input channels of the known pixels and their mask, which start at zero."""
        patch_area = self.config.patch**2
        return [slice(3 * patch_area, 7 * patch_area)] if self.config.inpaint else []

    def fuse_training(self) -> None:
        """Compute norms with `norm_training.py` from now on: for training on an NVIDIA GPU."""
        for module in self.modules():
            if isinstance(module, GroupNorm):
                module.trains_fused = True

    def fuse(self) -> None:
        """Use `kernels.py` between convolutions from now on: NVIDIA inference only, no gradients.

        Weights are then read directly and not through the modules that hold them, so this excludes
        models whose weights a trainer shards. Without Triton, for example on Windows, nothing is
        fused.
        """
        if not find_spec("triton"):
            return
        for module in self.modules():
            if isinstance(module, (GroupNorm, AttentionBlock)):
                module.fused = True
        # One matrix product computes the scale and shift of all blocks; their own weights become
        # views of the joined ones.
        blocks = [module for module in self.modules() if isinstance(module, ResBlock)]
        weight, bias = (
            torch.cat([getattr(block.embedding, name).detach() for block in blocks])
            for name in ("weight", "bias")
        )
        self._embeddings = weight, bias
        start = 0
        for block in blocks:
            block.fused = slice(start, start := start + block.embedding.out_features)
            for name, joined in zip(("weight", "bias"), (weight, bias), strict=True):
                getattr(block.embedding, name).data = joined[block.fused]

    def unfused_copy(self) -> GlideUNet:
        """A network with the same parameter objects that calls every layer as a module.

        It takes no memory for weights, and computes the same as this one did before `fuse`.
        """
        cached = *(self._embeddings or ()), *self._signal_noise_cache.values()
        shared = [*self.parameters(), *self.buffers(), *cached]
        copied = deepcopy(self, {id(tensor): tensor for tensor in shared})
        copied._embeddings = None
        for module in copied.modules():
            if isinstance(module, (GroupNorm, AttentionBlock)):
                module.fused = False
            elif isinstance(module, ResBlock):
                module.fused = None
        return copied

    # -- forward --------------------------------------------------------------------------------

    def attention_layers(self) -> list[AttentionBlock]:
        """Attention layers in forward order, which is that of `TextFeatures.keys_values`."""
        return [
            stage.attention
            for stage in (*self.down, *self.middle, *self.up)
            if stage.attention is not None
        ]

    def encode_text(self, tokens: Tensor, mask: Tensor) -> TextFeatures:
        """tokens (B, K) int64, mask (B, K) bool -> encoded captions.

        They are constant over the steps of a sample.
        """
        sequence, pooled = self.text(tokens, mask, self._checkpointing)
        return TextFeatures(
            pooled,
            sequence,
            tuple(layer.text_keys_values(sequence) for layer in self.attention_layers()),
        )

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        conditioning: Conditioning,
        text: TextFeatures | None = None,
    ) -> ModelOutput:
        """x (B, 3, H, W), timestep (B,) -> eps and variance, float32.

        `text`: encoded captions, if available; saves running the text transformer.
        """
        dtype = self.stem.weight.dtype
        if text is None:
            text = self.encode_text(conditioning.tokens, conditioning.mask)
        time = timestep_embedding(timestep, self.config.channels).to(dtype)
        # (B, 4C), input of every block.
        pooled = F.silu(self.time_out(F.silu(self.time_in(time))) + text.pooled)
        # With `fuse`: (B, scales and shifts of all blocks).
        embedding = F.linear(pooled, *self._embeddings) if self._embeddings else pooled
        memory_format = self.memory_format or self._fast_format(x.device)
        inputs = self._network_input(x, conditioning).to(dtype)
        folded = F.pixel_unshuffle(inputs, self.config.patch)
        h = self.stem(folded.contiguous(memory_format=memory_format))
        keys_values = iter(text.keys_values or ())
        skips = [h]
        for stage in self.down:
            h = self._run(stage, h, embedding, keys_values)
            skips.append(h)
        for stage in self.middle:
            h = self._run(stage, h, embedding, keys_values)
        for stage in self.up:
            h = self._run(stage, torch.cat([h, skips.pop()], dim=1), embedding, keys_values)
        h = self.out_norm(h, silu=True)
        predicted, variance = F.pixel_shuffle(self.out(h).float(), self.config.patch).chunk(
            2, dim=1
        )
        if self.pixel_head is not None:
            inputs = inputs.contiguous(memory_format=memory_format)
            predicted = self.pixel_head(predicted, inputs, pooled)
        return ModelOutput(self._eps(predicted, x, timestep, conditioning), variance)

    def _eps(
        self, predicted: Tensor, x: Tensor, timestep: Tensor, conditioning: Conditioning
    ) -> Tensor:
        """eps (B, 3, H, W) from the prediction of the last layer: eps, v or x_0.

        v = signal eps - noise x_0 (Salimans & Ho 2022, app. D). x_0 is for patches of more values
        than the network has channels: noise in them cannot pass through it, pictures can (Li & He
        2025, Back to Basics). An upsampler's x_0 is predicted as a residual to the enlarged low-res
        image.
        """
        if self.config.prediction == "eps":
            return predicted
        signal, noise = self._signal_and_noise(timestep)
        if self.config.prediction == "v":
            return signal * predicted + noise * x
        x0 = predicted + self._enlarged(x, conditioning) if self.config.low_res_size else predicted
        return (x - signal * x0) / noise

    def _signal_and_noise(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Factors of image and noise in x_t, each (B, 1, 1, 1) float32."""
        if timestep.device not in self._signal_noise_cache:
            alpha_bar = torch.tensor(
                self._diffusion.alpha_bar(), dtype=torch.float64, device=timestep.device
            )
            self._signal_noise_cache[timestep.device] = torch.stack(
                [alpha_bar.sqrt(), (1 - alpha_bar).sqrt()]
            ).float()
        signal, noise = self._signal_noise_cache[timestep.device][
            :, timestep.long(), None, None, None
        ]
        return signal, noise

    def _fast_format(self, device: torch.device) -> torch.memory_format:
        """Memory format of the activations: channels last, except for training on a CPU.

        There 16-bit group norm takes up to 35 times as long in channels last (12.8 ms against 0.37
        ms for 32 x 128 x 16 x 16 on one core of an AMD EPYC, PyTorch 2.13), and convolutions are
        equally fast in both formats. Convolutions follow the format of their input, also under
        ZeRO, which flattens the weights.
        """
        return (
            torch.contiguous_format
            if device.type == "cpu" and self.training
            else torch.channels_last
        )

    def _network_input(self, x: Tensor, conditioning: Conditioning) -> Tensor:
        """All input channels of this variant of the model.

        In this order: x, known pixels, their mask, the enlarged low-res image.
        """
        parts = [x]
        if self.config.inpaint:
            parts += self._known(x, conditioning)
        if self.config.low_res_size:
            parts.append(self._enlarged(x, conditioning))
        return torch.cat(parts, dim=1)

    def _enlarged(self, x: Tensor, conditioning: Conditioning) -> Tensor:
        """The low-res image enlarged to the size of x; raises ValueError if there is none.

        Bilinear, as in the release; the paper's text says bicubic.
        """
        if conditioning.low_res is None:
            raise ValueError("an upsampler needs conditioning.low_res, the image to make larger")
        return F.interpolate(
            conditioning.low_res.float(), x.shape[-2:], mode="bilinear", align_corners=False
        ).to(x)

    def _known(self, x: Tensor, conditioning: Conditioning) -> list[Tensor]:
        if conditioning.known is None:  # no known pixels: the inpainting model generates
            return [torch.zeros_like(x), torch.zeros_like(x[:, :1])]
        assert conditioning.known_mask is not None
        mask = conditioning.known_mask.to(x)
        return [conditioning.known.to(x) * mask, mask]

    def _run(
        self,
        stage: nn.Module,
        x: Tensor,
        embedding: Tensor,
        keys_values: Iterator[tuple[Tensor, Tensor]],
    ) -> Tensor:
        key, value = next(keys_values) if stage.attention is not None else (None, None)
        if self._checkpointing:
            return checkpoint(stage, x, embedding, key, value, use_reentrant=False)
        return stage(x, embedding, key, value)

    @property
    def _checkpointing(self) -> bool:
        return self.activation_checkpointing and torch.is_grad_enabled()


def _zero(layer: nn.Module) -> None:
    """Set the weight and bias of a layer to zero."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
