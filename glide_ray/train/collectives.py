"""Collectives for Python objects. All ranks must call them together."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from ..errors import UserError

Value = TypeVar("Value")


def all_gather_object(value: Value, group: dist.ProcessGroup | None = None) -> list[Value]:
    """The values of all ranks, in rank order; `[value]` if there is only one process."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def from_rank_0(make: Callable[[], Value]) -> Value:
    """What `make` returns on rank 0, on every rank. Raises the UserError that it raises there."""
    made: tuple[Value | None, UserError | None] = None, None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            made = make(), None
        except UserError as error:
            made = None, error
    value, fault = broadcast_object(made)
    if fault is not None:
        raise fault
    return value  # type: ignore[return-value]


def broadcast_object(value: Value, group: dist.ProcessGroup | None = None) -> Value:
    """The value of rank 0, on every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, group=group)
    return values[0]
