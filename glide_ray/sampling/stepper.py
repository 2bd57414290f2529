"""Denoise samples at different timesteps together, one step at a time (continuous batching).

The sampling loop of the cascade and of the server. Each sample has its own seed, sampler, number of
steps, guidance scale and conditioning, and joins or leaves the batch between steps. Its noise comes
from its own generator on the CPU, so that its image does not depend on the rest of the batch, on
the replica or on retries: bit-identical on a CPU, equal up to rounding on a GPU.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import Tensor

from ..config.models import ModelConfig
from ..diffusion.guidance import classifier_free, score_gradient
from ..diffusion.process import q_sample
from ..diffusion.samplers import (
    SAMPLERS,
    History,
    Known,
    Step,
    ddim_inversion_step,
    predict_x0,
    renoise_known,
)
from ..diffusion.schedule import Schedule, join, kept_timesteps, make_schedule, respace
from ..errors import UserError
from ..models.clip_scorer import ClipScorer
from ..models.cuda_graphs import GraphRunner
from ..models.unet import GlideUNet
from ..tensors import Conditioning, ModelOutput, TextFeatures, to_device_async
from .request import ActiveSample, SampleBatch, SampleRequest

# deadline = submit time + DEADLINE_STRETCH x steps, in sample-steps. Earliest deadline first, so
# that short samples overtake long ones, and nothing starves.
DEADLINE_STRETCH = 3
CACHED_CAPTIONS = 64  # captions whose text features are cached
GPU_STEPS_AHEAD = 1  # GPU steps in flight; admissions and cancellations lag by this many


class Stepper:
    """Advances the samples of one model. Not thread-safe (`engine.Engine` runs it on one thread).

    `batched`: all samples in flight share one network call, which suits a GPU. On a CPU a call
    takes as long as its rows do one by one, so each sample has its own call, with up to `lanes`
    calls in parallel, and its image is bit-identical whatever else is in flight. Each step advances
    the samples with the earliest deadlines; if `batched`, all samples in flight. `critic`: the CLIP
    model for samples with CLIP guidance.
    """

    def __init__(
        self,
        model: GlideUNet,
        config: ModelConfig,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        max_in_flight: int = 8,
        batched: bool | None = None,
        critic: ClipScorer | None = None,
        lanes: int = 1,
    ):
        self.config, self.device, self.max_in_flight = config, torch.device(device), max_in_flight
        self.model = (
            model.to(self.device, dtype)
            .to(memory_format=torch.channels_last)
            .eval()
            .requires_grad_(False)
        )
        self.batched = self.device.type != "cpu" if batched is None else batched
        # Maximum number of samples per step.
        self.width = max_in_flight if self.batched else min(lanes, max_in_flight)
        self._network = self.model
        if self.device.type == "cuda":
            self.model.fuse()
            self._network = GraphRunner(
                self.model, max_in_flight * (1 if config.sampling.guidance_scale == 1 else 2)
            )
        self.critic = critic
        self.steps_done = 0
        self.sample_steps_done = 0  # denoising steps, summed over samples
        self._process = make_schedule(config.diffusion.schedule, config.diffusion.steps)
        self._schedules: dict[str, Schedule] = {}
        self._kept: dict[str, list[int]] = {}
        self._waiting: list[ActiveSample] = []
        self._samples: list[ActiveSample] = []
        self._together: list[ActiveSample] = []  # samples whose rows are joined in `_flight`
        self._flight: SampleBatch | None = None  # the joint batch of `_together`
        # Network inputs of the last guided call, reused while the samples stay the same:
        # (conditioning of the samples, indices of the guided ones, conditioning and text features
        # of all rows of the call, which are the samples and then the empty captions).
        self._paired: tuple[Conditioning, list[int], Conditioning, TextFeatures] | None = None
        self._events: deque[torch.cuda.Event] = deque()  # one per step submitted to the GPU
        self._tickets = 0
        self._captions: OrderedDict[bytes, TextFeatures] = OrderedDict()
        self._lanes = None
        if not self.batched and self.width > 1:
            # Every lane always has the same number of threads, busy or not: rounding, and so the
            # image, does not depend on what the other lanes do.
            threads = max(1, torch.get_num_threads() // self.width)
            self._lanes = ThreadPoolExecutor(
                self.width, "glide-lane", torch.set_num_threads, (threads,)
            )

    # -- requests ----------------------------------------------------------------------------------

    @property
    def in_flight(self) -> int:
        return len(self._samples)

    @property
    def queued(self) -> int:
        return len(self._waiting)

    @property
    def waiting(self) -> set[int]:
        """Tickets of the queued samples."""
        return {sample.ticket for sample in self._waiting}

    def submit(self, request: SampleRequest) -> int:
        """Queue a request and return its ticket. Raises UserError for an invalid request."""
        own = self.config.sampling
        if (request.sampler or own.sampler) not in SAMPLERS:
            raise UserError(
                f"There is no sampler {request.sampler!r}; choose one of: {', '.join(SAMPLERS)}."
            )
        if request.clip_scale and (self.critic is None or request.clip_text is None):
            raise UserError("CLIP guidance needs a CLIP model; give one, or leave clip_scale at 0.")
        steps = self._first_index(request) + 1
        self._tickets += 1
        self._waiting.append(
            ActiveSample(
                self._tickets,
                request,
                request.respacing or own.respacing,
                request.sampler or own.sampler,
                own.guidance_scale if request.guidance_scale is None else request.guidance_scale,
                torch.Generator().manual_seed(request.seed),
                steps,
                steps,
                self._due(request, steps),
            )
        )
        self._waiting.sort(key=lambda sample: sample.due)
        return self._tickets

    def cancel(self, ticket: int) -> bool:
        """Drop a sample, queued or in flight. Returns False if there is none with this ticket."""
        before = len(self._waiting) + len(self._samples)
        self._waiting = [sample for sample in self._waiting if sample.ticket != ticket]
        self._samples = [sample for sample in self._samples if sample.ticket != ticket]
        return len(self._waiting) + len(self._samples) < before

    def schedule(self, respacing: str | None) -> Schedule:
        """The schedule for a respacing (None: the model's own), on the device. Cached."""
        name = respacing or self.config.sampling.respacing
        if name not in self._schedules:
            self._schedules[name] = respace(self._process, name).to(self.device)
        return self._schedules[name]

    # -- one step ----------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> list[tuple[int, Tensor]]:
        """Admit queued samples, then advance those with the earliest deadlines by one step.

        Returns the finished samples as pairs (ticket, image (3, H, W) in [-1, 1]).
        """
        while self._waiting and len(self._samples) < self.max_in_flight:
            self._admit(self._waiting.pop(0))
        if not self._samples:
            return []
        moving = (
            self._samples
            if len(self._samples) <= self.width
            else sorted(self._samples, key=lambda sample: sample.due)[: self.width]
        )
        if self.batched:
            if [sample.ticket for sample in moving] != [sample.ticket for sample in self._together]:
                self._part()
                self._together, self._flight = (
                    list(moving),
                    SampleBatch.join([sample.row for sample in moving]),
                )
            self._wait(GPU_STEPS_AHEAD)
            self._flight = self._advance(moving, self._flight)
            if self.device.type == "cuda":
                self._events.append(torch.cuda.current_stream().record_event())
        else:
            rows = (map if self._lanes is None else self._lanes.map)(
                lambda sample: self._advance([sample], sample.row), moving
            )
            for sample, row in zip(moving, rows, strict=True):
                sample.row = row
        self.steps_done += 1
        self.sample_steps_done += len(moving)
        finished = [
            (sample.ticket, self._flight.x[n] if self.batched else sample.row.x[0])
            for n, sample in enumerate(moving)
            if not sample.left
        ]
        self._samples = [sample for sample in self._samples if sample.left]
        return finished

    def run(
        self, requests: Sequence[SampleRequest], on_step: Callable[[int, int], None] | None = None
    ) -> Tensor:
        """Run requests to the end and return their images (N, 3, H, W) in [-1, 1], in order.

        `on_step` receives the denoising steps done and their total, both summed over the requests.
        """
        images: dict[int, Tensor | None] = {}
        try:
            for request in requests:
                images[self.submit(request)] = None
            before, total = (
                self.sample_steps_done,
                sum(self._first_index(request) + 1 for request in requests),
            )
            while any(image is None for image in images.values()):
                images.update((ticket, image) for ticket, image in self.step() if ticket in images)
                if on_step:
                    on_step(self.sample_steps_done - before, total)
        except BaseException:  # also KeyboardInterrupt: leave no samples behind for the next run
            for ticket in images:
                self.cancel(ticket)
            raise
        return torch.stack(list(images.values()))

    @torch.inference_mode()
    def warm(self, request: SampleRequest) -> None:
        """Run a first sample, so that later ones do not wait for one-time work.

        On a GPU this also selects kernels and records the CUDA graphs of all padded batch sizes.
        """
        self.run([request])
        if isinstance(self._network, GraphRunner):
            self._network.record()

    @torch.inference_mode()
    def invert(self, requests: Sequence[SampleRequest], images: Tensor) -> Tensor:
        """DDIM inversion: the noise (N, 3, H, W) from which DDIM reproduces `images` (N, 3, H, W).

        All use the respacing of the first request. Runs the ODE of eq. 14 of Song et al. (2020)
        backwards; smaller steps reproduce the images more exactly.
        """
        inverted = []
        schedule = self.schedule(requests[0].respacing)
        for request, image in zip(requests, images, strict=True):
            self.submit(request)
            sample = self._waiting.pop()
            row = replace(self._row(sample), x=image[None].to(self.device))
            for index in range(len(schedule) - 1):
                i = torch.tensor([index], device=self.device)
                output = self._denoise(
                    [sample], row, schedule.timestep[i], [int(schedule.timestep[index])]
                )
                row = replace(row, x=ddim_inversion_step(schedule, output, row.x, i).x)
            inverted.append(row.x)
        return torch.cat(inverted)

    # -- inside ------------------------------------------------------------------------------------

    def _due(self, request: SampleRequest, steps: int) -> float:
        """Deadline of a new sample, in sample-steps of this stepper.

        Now + DEADLINE_STRETCH x (its own steps + the remaining steps of its group).
        """
        group = sum(
            other.left
            for other in (*self._samples, *self._waiting)
            if request.group is not None and other.request.group == request.group
        )
        return self.sample_steps_done + DEADLINE_STRETCH * (group + steps)

    def _wait(self, ahead: int) -> None:
        """Block until at most `ahead` submitted steps are unfinished on the GPU."""
        while len(self._events) > ahead:
            self._events.popleft().synchronize()

    def _part(self) -> None:
        """Split the joint batch into the rows of its samples."""
        for n, sample in enumerate(self._together):
            sample.row = self._flight[n : n + 1]
        self._together, self._flight = [], None

    @torch.inference_mode()
    def _advance(self, samples: list[ActiveSample], flight: SampleBatch) -> SampleBatch:
        """One step of these samples, in one network call.

        Decisions use state on the host only, so that nothing waits for the device.
        """
        names = list(dict.fromkeys(sample.respacing for sample in samples))
        schedule, starts = self._joined(names)
        i = to_device_async(
            torch.tensor([starts[sample.respacing] + sample.left - 1 for sample in samples]),
            self.device,
        )
        timesteps = [self._timesteps(sample.respacing)[sample.left - 1] for sample in samples]
        output = self._denoise(samples, flight, schedule.timestep[i], timesteps)
        noise = to_device_async(torch.cat([self._noise(sample) for sample in samples]), self.device)
        step = self._sampled(
            samples,
            schedule,
            output,
            flight,
            i,
            noise,
            self._gradient(samples, schedule, output, flight, i, timesteps),
        )
        x = step.x
        if not self.config.unet.inpaint and any(sample.edits for sample in samples):
            # Without inpainting channels, the model sees known pixels only in x itself (sec. 4.3).
            # Draw noise for edits only: the generator of another sample must not depend on whether
            # an edit is in the batch.
            renoise = torch.cat(
                [
                    self._noise(sample) if sample.edits else torch.zeros_like(x[:1], device="cpu")
                    for sample in samples
                ]
            )
            x = renoise_known(
                schedule,
                x,
                i,
                to_device_async(renoise, self.device),
                Known(flight.conditioning.known, flight.conditioning.known_mask),
            )
        for n, sample in enumerate(samples):
            sample.left -= 1
            if sample.shows():
                sample.request.watch(step.x0[n].cpu())
        return replace(flight, x=x, history=flight.history.then(step.remembered))

    def _sampled(
        self,
        samples: list[ActiveSample],
        schedule: Schedule,
        output: ModelOutput,
        flight: SampleBatch,
        i: Tensor,
        noise: Tensor,
        gradient: Tensor | None,
    ) -> Step:
        """One reverse step of every sample, each with its own sampler."""
        names = [sample.sampler for sample in samples]
        parts, order = [], []
        for name in dict.fromkeys(names):
            here = [n for n, sampler in enumerate(names) if sampler == name]
            rows = (
                slice(None)
                if len(here) == len(names)
                else to_device_async(torch.tensor(here), self.device)
            )
            part = flight[rows]
            known = (
                Known(part.conditioning.known, part.conditioning.known_mask)
                if any(samples[n].edits for n in here)
                else None
            )
            push = None if gradient is None else gradient[rows]
            parts.append(
                SAMPLERS[name](
                    schedule, output[rows], part.x, i[rows], noise[rows], known, push, part.history
                )
            )
            order += here
        return (
            parts[0]
            if len(parts) == 1
            else Step.join(parts)[to_device_async(torch.tensor(order).argsort(), self.device)]
        )

    def _gradient(
        self,
        samples: list[ActiveSample],
        schedule: Schedule,
        output: ModelOutput,
        flight: SampleBatch,
        i: Tensor,
        timesteps: list[int],
    ) -> Tensor | None:
        """CLIP guidance gradient (S, 3, H, W): 0 for unguided samples, None if all are unguided."""
        pulled = [
            n
            for n, sample in enumerate(samples)
            if sample.request.clip_scale
            and sample.guides(timesteps[n], self.config.diffusion.steps)
        ]
        if not pulled:
            return None
        rows = to_device_async(torch.tensor(pulled), self.device)
        scale = to_device_async(
            torch.tensor([samples[n].request.clip_scale for n in pulled]), self.device
        )
        seen = flight.x
        if not self.critic.noised:
            # For a CLIP trained on noiseless images, blend the predicted x_0 with x_t; the share of
            # x_0 is sqrt(1 - alpha_bar) (Crowson 2021a).
            share = (1 - schedule.at("alpha_bar", i)).sqrt().float()
            seen = share * predict_x0(schedule, output, flight.x, i, None) + (1 - share) * flight.x
        gradient = torch.zeros_like(flight.x)
        gradient[rows] = score_gradient(
            self.critic.score, seen[rows], schedule.timestep[i[rows]], flight.clip_text[rows], scale
        )
        return gradient

    def _first_index(self, request: SampleRequest) -> int:
        """Schedule index of a sample's first step: the last index, or lower by its strength.

        Raises UserError for an invalid strength or respacing.
        """
        steps = len(self.schedule(request.respacing))
        if not 0 < request.strength <= 1:  # true for NaN, too
            raise UserError(
                f"strength must lie above 0 and at most at 1 (given: {request.strength}); "
                f"0.6 keeps the picture's outline."
            )
        return steps - 1 if request.start is None else max(1, round(request.strength * steps)) - 1

    def _denoise(
        self,
        samples: list[ActiveSample],
        flight: SampleBatch,
        timestep: Tensor,
        timesteps: list[int],
    ) -> ModelOutput:
        """Model output with classifier-free guidance.

        `timesteps`: the values of `timestep` (S,) on the host, to avoid a device synchronisation.
        """
        scale = torch.tensor(
            [
                sample.scale if sample.guides(t, self.config.diffusion.steps) else 1.0
                for sample, t in zip(samples, timesteps, strict=True)
            ]
        )

        def paired(x: Tensor, timestep: Tensor) -> ModelOutput:
            return self._network(
                x, timestep, *self._with_empty(flight, scale.ne(1).nonzero()[:, 0])
            )

        return classifier_free(paired, scale)(flight.x, timestep)

    def _with_empty(self, flight: SampleBatch, guided: Tensor) -> tuple[Conditioning, TextFeatures]:
        """Conditioning of a network call: all samples, then the guided ones with the empty caption.

        `guided`: indices of the samples with a guidance scale other than 1.
        """
        if not len(guided):
            return flight.conditioning, flight.text
        # Unbatched calls skip the cache: they gain nothing, and lanes would overwrite each other's.
        known = self._paired if self.batched else None
        # `flight.text` cannot identify the batch: samples with one caption share text features.
        if known is None or known[0] is not flight.conditioning or known[1] != guided.tolist():
            conditioning = Conditioning.join(
                [flight.conditioning, flight.conditioning[to_device_async(guided, self.device)]]
            )
            empty = self._empty_text().map(
                lambda tensor: tensor.expand(len(guided), *tensor.shape[1:])
            )
            known = (
                flight.conditioning,
                guided.tolist(),
                conditioning,
                TextFeatures.join([flight.text, empty]),
            )
            if self.batched:
                self._paired = known
        return known[2:]

    def _empty_text(self) -> TextFeatures:
        """Text features of the empty caption, shared by all guided samples."""
        context = self.config.unet.text.context
        return self._encoded(
            torch.zeros(1, context, dtype=torch.int64), torch.zeros(1, context, dtype=torch.bool)
        )

    def _encoded(self, tokens: Tensor, mask: Tensor) -> TextFeatures:
        """Text features of a caption, `tokens` and `mask` (1, K), from an LRU cache."""
        caption = tokens.numpy().tobytes() + mask.numpy().tobytes()
        features = self._captions.pop(caption, None)
        if features is None:
            features = self.model.encode_text(tokens.to(self.device), mask.to(self.device))
        self._captions[caption] = features
        if len(self._captions) > CACHED_CAPTIONS:
            self._captions.popitem(last=False)
        return features

    def _admit(self, sample: ActiveSample) -> None:
        sample.row = self._row(sample)
        self._samples.append(sample)

    def _row(self, sample: ActiveSample) -> SampleBatch:
        """The tensors of a sample before its first step."""
        request = sample.request
        text = self._encoded(request.conditioning.tokens.cpu(), request.conditioning.mask.cpu())
        sample.edits = request.conditioning.known_mask is not None and bool(
            request.conditioning.known_mask.any()
        )
        conditioning = request.conditioning.to(self.device)
        if conditioning.known is None:  # lets samples with and without known pixels share a batch
            size = self.config.unet.image_size
            conditioning = replace(
                conditioning,
                known=torch.zeros(1, 3, size, size, device=self.device),
                known_mask=torch.zeros(1, 1, size, size, device=self.device),
            )
        clip_text = request.clip_text
        if clip_text is None:  # lets samples with and without CLIP guidance share a batch
            clip_text = torch.zeros(1, 0 if self.critic is None else self.critic.embedding)
        x = (
            self._noise(sample) * self.config.sampling.noise_scale
            if request.noise is None
            else request.noise[None]
        ).to(self.device)
        if request.start is not None:
            i = torch.tensor([sample.left - 1], device=self.device)
            x = q_sample(
                self.schedule(request.respacing), request.start[None].to(self.device), i, x
            )
        return SampleBatch(
            x=x,
            clip_text=clip_text.to(self.device),
            history=History.none(x),
            conditioning=conditioning,
            text=text,
        )

    def _noise(self, sample: ActiveSample) -> Tensor:
        size = self.config.unet.image_size
        return torch.randn(1, 3, size, size, generator=sample.generator)

    def _joined(self, names: list[str]) -> tuple[Schedule, dict[str, int]]:
        schedules = [self.schedule(name) for name in names]
        starts = dict(
            zip(names, torch.tensor([0, *map(len, schedules)]).cumsum(0).tolist(), strict=False)
        )
        return (schedules[0] if len(schedules) == 1 else join(schedules)), starts

    def _timesteps(self, respacing: str) -> list[int]:
        """Timesteps of a respaced schedule, on the host: no device synchronisation. Cached."""
        if respacing not in self._kept:
            self._kept[respacing] = kept_timesteps(self.config.diffusion.steps, respacing)
        return self._kept[respacing]
