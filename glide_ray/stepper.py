"""Samples in flight at different timesteps, advanced together one denoising step at a time.

The loop under the cascade and under the server. Each sample has its own seed, sampler, number of steps, guidance scale and
conditioning, and joins and leaves between steps. Its noise comes from a generator of its own on the CPU, so a sample is the
same whatever it is batched with, on whichever replica, and after a retry.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .config import ModelConfig, UserError
from .critic import Critic
from .diffusion.guidance import classifier_free, score_gradient
from .diffusion.process import q_sample
from .diffusion.samplers import SAMPLERS, History, Known, Step, ddim_inversion_step, predict_x0, renoise_known
from .diffusion.schedule import Schedule, join, make_schedule, respace
from .forms import Conditioning, ModelOutput, Rows, TextFeatures
from .models.unet import GlideUNet


@dataclass(frozen=True)
class SampleRequest:
    """One image to make. `conditioning` has one row; None takes the model's own SamplingConfig."""

    conditioning: Conditioning
    seed: int
    respacing: str | None = None
    sampler: str | None = None
    guidance_scale: float | None = None
    guidance_interval: tuple[float, float] = (0.0, 1.0)    # of the timesteps, 1 the noisiest: outside of it nothing guides
    clip_text: Tensor | None = None                        # (1, E): the caption as the stepper's critic embeds it, for CLIP guidance
    clip_scale: float = 0.0
    noise: Tensor | None = None                            # (3, H, W): to begin from, instead of the seed's (see `invert`)
    start: Tensor | None = None                            # (3, H, W): an image to begin from instead of noise (SDEdit)
    strength: float = 1.0                                  # how much of the schedule is run from `start`


@dataclass(frozen=True)
class Flight(Rows):
    """The state of S samples, a row each."""

    x: Tensor                    # (S, 3, H, W) float32
    i: Tensor                    # (S,) index into the sample's own schedule, counting down to 0
    scale: Tensor                # (S,) guidance scale
    interval: Tensor             # (S, 2) timesteps between which it holds
    clip_text: Tensor            # (S, E)
    clip_scale: Tensor           # (S,), 0 for no CLIP guidance
    history: History
    conditioning: Conditioning
    text: TextFeatures


@dataclass
class Sample:
    """What a sample keeps beside its row."""

    ticket: int
    sampler: str
    respacing: str
    generator: torch.Generator
    edits: bool                  # whether it has known pixels


