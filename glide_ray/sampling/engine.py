"""A stepper that many threads share: requests in, Futures of images out. What the server runs."""

from __future__ import annotations

import queue
import threading
import time
from concurrent.futures import CancelledError, Future, InvalidStateError
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError
from .request import SampleRequest
from .stepper import Stepper


@dataclass(frozen=True)
class Load:
    """What an engine has to do, and what it has done since it began."""

    in_flight: int
    queued: int
    width: int  # samples that one step can advance
    steps: int  # network steps
    sample_steps: int  # of all samples: divided by width * steps, how full the steps were
    busy_seconds: float
    finished: int  # samples
    cancelled: int
    failed: int


class Engine:
    """A stepper with a thread of its own: `submit` from anywhere, wait on the Future it gives.

    Cancelling the Future frees the sample's place before the next step.
    """

    def __init__(self, stepper: Stepper):
        self._stepper = stepper
        self._inbox: queue.SimpleQueue[tuple[SampleRequest, Future] | None] = queue.SimpleQueue()
        self._futures: dict[int, Future] = {}
        self._closed = False
        self._busy_seconds, self._ended = 0.0, {"finished": 0, "cancelled": 0, "failed": 0}
        self._thread = threading.Thread(target=self._loop, name="glide-engine", daemon=True)
        self._thread.start()

    @property
    def load(self) -> Load:
        stepper = self._stepper
        return Load(
            stepper.in_flight,
            stepper.queued + self._inbox.qsize(),
            stepper.width,
            stepper.steps_done,
            stepper.sample_steps_done,
            self._busy_seconds,
            **self._ended,
        )

    def submit(self, request: SampleRequest) -> Future:
        """A Future of the image (3, H, W) in [-1, 1], on the CPU."""
        future: Future = Future()
        self._inbox.put((request, future))
        if self._closed:  # asked last: what was put before it closed is cancelled by it
            raise RuntimeError("this engine has been closed")
        return future

    def check(self) -> None:
        """Raises RuntimeError where no request can be answered any more: the thread has ended, or the GPU's stream has failed."""
        if not self._thread.is_alive():
            raise RuntimeError("the engine's thread has ended; start another engine")
        if self._stepper.device.type == "cuda":
            torch.cuda.current_stream(self._stepper.device).query()

    def close(self) -> None:
        """Stop after the current step; what has not finished is cancelled."""
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
        finally:  # also where a fault ends the thread: nobody is to wait for it
            self._closed = True
            for future in self._futures.values():
                future.cancel()
            while not self._inbox.empty():
                if (item := self._inbox.get()) is not None:
                    item[1].cancel()

    def _step(self) -> None:
        for ticket in [ticket for ticket, future in self._futures.items() if future.cancelled()]:
            self._stepper.cancel(ticket)
            self._end(ticket, "cancelled")
        try:
            for ticket, image in self._stepper.step():
                pixels = image.cpu()  # a GPU's faults come out here: the sample is still one of ours, and fails with the others
                _settle(self._end(ticket, "finished"), pixels)
        except Exception as error:  # a network that fails does so for every sample in flight; those that wait may succeed
            waiting = self._stepper.waiting
            for ticket in [ticket for ticket in self._futures if ticket not in waiting]:
                self._stepper.cancel(ticket)
                _settle(self._end(ticket, "failed"), error)

    def _end(self, ticket: int, how: str) -> Future:
        self._ended[how] += 1
        return self._futures.pop(ticket)

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
            except Exception as error:  # of this request alone: the thread goes on for the others
                self._ended["failed"] += not isinstance(error, UserError)
                _settle(future, error)


def _settle(future: Future, result: Tensor | Exception) -> None:
    try:
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)
    except (InvalidStateError, CancelledError):  # its client left in the same moment
        pass
