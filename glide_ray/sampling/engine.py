"""Thread-safe wrapper of a stepper, used by the server: requests in, Futures of images out."""

from __future__ import annotations

import queue
import threading
import time
from concurrent.futures import CancelledError, Future, InvalidStateError
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError
from .finite import finite_rows
from .request import SampleRequest
from .stepper import Stepper


@dataclass(frozen=True)
class Load:
    """Current load of an engine, and its counters since it started."""

    in_flight: int
    queued: int
    width: int  # maximum number of samples per step
    steps: int  # steps done; each advances up to `width` samples
    sample_steps: int  # denoising steps, summed over samples; / (width * steps): mean occupancy
    busy_seconds: float  # time spent in steps
    finished: int  # samples
    cancelled: int  # samples
    failed: int  # samples
    not_finite: int = 0  # samples among the failed: their image had NaN or infinite values


class Engine:
    """Runs a stepper on its own thread. `submit` may be called from any thread.

    A cancelled Future frees the sample's place before the next step.
    """

    def __init__(self, stepper: Stepper):
        self._stepper = stepper
        self._inbox: queue.SimpleQueue[tuple[SampleRequest, Future[Tensor]] | None] = (
            queue.SimpleQueue()
        )
        self._futures: dict[int, Future[Tensor]] = {}
        self._requests: dict[int, SampleRequest] = {}  # of the same tickets
        self._closed = False
        self._busy_seconds, self._not_finite = 0.0, 0
        self._ended = {"finished": 0, "cancelled": 0, "failed": 0}
        self._thread = threading.Thread(target=self._loop, name="glide-engine", daemon=True)
        self._thread.start()

    @property
    def load(self) -> Load:
        scheduler = self._stepper.scheduler
        return Load(
            scheduler.in_flight,
            scheduler.queued + self._inbox.qsize(),
            scheduler.width,
            scheduler.steps_done,
            scheduler.sample_steps_done,
            self._busy_seconds,
            **self._ended,
            not_finite=self._not_finite,
        )

    def submit(self, request: SampleRequest) -> Future[Tensor]:
        """Queue a request and return a Future of its image (3, H, W) in [-1, 1], on the CPU.

        The Future raises UserError for an invalid request, NonFiniteError for an image that is not
        finite. Raises RuntimeError after `close`.
        """
        future: Future[Tensor] = Future()
        self._inbox.put((request, future))
        # Check after the put: if `_closed` is not set yet, the engine's thread has yet to empty the
        # inbox, and will cancel this Future when it closes.
        if self._closed:
            raise RuntimeError("this engine has been closed")
        return future

    def check(self) -> None:
        """Raise RuntimeError if the engine's thread has ended or its CUDA stream has failed.

        Neither recovers: the engine can serve no further request.
        """
        if not self._thread.is_alive():
            raise RuntimeError("the engine's thread has ended; start another engine")
        if self._stepper.device.type == "cuda":
            torch.cuda.current_stream(self._stepper.device).query()

    def close(self) -> None:
        """Stop after the current step and cancel all unfinished samples."""
        self._closed = True
        self._inbox.put(None)
        self._thread.join()

    def _loop(self) -> None:
        try:
            while not self._closed:
                self._receive(block=not self._futures)
                began = time.monotonic()
                self._step()
                self._busy_seconds += time.monotonic() - began
        finally:  # also after an exception: no caller may wait for ever on a Future
            self._closed = True
            for future in self._futures.values():
                future.cancel()
            while not self._inbox.empty():
                if (item := self._inbox.get()) is not None:
                    item[1].cancel()

    def _step(self) -> None:
        for ticket in [ticket for ticket, future in self._futures.items() if future.cancelled()]:
            self._stepper.scheduler.cancel(ticket)
            self._end(ticket, "cancelled")
        try:
            for ticket, image in self._stepper.step():
                # GPU errors surface here. Copy before `_end`, so that the sample is still
                # registered and fails with the others.
                self._finish(ticket, image.cpu())
        except Exception as error:
            # A failed step fails every sample in flight; queued samples may still succeed.
            waiting = self._stepper.scheduler.waiting
            for ticket in [ticket for ticket in self._futures if ticket not in waiting]:
                self._stepper.scheduler.cancel(ticket)
                _settle(self._end(ticket, "failed"), error)

    def _finish(self, ticket: int, image: Tensor) -> None:
        """Deliver a finished image (3, H, W), or the error of one that is not finite."""
        if all(finite_rows(image[None])):
            _settle(self._end(ticket, "finished"), image)
            return
        error = self._stepper.fault(self._requests[ticket])
        self._not_finite += 1
        _settle(self._end(ticket, "failed"), error)

    def _end(self, ticket: int, how: str) -> Future[Tensor]:
        self._ended[how] += 1
        del self._requests[ticket]
        return self._futures.pop(ticket)

    def _receive(self, block: bool) -> None:
        """Move requests from the inbox to the stepper. `block`: wait for at least one."""
        while block or not self._inbox.empty():
            item = self._inbox.get()
            if item is None:
                return
            request, future = item
            try:
                ticket = self._stepper.submit(request)
                self._futures[ticket], self._requests[ticket] = future, request
                block = False
            except Exception as error:  # fails this request only; the thread serves the others
                self._ended["failed"] += not isinstance(error, UserError)
                _settle(future, error)


def _settle(future: Future[Tensor], result: Tensor | Exception) -> None:
    try:
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)
    except (InvalidStateError, CancelledError):  # the client cancelled at the same moment
        pass