class Stepper:
    """Not thread-safe: one thread submits and steps (`engine.Engine` has a thread of its own).

    `batched` puts all samples into one network call, which is what a GPU wants. On a CPU a call takes as long as its rows do
    one by one, so there each sample has a call to itself, and is then the same to the last bit in any company.
    `critic` is the CLIP that guides those samples that ask for it.
    """

    def __init__(self, model: GlideUNet, config: ModelConfig, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32,
                 max_in_flight: int = 8, batched: bool | None = None, critic: Critic | None = None):
        self.config, self.device, self.max_in_flight = config, torch.device(device), max_in_flight
        self.model = model.to(self.device, dtype).to(memory_format=torch.channels_last).eval().requires_grad_(False)
        self.batched = self.device.type != "cpu" if batched is None else batched
        self.critic = critic
        self.steps_done = 0
        self._process = make_schedule(config.diffusion.schedule, config.diffusion.steps)
        self._schedules: dict[str, Schedule] = {}
        self._waiting: deque[tuple[int, SampleRequest]] = deque()
        self._samples: list[Sample] = []
        self._flight: Flight | None = None
        self._tickets = 0
        self._empty: TextFeatures | None = None

    # -- coming and going ---------------------------------------------------------------------------------------------

    @property
    def in_flight(self) -> int:
        return len(self._samples)

    @property
    def queued(self) -> int:
        return len(self._waiting)

    def submit(self, request: SampleRequest) -> int:
        """Queue a request and return its ticket. Raises UserError at once for one that makes no sense."""
        if (request.sampler or self.config.sampling.sampler) not in SAMPLERS:
            raise UserError(f"There is no sampler {request.sampler!r}; choose one of: {', '.join(SAMPLERS)}.")
        if request.clip_scale and (self.critic is None or request.clip_text is None):
            raise UserError("CLIP guidance needs a CLIP model; give one, or leave clip_scale at 0.")
        self._first_index(request)
        self._tickets += 1
        self._waiting.append((self._tickets, request))
        return self._tickets

    def cancel(self, ticket: int) -> bool:
        """Forget a sample, queued or in flight. False if there is none."""
        before = len(self._waiting) + len(self._samples)
        self._waiting = deque(item for item in self._waiting if item[0] != ticket)
        self._keep([sample.ticket != ticket for sample in self._samples])
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
        """Admit what fits, advance every sample by one step, and return the finished: (ticket, image (3, H, W) in [-1, 1])."""
        while self._waiting and len(self._samples) < self.max_in_flight:
            self._admit(*self._waiting.popleft())
        if not self._samples:
            return []
        names = list(dict.fromkeys(sample.respacing for sample in self._samples))
        schedule, starts = self._joined(names)
        flight = self._flight
        i = flight.i + torch.tensor([starts[sample.respacing] for sample in self._samples], device=self.device)
        output = self._denoise(flight, schedule.timestep[i])
        noise = torch.cat([self._noise(sample) for sample in self._samples]).to(self.device)
        step = self._sampled(schedule, output, flight, i, noise, self._gradient(schedule, output, flight, i))
        x = step.x
        if not self.config.unet.inpaint and flight.conditioning.known_mask.any():
            # This model does not see what is known but in x itself (sec. 4.3). The noise is drawn for edits only.
            renoise = torch.cat([self._noise(sample) if sample.edits else torch.zeros_like(x[:1], device="cpu") for sample in self._samples])
            x = renoise_known(schedule, x, i, renoise.to(self.device), Known(flight.conditioning.known, flight.conditioning.known_mask))
        self.steps_done += 1
        self._flight = replace(flight, x=x, i=flight.i - 1, history=flight.history.then(step.remembered))
        done = schedule.last[i].tolist()
        finished = [(sample.ticket, x[n]) for n, sample in enumerate(self._samples) if done[n]]
        self._keep([not over for over in done])
        return finished

    def run(self, requests: Sequence[SampleRequest], on_step: Callable[[int, int], None] | None = None) -> Tensor:
        """All requests to their end: images (N, 3, H, W) in [-1, 1], in order. `on_step` is given denoising steps done and in all."""
        tickets = [self.submit(request) for request in requests]
        done, total = 0, sum(self._first_index(request) + 1 for request in requests)
        images: dict[int, Tensor] = {}
        while len(images) < len(tickets):
            finished = self.step()
            images.update(finished)
            done += self.in_flight + len(finished)
            if on_step:
                on_step(done, total)
        return torch.stack([images[ticket] for ticket in tickets])

    @torch.inference_mode()
    def invert(self, requests: Sequence[SampleRequest], images: Tensor) -> Tensor:
        """The noise (N, 3, H, W) from which DDIM's steps lead to `images` (N, 3, H, W), in as many steps as the first request says.

        The ODE of eq. 14 of Song et al. (2020) run backwards; the way back is as exact as its steps are small.
        """
        flight = replace(Flight.join([self._row(request)[1] for request in requests]), x=images.to(self.device))
        schedule = self.schedule(requests[0].respacing)
        for index in range(len(schedule) - 1):
            i = torch.full((len(images),), index, device=self.device)
            flight = replace(flight, x=ddim_inversion_step(schedule, self._denoise(flight, schedule.timestep[i]), flight.x, i).x)
        return flight.x

    # -- inside -------------------------------------------------------------------------------------------------------

    def _sampled(self, schedule: Schedule, output: ModelOutput, flight: Flight, i: Tensor, noise: Tensor, gradient: Tensor | None) -> Step:
        """One reverse step of every sample by its own sampler."""
        names = [sample.sampler for sample in self._samples]
        parts, order = [], []
        for name in dict.fromkeys(names):
            rows = torch.tensor([n for n, sampler in enumerate(names) if sampler == name], device=self.device)
            part = flight[rows]
            known = Known(part.conditioning.known, part.conditioning.known_mask)
            push = None if gradient is None else gradient[rows]
            parts.append(SAMPLERS[name](schedule, output[rows], part.x, i[rows], noise[rows], known, push, part.history))
            order.append(rows)
        return parts[0] if len(parts) == 1 else Step.join(parts)[torch.cat(order).argsort()]

    def _gradient(self, schedule: Schedule, output: ModelOutput, flight: Flight, i: Tensor) -> Tensor | None:
        """The push of CLIP guidance (S, 3, H, W): zero for samples that have none, None where none has."""
        timestep = schedule.timestep[i]
        rows = (flight.clip_scale.ne(0) & _inside(timestep, flight.interval)).nonzero()[:, 0]
        if not len(rows):
            return None
        seen = flight.x
        if not self.critic.noised:      # it is shown the predicted image as it emerges from the noise (Crowson 2021a)
            share = (1 - schedule.at("alpha_bar", i)).sqrt().float()
            seen = share * predict_x0(schedule, output, flight.x, i, None) + (1 - share) * flight.x
        gradient = torch.zeros_like(flight.x)
        for group in [rows] if self.batched else rows.split(1):
            gradient[group] = score_gradient(self.critic.score, seen[group], timestep[group], flight.clip_text[group], flight.clip_scale[group])
        return gradient

    def _first_index(self, request: SampleRequest) -> int:
        """Where a sample enters its schedule: at the end, or as far from it as its strength says. Raises UserError."""
        steps = len(self.schedule(request.respacing))
        if not 0 < request.strength <= 1:      # also for nan
            raise UserError(f"strength must lie above 0 and at most at 1 (given: {request.strength}); 0.6 keeps the picture's outline.")
        return steps - 1 if request.start is None else max(1, round(request.strength * steps)) - 1

    def _denoise(self, flight: Flight, timestep: Tensor) -> ModelOutput:
        if self.batched:
            return self._guided(flight, timestep)
        return ModelOutput.join([self._guided(flight[n:n + 1], timestep[n:n + 1]) for n in range(len(timestep))])

    def _guided(self, flight: Flight, timestep: Tensor) -> ModelOutput:
        scale = torch.where(_inside(timestep, flight.interval), flight.scale, 1.0)
        guided = scale.ne(1).nonzero()[:, 0]

        def paired(x: Tensor, timestep: Tensor) -> ModelOutput:
            if not len(guided):
                return self.model(x, timestep, flight.conditioning, flight.text)
            conditioning = Conditioning.join([flight.conditioning, flight.conditioning[guided]])
            empty = self._empty_text().map(lambda tensor: tensor.expand(len(guided), *tensor.shape[1:]))
            return self.model(x, timestep, conditioning, TextFeatures.join([flight.text, empty]))
        return classifier_free(paired, scale)(flight.x, timestep)

    def _empty_text(self) -> TextFeatures:
        """The features of the empty caption, which every guided sample shares."""
        if self._empty is None:
            context = self.config.unet.text.context
            self._empty = self.model.encode_text(torch.zeros(1, context, dtype=torch.int64, device=self.device),
                                                 torch.zeros(1, context, dtype=torch.bool, device=self.device))
        return self._empty

    def _admit(self, ticket: int, request: SampleRequest) -> None:
        sample, row = self._row(request, ticket)
        self._flight = row if self._flight is None else Flight.join([self._flight, row])
        self._samples.append(sample)

    def _row(self, request: SampleRequest, ticket: int = 0) -> tuple[Sample, Flight]:
        """A sample at the beginning of its way."""
        sampling = self.config.sampling
        conditioning = request.conditioning.to(self.device)
        edits = conditioning.known_mask is not None and bool(conditioning.known_mask.any())
        if conditioning.known is None:      # so that rows with and without known pixels share a batch
            size = self.config.unet.image_size
            conditioning = replace(conditioning, known=torch.zeros(1, 3, size, size, device=self.device),
                                   known_mask=torch.zeros(1, 1, size, size, device=self.device))
        generator = torch.Generator().manual_seed(request.seed)
        sample = Sample(ticket, request.sampler or sampling.sampler, request.respacing or sampling.respacing, generator, edits)
        scale = sampling.guidance_scale if request.guidance_scale is None else request.guidance_scale
        clip_text = request.clip_text
        if clip_text is None:       # so that rows with and without it share a batch
            clip_text = torch.zeros(1, 0 if self.critic is None else self.critic.embedding)
        i = torch.tensor([self._first_index(request)], device=self.device)
        x = (self._noise(sample) * sampling.noise_scale if request.noise is None else request.noise[None]).to(self.device)
        if request.start is not None:
            x = q_sample(self.schedule(request.respacing), request.start[None].to(self.device), i, x)
        return sample, Flight(
            x=x, i=i, scale=torch.tensor([scale], dtype=torch.float32, device=self.device),
            interval=torch.tensor([request.guidance_interval], device=self.device) * self.config.diffusion.steps,
            clip_text=clip_text.to(self.device), clip_scale=torch.tensor([request.clip_scale], dtype=torch.float32, device=self.device),
            history=History.none(x), conditioning=conditioning, text=self.model.encode_text(conditioning.tokens, conditioning.mask))

    def _noise(self, sample: Sample) -> Tensor:
        size = self.config.unet.image_size
        return torch.randn(1, 3, size, size, generator=sample.generator)

    def _joined(self, names: list[str]) -> tuple[Schedule, dict[str, int]]:
        schedules = [self.schedule(name) for name in names]
        starts = dict(zip(names, torch.tensor([0, *map(len, schedules)]).cumsum(0).tolist(), strict=False))
        return (schedules[0] if len(schedules) == 1 else join(schedules)), starts

    def _keep(self, keep: list[bool]) -> None:
        if all(keep):
            return
        self._samples = [sample for sample, stays in zip(self._samples, keep, strict=True) if stays]
        self._flight = self._flight[torch.tensor(keep, device=self.device)] if self._samples else None


def _inside(timestep: Tensor, interval: Tensor) -> Tensor:
    return (timestep >= interval[:, 0]) & (timestep <= interval[:, 1])
