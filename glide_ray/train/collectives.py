"""What the ranks of a run tell each other beside tensors. All of them call each of these together."""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist

Value = TypeVar("Value")


def all_gather_object(value: Value, group: dist.ProcessGroup | None = None) -> list[Value]:
    """What each rank gives, on all of them; of a process by itself, what it gives."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    given: list = [None] * dist.get_world_size()
    dist.all_gather_object(given, value, group=group)
    return given


def broadcast_object(value: Value, group: dist.ProcessGroup | None = None) -> Value:
    """What rank 0 gives, on every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    given = [value]
    dist.broadcast_object_list(given, group=group)
    return given[0]
