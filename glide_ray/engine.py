"""A stepper that many threads share: requests in, Futures of images out. What the server runs."""

from __future__ import annotations

import queue
import threading
from concurrent.futures import CancelledError, Future, InvalidStateError

from torch import Tensor

from .config import UserError
from .stepper import SampleRequest, Stepper


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
