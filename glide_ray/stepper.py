"""Samples in flight at different timesteps, advanced together one denoising step at a time.

The loop under the cascade and under the server. Each sample has its own seed, sampler, number of steps, guidance scale and
conditioning, and joins and leaves between steps. Its noise comes from a generator of its own on the CPU, so a sample is the
same whatever it is batched with, on whichever replica, and after a retry.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, InvalidStateError
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .config import ModelConfig, UserError
from .diffusion.guidance import classifier_free
from .diffusion.samplers import SAMPLERS, Known
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


@dataclass(frozen=True)
class Flight(Rows):
    """The state of S samples, a row each."""

    x: Tensor                    # (S, 3, H, W) float32
    i: Tensor                    # (S,) index into the sample's own schedule, counting down to 0
    scale: Tensor                # (S,) guidance scale
    conditioning: Conditioning
    text: TextFeatures


@dataclass
class Sample:
    """What a sample keeps beside its row."""

    ticket: int
    sampler: str
    respacing: str
    generator: torch.Generator


class Stepper:
    """Not thread-safe: one thread submits and steps (`Engine` is the one with a thread of its own).

    `batched` puts all samples into one network call, which is what a GPU wants. On a CPU a call takes as long as its rows do
    one by one, so there each sample has a call to itself, and is then the same to the last bit in any company.
    """

    def __init__(self, model: GlideUNet, config: ModelConfig, device: torch.device | str = "cpu",
                 dtype: torch.dtype = torch.float32, max_in_flight: int = 8, batched: bool | None = None):
        self.config, self.device, self.max_in_flight = config, torch.device(device), max_in_flight
        self.model = model.to(self.device, dtype).to(memory_format=torch.channels_last).eval().requires_grad_(False)
        self.batched = self.device.type != "cpu" if batched is None else batched
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
        self.schedule(request.respacing)
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
        x = flight.x.clone()
        for sampler in dict.fromkeys(sample.sampler for sample in self._samples):
            rows = torch.tensor([n for n, sample in enumerate(self._samples) if sample.sampler == sampler], device=self.device)
            part = flight[rows]
            known = None
            if part.conditioning.known is not None:
                known = Known(part.conditioning.known, part.conditioning.known_mask)
            x[rows] = SAMPLERS[sampler](schedule, output[rows], part.x, i[rows], noise[rows], known).x
        self.steps_done += 1
        self._flight = replace(flight, x=x, i=flight.i - 1)
        done = schedule.last[i].tolist()
        finished = [(sample.ticket, x[n]) for n, sample in enumerate(self._samples) if done[n]]
        self._keep([not over for over in done])
        return finished

    def run(self, requests: Sequence[SampleRequest], on_step: Callable[[int, int], None] | None = None) -> Tensor:
        """All requests to their end: images (N, 3, H, W) in [-1, 1], in order. `on_step` is given denoising steps done and in all."""
        tickets = [self.submit(request) for request in requests]
        done, total = 0, sum(len(self.schedule(request.respacing)) for request in requests)
        images: dict[int, Tensor] = {}
        while len(images) < len(tickets):
            finished = self.step()
            images.update(finished)
            done += self.in_flight + len(finished)
            if on_step:
                on_step(done, total)
        return torch.stack([images[ticket] for ticket in tickets])

    # -- inside -------------------------------------------------------------------------------------------------------

    def _denoise(self, flight: Flight, timestep: Tensor) -> ModelOutput:
        if self.batched:
            return self._guided(flight, timestep)
        return ModelOutput.join([self._guided(flight[n:n + 1], timestep[n:n + 1]) for n in range(len(timestep))])

    def _guided(self, flight: Flight, timestep: Tensor) -> ModelOutput:
        guided = flight.scale.ne(1).nonzero()[:, 0]

        def paired(x: Tensor, timestep: Tensor) -> ModelOutput:
            if not len(guided):
                return self.model(x, timestep, flight.conditioning, flight.text)
            conditioning = Conditioning.join([flight.conditioning, flight.conditioning[guided]])
            empty = self._empty_text().map(lambda tensor: tensor.expand(len(guided), *tensor.shape[1:]))
            return self.model(x, timestep, conditioning, TextFeatures.join([flight.text, empty]))
        return classifier_free(paired, flight.scale)(flight.x, timestep)

    def _empty_text(self) -> TextFeatures:
        """The features of the empty caption, which every guided sample shares."""
        if self._empty is None:
            context = self.config.unet.text.context
            self._empty = self.model.encode_text(torch.zeros(1, context, dtype=torch.int64, device=self.device),
                                                 torch.zeros(1, context, dtype=torch.bool, device=self.device))
        return self._empty

    def _admit(self, ticket: int, request: SampleRequest) -> None:
        sampling = self.config.sampling
        generator = torch.Generator().manual_seed(request.seed)
        sample = Sample(ticket, request.sampler or sampling.sampler, request.respacing or sampling.respacing, generator)
        conditioning = request.conditioning.to(self.device)
        if conditioning.known is None:                 # so that rows with and without known pixels share a batch
            size = self.config.unet.image_size
            conditioning = replace(conditioning, known=torch.zeros(1, 3, size, size, device=self.device),
                                   known_mask=torch.zeros(1, 1, size, size, device=self.device))
        scale = sampling.guidance_scale if request.guidance_scale is None else request.guidance_scale
        row = Flight(x=(self._noise(sample) * sampling.noise_scale).to(self.device),
                     i=torch.tensor([len(self.schedule(sample.respacing)) - 1], device=self.device),
                     scale=torch.tensor([scale], dtype=torch.float32, device=self.device), conditioning=conditioning,
                     text=self.model.encode_text(conditioning.tokens, conditioning.mask))
        self._flight = row if self._flight is None else Flight.join([self._flight, row])
        self._samples.append(sample)

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


class Engine:
    """A stepper with a thread of its own: `submit` from anywhere, wait on the Future it gives.

    Cancelling the Future frees the sample's place before the next step.
    """

    def __init__(self, stepper: Stepper):
        self._stepper = stepper
        self._inbox: queue.SimpleQueue[tuple[SampleRequest, Future] | None] = queue.SimpleQueue()
        self._futures: dict[int, Future] = {}
        self._closed = False
        self._thread = threading.Thread(target=self._loop, name="glide-engine", daemon=True)
        self._thread.start()

    @property
    def in_flight(self) -> int:
        return self._stepper.in_flight

    @property
    def queued(self) -> int:
        return self._stepper.queued + self._inbox.qsize()

    @property
    def steps_done(self) -> int:
        return self._stepper.steps_done

    def submit(self, request: SampleRequest) -> Future:
        """A Future of the image (3, H, W) in [-1, 1], on the CPU."""
        if self._closed:
            raise RuntimeError("this engine has been closed")
        future: Future = Future()
        self._inbox.put((request, future))
        return future

    def close(self) -> None:
        """Stop after the current step; what has not finished is cancelled."""
        self._closed = True
        self._inbox.put(None)
        self._thread.join()

    def _loop(self) -> None:
        while not self._closed:
            idle = not self._futures
            self._receive(block=idle)
            for ticket in [ticket for ticket, future in self._futures.items() if future.cancelled()]:
                self._stepper.cancel(ticket)
                del self._futures[ticket]
            try:
                for ticket, image in self._stepper.step():
                    _settle(self._futures.pop(ticket), image.cpu())
            except Exception as error:   # a network that fails does so for every sample in flight; later ones may succeed
                for ticket, future in self._futures.items():
                    self._stepper.cancel(ticket)
                    _settle(future, error)
                self._futures.clear()
        for future in self._futures.values():
            future.cancel()

    def _receive(self, block: bool) -> None:
        """Take in what has come; wait for something when there is nothing else to do."""
        while block or not self._inbox.empty():
            item = self._inbox.get()
            if item is None:
                return
            request, future = item
            try:
                self._futures[self._stepper.submit(request)] = future
                block = False
            except UserError as error:
                _settle(future, error)


def _settle(future: Future, result: Tensor | Exception) -> None:
    try:
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)
    except (InvalidStateError, CancelledError):   # its client left in the same moment
        pass
