"""The guided network call: model output for a batch of samples, and the text features of captions.

A network call has one row for each sample with its caption, then a second row with the empty
caption, or its negative prompt, for each sample with classifier-free guidance. On a GPU it replays
a CUDA graph. CLIP guidance is computed separately, as a gradient. Samples with different adapters,
or none, share a call.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ..config.models import ModelConfig
from ..diffusion.guidance import classifier_free, score_gradient
from ..diffusion.samplers import StepInput, predict_x0
from ..models.clip_scorer import ClipScorer
from ..models.cuda_graphs import GraphRunner
from ..models.layers import channels_last
from ..models.row_adapters import AdaptedNetwork, ScaledAdapter
from ..models.unet import GlideUNet
from ..tensors import Conditioning, ModelOutput, TextFeatures, to_device_async
from .prompt import Caption
from .request import ActiveSample, SampleBatch

CACHED_CAPTIONS = 64  # captions whose text features are cached


@dataclass(frozen=True)
class PairedInputs:
    """Network inputs of a guided call; constant over the steps while its samples stay the same."""

    samples: Conditioning  # first rows, of the samples; identifies the batch
    guided: list[int]  # indices of the samples whose guidance scale is not 1
    conditioning: Conditioning  # of all rows: the samples, then the guided ones again
    text: TextFeatures  # of all rows: the captions, then the negative ones


class GuidedDenoiser:
    """The model with classifier-free and CLIP guidance.

    `max_samples`: the largest batch. `reuse_inputs`: keep the network inputs of the last guided
    call, for batches of unchanged samples; then calls must not overlap. `critic`: the CLIP model
    for CLIP guidance.
    """

    def __init__(
        self,
        model: GlideUNet,
        config: ModelConfig,
        device: torch.device,
        dtype: torch.dtype,
        max_samples: int,
        reuse_inputs: bool,
        critic: ClipScorer | None,
    ):
        self.config, self.device, self.dtype, self.critic = config, device, dtype, critic
        model = channels_last(model.to(device, dtype))
        self.model: GlideUNet = model.eval().requires_grad_(False)
        self.network: GlideUNet | GraphRunner = self.model
        if device.type == "cuda":
            self.model.fuse()
            rows = 1 if config.sampling.guidance_scale == 1 else 2
            self.network = GraphRunner(self.model, max_samples * rows)
        self._reuse_inputs = reuse_inputs
        self._paired: PairedInputs | None = None
        self._captions: OrderedDict[tuple[object, ...], TextFeatures] = OrderedDict()

    @cached_property
    def adapted(self) -> AdaptedNetwork:
        """The network for calls with adapters; made at the first of them."""
        return AdaptedNetwork(self.model)

    def record_graphs(self) -> None:
        """Record the CUDA graphs of all batch sizes; without effect on a CPU."""
        if isinstance(self.network, GraphRunner):
            self.network.record()

    def denoise(
        self,
        samples: Sequence[ActiveSample],
        batch: SampleBatch,
        timestep: Tensor,
        timesteps: Sequence[int],
    ) -> ModelOutput:
        """Model output (S, ...) with classifier-free guidance, each sample with its own scale.

        `timesteps`: the values of `timestep` (S,) on the host, to avoid a device synchronisation.
        """
        scale = torch.tensor(
            [
                sample.guidance_scale if self._guidance_on(sample, t) else 1.0
                for sample, t in zip(samples, timesteps, strict=True)
            ]
        )
        guided = scale.ne(1).nonzero()[:, 0]
        adapters = [sample.request.adapters for sample in samples]
        conditioning, text = self._paired_inputs(batch, guided)

        def paired(x: Tensor, timestep: Tensor) -> ModelOutput:
            if any(adapters):
                # Without CUDA graph and fused kernels: a graph would hold the addresses of one set
                # of adapters, and fused kernels read weights past the layers' hooks.
                rows = [*adapters, *(adapters[n] for n in guided.tolist())]
                return self.adapted(rows, x, timestep, conditioning, text)
            output: ModelOutput = self.network(x, timestep, conditioning, text)
            return output

        return classifier_free(paired, scale)(batch.x, timestep)

    def clip_gradient(
        self,
        samples: Sequence[ActiveSample],
        batch: SampleBatch,
        step_input: StepInput,
        timesteps: Sequence[int],
    ) -> Tensor | None:
        """CLIP guidance gradient (S, 3, H, W) for one step, 0 for samples without it.

        None if no sample has CLIP guidance. `timesteps`: as for `denoise`.
        """
        scales = [
            sample.request.clip_scale if self._guidance_on(sample, t) else 0.0
            for sample, t in zip(samples, timesteps, strict=True)
        ]
        guided = [n for n, scale in enumerate(scales) if scale]
        if self.critic is None or not guided:
            return None
        rows = to_device_async(torch.tensor(guided), self.device)
        scale = to_device_async(torch.tensor([scales[n] for n in guided]), self.device)
        x, i, schedule = step_input.x, step_input.i, step_input.schedule
        if self.critic.noised:
            clip_input = x
        else:
            # For a CLIP trained on noiseless images, blend the predicted x_0 with x_t; the weight
            # of x_0 is sqrt(1 - alpha_bar) (Crowson 2021a).
            x0_weight = (1 - schedule.at("alpha_bar", i)).sqrt().float()
            clip_input = (
                x0_weight * predict_x0(schedule, step_input.output, x, i, None)
                + (1 - x0_weight) * x
            )
        gradient = torch.zeros_like(x)
        gradient[rows] = score_gradient(
            self.critic.score,
            clip_input[rows],
            schedule.timestep[i[rows]],
            batch.clip_text[rows],
            scale,
        )
        return gradient

    def prepare(
        self,
        conditioning: Conditioning,
        clip_text: Tensor | None,
        adapters: Sequence[ScaledAdapter] = (),
        emphasis: Sequence[tuple[Tensor, float]] = (),
    ) -> tuple[Conditioning, TextFeatures, Tensor]:
        """Conditioning, text features and CLIP embedding of one sample, on the device.

        Zeros stand for known pixels and CLIP embeddings that are None, so that samples with and
        without them share a batch.
        """
        caption = Caption(conditioning.tokens.cpu(), conditioning.mask.cpu(), tuple(emphasis))
        text = self.text_of(caption, adapters)
        conditioning = conditioning.to(self.device)
        if conditioning.known is None:
            size = self.config.unet.image_size
            conditioning = replace(
                conditioning,
                known=torch.zeros(1, 3, size, size, device=self.device),
                known_mask=torch.zeros(1, 1, size, size, device=self.device),
            )
        if clip_text is None:
            clip_text = torch.zeros(1, 0 if self.critic is None else self.critic.embedding)
        return conditioning, text, clip_text.to(self.device)

    def _guidance_on(self, sample: ActiveSample, timestep: int) -> bool:
        return sample.request.guidance_on_at(timestep, self.config.diffusion.steps)

    def _paired_inputs(
        self, batch: SampleBatch, guided: Tensor
    ) -> tuple[Conditioning, TextFeatures]:
        """Network inputs: all samples, then the `guided` ones (G,) with the negative caption."""
        if not len(guided):
            return batch.conditioning, batch.text
        paired = self._paired
        # `batch.text` cannot identify the batch: samples with one caption share text features.
        if (
            paired is None
            or paired.samples is not batch.conditioning
            or paired.guided != guided.tolist()
        ):
            repeated = batch.conditioning[to_device_async(guided, self.device)]
            paired = PairedInputs(
                batch.conditioning,
                guided.tolist(),
                Conditioning.join([batch.conditioning, repeated]),
                TextFeatures.join(
                    [batch.text, batch.negative[to_device_async(guided, self.device)]]
                ),
            )
            if self._reuse_inputs:
                self._paired = paired
        return paired.conditioning, paired.text

    def text_of(self, caption: Caption, adapters: Sequence[ScaledAdapter] = ()) -> TextFeatures:
        """Text features (1, ...) of a caption.

        A word of weight w moves them along its effect: f + (w - 1) (f - f without the word). This
        is linear, as are the keys and values that the network's attention makes of the text.
        """
        whole = self._text_features(caption.tokens, caption.mask, adapters)
        weighted = whole
        for mask, weight in caption.emphasis:
            without = self._text_features(caption.tokens, mask, adapters)
            weighted = weighted.plus(whole, weight - 1).plus(without, 1 - weight)
        return weighted

    def negative_text(
        self, caption: Conditioning | None, adapters: Sequence[ScaledAdapter] = ()
    ) -> TextFeatures:
        """Text features (1, ...) of the caption that guidance leads away from; None: the empty."""
        if caption is not None:
            return self._text_features(caption.tokens.cpu(), caption.mask.cpu(), adapters)
        context = self.config.unet.text.context
        return self._text_features(
            torch.zeros(1, context, dtype=torch.int64),
            torch.zeros(1, context, dtype=torch.bool),
            adapters,
        )

    def _text_features(
        self, tokens: Tensor, mask: Tensor, adapters: Sequence[ScaledAdapter]
    ) -> TextFeatures:
        """Text features of a caption, `tokens` and `mask` (1, K), from an LRU cache."""
        caption = (
            tokens.numpy().tobytes(),
            mask.numpy().tobytes(),
            *(adapter.key for adapter in adapters),
        )
        features = self._captions.pop(caption, None)
        if features is None:
            tokens, mask = tokens.to(self.device), mask.to(self.device)
            features = (
                self.adapted.encode_text(adapters, tokens, mask)
                if adapters
                else self.model.encode_text(tokens, mask)
            )
        self._captions[caption] = features
        if len(self._captions) > CACHED_CAPTIONS:
            self._captions.popitem(last=False)
        return features
