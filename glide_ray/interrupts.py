"""Ctrl-C and SIGTERM: end a command at once, or after the current step of a run."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Set by SIGTERM: libraries that catch Terminated may raise a plain KeyboardInterrupt in its place.
_terminated = threading.Event()


class Terminated(KeyboardInterrupt):
    """SIGTERM, which service managers and cluster schedulers send to end a process."""


def exit_code(interrupt: KeyboardInterrupt) -> int:
    """Exit code of an interrupted command, as shells count: 128 and the signal's number."""
    terminated = isinstance(interrupt, Terminated) or _terminated.is_set()
    return 128 + (signal.SIGTERM if terminated else signal.SIGINT)


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """Context in which SIGTERM raises Terminated, so that it ends a command as Ctrl-C does."""

    _terminated.clear()

    def terminate(number: int, frame: object) -> None:
        _terminated.set()
        raise Terminated

    with _handlers({signal.SIGTERM: terminate}):
        yield


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Context that yields a list, to which SIGINT and SIGTERM are appended when received.

    Outside the main thread, which alone receives signals, the list stays empty.
    """
    received: list[int] = []
    with _handlers({number: lambda given, _: received.append(given) for number in SIGNALS}):
        yield received


def raise_interrupt(received: list[int]) -> None:
    """Raise what the first of the `received` signals means, if there is one."""
    if received:
        raise Terminated if received[0] == signal.SIGTERM else KeyboardInterrupt


@contextmanager
def kept_sigterm() -> Iterator[None]:
    """Context at whose end SIGTERM has the handler that it had at the beginning, if it had one.

    `ray.init` installs its own, which ends the process with a stack trace.
    """
    before = signal.getsignal(signal.SIGTERM)
    yield
    if callable(before) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _handlers(handlers: dict) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
