"""Denoise samples at different timesteps together, one step at a time (continuous batching).

The sampling loop of the cascade and of the server. Each sample has its own seed, sampler, number of
steps, guidance scale and conditioning, and joins or leaves the batch between steps. Its noise comes
from its own generator on the CPU, so that its image does not depend on the rest of the batch, on
the replica or on retries: bit-identical on a CPU, equal up to rounding on a GPU.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from ..config.models import ModelConfig
from ..diffusion.process import q_sample
from ..diffusion.samplers import History, Known, StepInput, renoise_known, step_each
from ..diffusion.schedule import (
    RespacedSchedules,
    check_pure_noise,
    listed,
    make_schedule,
)
from ..models.clip_scorer import ClipScorer
from ..models.unet import GlideUNet
from ..tensors import to_device_async
from .checks import check_clip, check_sampler, check_strength
from .denoiser import GuidedDenoiser
from .finite import (
    NonFiniteError,
    fault_of_adapters,
    fault_of_precision,
    fault_of_weights,
    finite_rows,
    zero_or_nan,
)
from .noise import noise_source
from .request import ActiveSample, SampleBatch, SampleRequest
from .scheduler import Scheduler

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
        self.config, self.device, self.critic = config, torch.device(device), critic
        self.batched = self.device.type != "cpu" if batched is None else batched
        width = max_in_flight if self.batched else min(lanes, max_in_flight)
        self.scheduler: Scheduler[ActiveSample] = Scheduler(max_in_flight, width)
        self.process = make_schedule(config.diffusion.schedule, config.diffusion.steps)
        self.schedules = RespacedSchedules(self.process, self.device)
        # Unbatched calls reuse no inputs: they gain nothing, and lanes would overwrite each other.
        self.denoiser = GuidedDenoiser(
            model, config, self.device, dtype, max_in_flight, self.batched, critic
        )
        self.model = self.denoiser.model
        self._joined: list[ActiveSample] = []  # samples whose rows are joined in `_batch`
        self._batch: SampleBatch | None = None  # the joint batch of `_joined`
        self._events: deque[torch.cuda.Event] = deque()  # one per step submitted to the GPU
        self._lanes: ThreadPoolExecutor | None = None
        if not self.batched and width > 1:
            # Every lane always has the same number of threads, busy or not: rounding, and so the
            # image, does not depend on what the other lanes do.
            threads = max(1, torch.get_num_threads() // width)
            self._lanes = ThreadPoolExecutor(width, "glide-lane", torch.set_num_threads, (threads,))

    def submit(self, request: SampleRequest) -> int:
        """Queue a request and return its ticket. Raises UserError for an invalid request."""
        return self.scheduler.submit(self._sample(request))

    def prepare(self, request: SampleRequest) -> ActiveSample:
        """The sample of a request with its tensors before the first step, outside of the queue."""
        sample = self._sample(request)
        sample.row = self._first_row(sample)
        return sample

    @torch.inference_mode()
    def step(self) -> list[tuple[int, Tensor]]:
        """Admit queued samples, then advance those with the earliest deadlines by one step.

        Returns the finished samples as pairs (ticket, image (3, H, W) in [-1, 1]). An image with
        NaN belongs to a sample whose computation overflowed; `fault` says why.
        """
        while (sample := self.scheduler.admit()) is not None:
            sample.row = self._first_row(sample)
        samples = self.scheduler.next_samples()
        if not samples:
            return []
        self._change_captions(samples)
        x = self._step_together(samples) if self.batched else self._step_each(samples)
        self.scheduler.complete(samples)
        return [(sample.ticket, x[n]) for n, sample in enumerate(samples) if not sample.steps_left]

    def run(
        self, requests: Sequence[SampleRequest], on_step: Callable[[int, int], None] | None = None
    ) -> Tensor:
        """Run requests to the end and return their images (N, 3, H, W) in [-1, 1], in order.

        `on_step` receives the denoising steps done and their total, both summed over the requests.
        Raises UserError for an invalid request, NonFiniteError if an image is not finite.
        """
        tickets: dict[int, int] = {}  # ticket -> steps
        images: dict[int, Tensor] = {}
        try:
            for request in requests:
                sample = self._sample(request)
                tickets[self.scheduler.submit(sample)] = sample.steps
            before, total = self.scheduler.sample_steps_done, sum(tickets.values())
            while len(images) < len(tickets):
                images.update((ticket, x) for ticket, x in self.step() if ticket in tickets)
                if on_step:
                    on_step(self.scheduler.sample_steps_done - before, total)
        except BaseException:  # also KeyboardInterrupt: leave no samples behind for the next run
            for ticket in tickets:
                self.scheduler.cancel(ticket)
            raise
        finished = torch.stack([images[ticket] for ticket in tickets])
        for request, finite in zip(requests, finite_rows(finished), strict=True):
            if not finite:
                raise self.fault(request)
        return finished

    def fault(self, request: SampleRequest) -> NonFiniteError:
        """The error of a request whose image is not finite: by its weights, or the precision."""
        return NonFiniteError(
            self._fault_of_weights
            or fault_of_adapters(request.adapters)
            or fault_of_precision(self.config.name, self.denoiser.dtype, bool(request.clip_scale))
        )

    @cached_property
    def _fault_of_weights(self) -> str | None:
        return fault_of_weights(self.model, self.config.name)

    @torch.inference_mode()
    def warm(self, request: SampleRequest) -> None:
        """Run a first sample, so that later ones do not wait for one-time work.

        On a GPU this also selects kernels and records the CUDA graphs of all padded batch sizes.
        """
        self.run([request])
        self.denoiser.record_graphs()

    # -- a sample before its first step ------------------------------------------------------------

    def _sample(self, request: SampleRequest) -> ActiveSample:
        """The state of a new sample. Raises UserError for an invalid request."""
        defaults = self.config.sampling
        sampler, respacing = (
            request.sampler or defaults.sampler,
            request.respacing or defaults.respacing,
        )
        check_sampler(sampler)
        check_strength(request.strength)
        check_clip(request.clip_scale, self.critic is not None and request.clip_text is not None)
        kept = self.schedules.timesteps(respacing)
        steps = len(kept)
        if request.start is None:
            if request.noise_scheme > 1:
                check_pure_noise(self.process, kept[-1], respacing)
        elif request.noise_scheme == 1:  # of recipes before version 0.2
            steps = max(1, round(request.strength * steps))
        else:
            first = round(request.strength * (len(self.process) - 1))
            kept = [*(timestep for timestep in kept if timestep < first), first]
            respacing, steps = listed(kept), len(kept)
        scale = request.guidance_scale
        return ActiveSample(
            steps=steps,
            group=request.group,
            request=request,
            respacing=respacing,
            sampler=sampler,
            guidance_scale=defaults.guidance_scale if scale is None else scale,
            noise=noise_source(request.noise_scheme, request.seed, request.task, self.config.role),
            has_known_pixels=request.has_known_pixels,
        )

    def _first_row(self, sample: ActiveSample) -> SampleBatch:
        """The tensors of a sample before its first step."""
        request = sample.request
        conditioning, text, clip_text = self.denoiser.prepare(
            request.conditioning, request.clip_text, request.adapters, request.emphasis
        )
        negative = self.denoiser.negative_text(request.negative, request.adapters)
        x = (
            self._noise(sample) * self.config.sampling.noise_scale
            if request.noise is None
            else request.noise[None]
        ).to(self.device)
        if request.start is not None:
            schedule = self.schedules.schedule(sample.respacing)
            i = torch.tensor([sample.steps_left - 1], device=self.device)
            x = q_sample(schedule, request.start[None].to(self.device), i, x)
        return SampleBatch(x, clip_text, History.none(x), conditioning, text, negative)

    def _noise(self, sample: ActiveSample) -> Tensor:
        """Fresh noise (1, 3, H, W) of a sample, on the CPU."""
        size = self.config.unet.image_size
        return sample.noise.normal((1, 3, size, size))

    # -- one step ----------------------------------------------------------------------------------

    def _change_captions(self, samples: list[ActiveSample]) -> None:
        """Give the samples whose prompt changes before this step their next caption."""
        for sample in samples:
            timestep = self.schedules.timesteps(sample.respacing)[sample.steps_left - 1]
            caption = sample.due_caption(timestep, self.config.diffusion.steps)
            if caption is not None:
                self._split()  # `row` is outdated in a joint batch
                text = self.denoiser.text_of(caption, sample.request.adapters)
                tokens, mask = (part.to(self.device) for part in (caption.tokens, caption.mask))
                conditioning = replace(sample.row.conditioning, tokens=tokens, mask=mask)
                sample.row = replace(sample.row, conditioning=conditioning, text=text)

    def _step_each(self, samples: list[ActiveSample]) -> list[Tensor]:
        """One step of each sample in a network call of its own. Returns x (3, H, W) of each."""

        def advance(sample: ActiveSample) -> SampleBatch:
            return self._advance([sample], sample.row)

        rows = (
            [*map(advance, samples)]
            if self._lanes is None
            else [*self._lanes.map(advance, samples)]
        )
        for sample, row in zip(samples, rows, strict=True):
            sample.row = row
        return [row.x[0] for row in rows]

    def _step_together(self, samples: list[ActiveSample]) -> Tensor:
        """One step of all samples in one network call. Returns x (S, 3, H, W)."""
        if self._batch is None or samples != self._joined:
            self._split()
            self._joined = samples
            self._batch = SampleBatch.join([sample.row for sample in samples])
        self._wait_for_gpu(GPU_STEPS_AHEAD)
        self._batch = batch = self._advance(samples, self._batch)
        if self.device.type == "cuda":
            self._events.append(torch.cuda.current_stream().record_event())
        return batch.x

    def _split(self) -> None:
        """Split the joint batch into the rows of its samples."""
        if self._batch is not None:
            for n, sample in enumerate(self._joined):
                sample.row = self._batch[n : n + 1]
        self._joined, self._batch = [], None

    def _wait_for_gpu(self, ahead: int) -> None:
        """Block until at most `ahead` submitted steps are unfinished on the GPU."""
        while len(self._events) > ahead:
            self._events.popleft().synchronize()

    @torch.inference_mode()  # again, because the mode is per thread
    def _advance(self, samples: list[ActiveSample], batch: SampleBatch) -> SampleBatch:
        """One step of these samples, in one network call.

        Decisions use state on the host only, so that nothing waits for the device.
        """
        schedule, starts = self.schedules.join([sample.respacing for sample in samples])
        i = to_device_async(
            torch.tensor(
                [
                    start + sample.steps_left - 1
                    for start, sample in zip(starts, samples, strict=True)
                ]
            ),
            self.device,
        )
        timesteps = [
            self.schedules.timesteps(sample.respacing)[sample.steps_left - 1] for sample in samples
        ]
        output = self.denoiser.denoise(samples, batch, schedule.timestep[i], timesteps)
        batch = replace(batch, x=batch.x + zero_or_nan(output))
        noise = to_device_async(torch.cat([self._noise(sample) for sample in samples]), self.device)
        known = _known(batch) if any(sample.has_known_pixels for sample in samples) else None
        step_input = StepInput(schedule, output, batch.x, i, noise, known, history=batch.history)
        gradient = self.denoiser.clip_gradient(samples, batch, step_input, timesteps)
        step = step_each(
            [sample.sampler for sample in samples], replace(step_input, gradient=gradient)
        )
        x = step.x
        if known is not None and not self.config.unet.inpaint:
            # Without inpainting channels, the model sees known pixels only in x itself (sec. 4.3).
            x = renoise_known(schedule, x, i, self._noise_of_edits(samples, x), known)
        for n, sample in enumerate(samples):
            if sample.request.on_preview is not None and sample.shows_preview():
                preview = step.x0[n].cpu()
                if preview.isfinite().all():
                    sample.request.on_preview(preview)
        return replace(batch, x=x, history=batch.history.then(step))

    def _noise_of_edits(self, samples: list[ActiveSample], x: Tensor) -> Tensor:
        """Fresh noise (S, 3, H, W) for samples with known pixels, zeros for the others.

        The noise of a sample must not depend on whether an edit is in the batch.
        """
        none = torch.zeros_like(x[:1], device="cpu")
        noise = [self._noise(sample) if sample.has_known_pixels else none for sample in samples]
        return to_device_async(torch.cat(noise), self.device)


def _known(batch: SampleBatch) -> Known:
    known, mask = batch.conditioning.known, batch.conditioning.known_mask
    assert known is not None and mask is not None  # `GuidedDenoiser.prepare` sets them
    return Known(known, mask)
