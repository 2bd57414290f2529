"""Samples in flight at different timesteps, advanced together one denoising step at a time.

The loop under the cascade and under the server. Each sample has its own seed, sampler, number of steps, guidance scale and
conditioning, and joins and leaves between steps. Its noise comes from a generator of its own on the CPU, so a sample is the
same whatever it is batched with, on whichever replica, and after a retry: to the last bit on a CPU, up to rounding on a GPU.
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

DEADLINE_STRETCH = 3  # a sample is due after so many times its own steps: short ones go first, and none waits for ever
CACHED_CAPTIONS = 64  # of which the text features are at hand
GPU_STEPS_AHEAD = 1  # steps that a GPU may still have to do when the next is prepared: what leaves or comes is heeded the step after


class Stepper:
    """Not thread-safe: one thread submits and steps (`engine.Engine` has a thread of its own).

    `batched` puts all samples into one network call, which is what a GPU wants. On a CPU a call takes as long as its rows do
    one by one, so there each sample has a call to itself, `lanes` of them at once, and is then the same to the last bit in any
    company. Each step advances the samples that are due first; all that are in flight where they are batched.
    `critic` is the CLIP that guides those samples that ask for it.
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
        self.width = (
            max_in_flight if self.batched else min(lanes, max_in_flight)
        )  # samples that a step advances, at most
        self._network = self.model
        if self.device.type == "cuda":
            self.model.fuse()
            self._network = GraphRunner(
                self.model, max_in_flight * (1 if config.sampling.guidance_scale == 1 else 2)
            )
        self.critic = critic
        self.steps_done = 0
        self.sample_steps_done = 0  # of all samples
        self._process = make_schedule(config.diffusion.schedule, config.diffusion.steps)
        self._schedules: dict[str, Schedule] = {}
        self._kept: dict[str, list[int]] = {}
        self._waiting: list[ActiveSample] = []
        self._samples: list[ActiveSample] = []
        self._together: list[ActiveSample] = []  # those whose rows are joined
        self._flight: SampleBatch | None = None  # in this
        self._paired: tuple[Conditioning, list[int], Conditioning, TextFeatures] | None = (
            None  # the last call's, for as long as the samples are the same
        )
        self._events: deque[torch.cuda.Event] = deque()  # steps that a GPU has been given
        self._tickets = 0
        self._captions: OrderedDict[bytes, TextFeatures] = OrderedDict()
        self._lanes = None
        if (
            not self.batched and self.width > 1
        ):  # the cores are shared by the lanes: what a call computes does not depend on its company
            threads = max(1, torch.get_num_threads() // self.width)
            self._lanes = ThreadPoolExecutor(
                self.width, "glide-lane", torch.set_num_threads, (threads,)
            )

    # -- coming and going ---------------------------------------------------------------------------------------------

    @property
    def in_flight(self) -> int:
        return len(self._samples)

    @property
    def queued(self) -> int:
        return len(self._waiting)

    @property
    def waiting(self) -> set[int]:
        """Tickets of the queued."""
        return {sample.ticket for sample in self._waiting}

    def submit(self, request: SampleRequest) -> int:
        """Queue a request and return its ticket. Raises UserError at once for one that makes no sense."""
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
        """Forget a sample, queued or in flight. False if there is none."""
        before = len(self._waiting) + len(self._samples)
        self._waiting = [sample for sample in self._waiting if sample.ticket != ticket]
        self._samples = [sample for sample in self._samples if sample.ticket != ticket]
        return len(self._waiting) + len(self._samples) < before

    def schedule(self, respacing: str | None) -> Schedule:
        """The respaced schedule of a request, on the device, made once."""
        name = respacing or self.config.sampling.respacing
        if name not in self._schedules:
            self._schedules[name] = respace(self._process, name).to(self.device)
        return self._schedules[name]

    # -- one step -----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> list[tuple[int, Tensor]]:
        """Admit what fits, advance the samples that are due first by one step, and return the finished: (ticket, image (3, H, W) in [-1, 1])."""
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
        """All requests to their end: images (N, 3, H, W) in [-1, 1], in order. `on_step` is given denoising steps done and in all."""
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
        except BaseException:  # an interrupt too: nothing is left for the next run to compute
            for ticket in images:
                self.cancel(ticket)
            raise
        return torch.stack(list(images.values()))

    @torch.inference_mode()
    def warm(self, request: SampleRequest) -> None:
        """Run a first sample; on a GPU also choose kernels and record graphs for every number of samples, which the next ones would wait for."""
        self.run([request])
        if isinstance(self._network, GraphRunner):
            self._network.record()

    @torch.inference_mode()
    def invert(self, requests: Sequence[SampleRequest], images: Tensor) -> Tensor:
        """The noise (N, 3, H, W) from which DDIM's steps lead to `images` (N, 3, H, W), in as many steps as the first request says.

        The ODE of eq. 14 of Song et al. (2020) run backwards; the way back is as exact as its steps are small.
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

    # -- inside -------------------------------------------------------------------------------------------------------

    def _due(self, request: SampleRequest, steps: int) -> float:
        """When a sample is to be finished, in sample-steps of this stepper: after `DEADLINE_STRETCH` times its own and its group's before it."""
        group = sum(
            other.left
            for other in (*self._samples, *self._waiting)
            if request.group is not None and other.request.group == request.group
        )
        return self.sample_steps_done + DEADLINE_STRETCH * (group + steps)

    def _wait(self, ahead: int) -> None:
        """Until a GPU has no more than so many steps before it."""
        while len(self._events) > ahead:
            self._events.popleft().synchronize()

    def _part(self) -> None:
        """Give the samples that were batched their own rows again."""
        for n, sample in enumerate(self._together):
            sample.row = self._flight[n : n + 1]
        self._together, self._flight = [], None

    @torch.inference_mode()
    def _advance(self, samples: list[ActiveSample], flight: SampleBatch) -> SampleBatch:
        """One step of all these samples, in one network call. What decides it is known here: the device is asked nothing."""
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
            # This model does not see what is known but in x itself (sec. 4.3). The noise is drawn for edits only.
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
        """One reverse step of every sample by its own sampler."""
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
        """The push of CLIP guidance (S, 3, H, W): zero for samples that have none, None where none has."""
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
        if (
            not self.critic.noised
        ):  # it is shown the predicted image as it emerges from the noise (Crowson 2021a)
            share = (1 - schedule.at("alpha_bar", i)).sqrt().float()
            seen = share * predict_x0(schedule, output, flight.x, i, None) + (1 - share) * flight.x
        gradient = torch.zeros_like(flight.x)
        gradient[rows] = score_gradient(
            self.critic.score, seen[rows], schedule.timestep[i[rows]], flight.clip_text[rows], scale
        )
        return gradient

    def _first_index(self, request: SampleRequest) -> int:
        """Where a sample enters its schedule: at the end, or as far from it as its strength says. Raises UserError."""
        steps = len(self.schedule(request.respacing))
        if not 0 < request.strength <= 1:  # also for nan
            raise UserError(
                f"strength must lie above 0 and at most at 1 (given: {request.strength}); 0.6 keeps the picture's outline."
            )
        return steps - 1 if request.start is None else max(1, round(request.strength * steps)) - 1

    def _denoise(
        self,
        samples: list[ActiveSample],
        flight: SampleBatch,
        timestep: Tensor,
        timesteps: list[int],
    ) -> ModelOutput:
        """The guided output. `timesteps` are those of `timestep` (S,), known without asking the device."""
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
        """The conditions of a call: those of all samples, and once more of the `guided` (their numbers), with the empty caption."""
        if not len(guided):
            return flight.conditioning, flight.text
        known = (
            self._paired if self.batched else None
        )  # one by one there is nothing to save, and lanes would disturb each other
        if (
            known is None or known[0] is not flight.conditioning or known[1] != guided.tolist()
        ):  # samples of one caption share its text
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
        """The features of the empty caption, which every guided sample shares."""
        context = self.config.unet.text.context
        return self._encoded(
            torch.zeros(1, context, dtype=torch.int64), torch.zeros(1, context, dtype=torch.bool)
        )

    def _encoded(self, tokens: Tensor, mask: Tensor) -> TextFeatures:
        """A caption's features, (1, K) tokens and mask: kept for the samples after it, but those longest unused."""
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
        """A sample's tensors at the beginning of its way."""
        request = sample.request
        text = self._encoded(request.conditioning.tokens.cpu(), request.conditioning.mask.cpu())
        sample.edits = request.conditioning.known_mask is not None and bool(
            request.conditioning.known_mask.any()
        )
        conditioning = request.conditioning.to(self.device)
        if conditioning.known is None:  # so that rows with and without known pixels share a batch
            size = self.config.unet.image_size
            conditioning = replace(
                conditioning,
                known=torch.zeros(1, 3, size, size, device=self.device),
                known_mask=torch.zeros(1, 1, size, size, device=self.device),
            )
        clip_text = request.clip_text
        if clip_text is None:  # so that rows with and without it share a batch
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
        """Those of a schedule, known without asking the device."""
        if respacing not in self._kept:
            self._kept[respacing] = kept_timesteps(self.config.diffusion.steps, respacing)
        return self._kept[respacing]
