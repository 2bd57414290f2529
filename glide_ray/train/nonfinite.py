"""Detection of non-finite losses and gradients, and the search for their origin.

The trainer calls `check_step` after every optimizer step. By then DeepSpeed has checked the
gradients of all ranks and skipped the step if they are not finite, so the weights are unchanged:
the step can be repeated with hooks on every module to find the first non-finite tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..config.training import TrainConfig
from ..errors import UserError
from ..precision import DTYPES
from ..tensors import Batch
from .collectives import all_gather_object
from .deepspeed_engine import scale_collapsed, scale_of_last_step, stepped
from .objectives import draw, row_numbers

MAX_LISTED = 5  # row numbers or parameter names in a message


class TrainingError(UserError):
    """Training that cannot continue."""


@dataclass(frozen=True)
class Cause:
    """Two clauses of the error message: the origin (`what`) and its `remedy`."""

    what: str
    remedy: str


# -- after every step ------------------------------------------------------------------------------


def check_step(trainer, batches: Sequence[Batch], number: int, loss: Tensor) -> None:
    """Raise TrainingError, naming the cause, if training cannot recover after step `number`.

    All ranks call this together. `batches`: micro-batches of this rank in the step; `loss`: scalar
    mean loss, still on the device. Costs nothing after a successful step, except under ZeRO stage
    0, where DeepSpeed does not check gradients: there the loss is read from the device. A step
    skipped because fp16's loss scale was too large is no fault if the loss itself is finite.
    """
    zero = trainer.preset.train.zero_stage > 0
    if zero and stepped(trainer.engine):
        return
    nonfinite = (~torch.isfinite(loss.detach())).float().reshape(1).to(trainer.device)
    dist.all_reduce(nonfinite)
    if nonfinite.item():
        raise _training_error("The loss is not finite", trainer, batches, number)
    if not zero:
        return
    if trainer.precision != "fp16":
        raise _training_error("The gradients are not finite", trainer, batches, number)
    if scale_collapsed(trainer.engine):
        raise _training_error(
            "The gradients overflow in fp16 at every loss scale", trainer, batches, number
        )


def _training_error(fault: str, trainer, batches: Sequence[Batch], number: int) -> TrainingError:
    cause = _find_cause(trainer, batches, number)
    return TrainingError(f"{fault} at step {number}: {cause.what}; {cause.remedy}.")


# -- the search ------------------------------------------------------------------------------------


def locate_nonfinite(trainer, batch: Batch | Sequence[Batch], number: int) -> str:
    """Name the origin of non-finite values in step `number`: a clause, the same on all ranks.

    All ranks call this together. `batch`: this rank's rows of the step, whole or in micro-batches.
    Does not change weights, optimizer, gradients or random state. Takes as long as a few steps.
    """
    return _find_cause(trainer, [batch] if isinstance(batch, Batch) else batch, number).what


def _find_cause(trainer, batches: Sequence[Batch], number: int) -> Cause:
    return (
        _check_images(batches)
        or _check_weights(trainer)
        or _check_network(trainer, batches, number)
        or Cause(
            "all values are finite when the step is repeated",
            remedy(trainer.preset.train, trainer.precision),
        )
    )


def remedy(train: TrainConfig, precision: str) -> str:
    """Settings that help against overflow, without those already in use."""
    settings = ["lower train.learning_rate", "raise train.warmup_steps"]
    settings += [] if train.clip_norm else ["set train.clip_norm=1"]
    settings += ["set train.precision=bf16"] if precision == "fp16" else []
    return f"{', '.join(settings[:-1])} or {settings[-1]}"


def _check_images(batches: Sequence[Batch]) -> Cause | None:
    """Non-finite images or conditioning in the batch, as read from the corpus."""
    rows, bad = [], []
    for batch in batches:
        finite = torch.ones(len(batch.image), dtype=torch.bool)
        for tensor in _tensors(batch):
            finite &= torch.isfinite(tensor).flatten(1).all(1).cpu()
        rows += row_numbers(batch).tolist()
        bad += row_numbers(batch)[~finite].tolist()
    rows, bad = (
        sorted({row for part in parts for row in part})
        for parts in zip(*all_gather_object((rows, bad)), strict=True)
    )
    if not bad:
        return None
    return Cause(
        f"{len(bad)} of the batch's {len(rows)} images are not finite "
        f"({_list_text('row', bad)} of the corpus)",
        "leave them out",
    )


def _check_weights(trainer) -> Cause | None:
    """Weights that are not finite, or overflow in the network's precision.

    Each rank checks its own shard of the float32 masters.
    """
    limit, masters = torch.finfo(DTYPES[trainer.precision]).max, trainer.ema.masters
    bad: dict[str, float] = {}
    for param_slice in trainer.param_slices:
        largest = (
            masters[param_slice.master]
            .detach()
            .reshape(-1)[param_slice.offset : param_slice.offset + param_slice.count]
            .abs()
            .max()
            .item()
        )
        if not largest <= limit:
            bad[param_slice.name] = largest
    found: dict[str, float] = {}
    for rank_bad in all_gather_object(bad):
        found |= rank_bad
    if not found:
        return None
    names = _list_text(
        "", [name for name, _ in trainer.engine.module.named_parameters() if name in found]
    )
    advice = (
        f"resume from an earlier checkpoint, and {remedy(trainer.preset.train, trainer.precision)}"
    )
    if all(largest < float("inf") for largest in found.values()):
        return Cause(
            f"weights of up to {max(found.values()):.2g} are too large "
            f"for {trainer.precision} ({names})",
            advice,
        )
    # Stage 0 does not skip the faulty step, so the weights already include its update.
    since = "an earlier step" if trainer.preset.train.zero_stage else "this or an earlier step"
    return Cause(f"weights are not finite since the update of {since} ({names})", advice)


def _check_network(trainer, batches: Sequence[Batch], number: int) -> Cause | None:
    """Repeat the step and check the forward pass, the loss of each row, then the gradients."""
    train = trainer.preset.train
    trainer.engine.train()
    for batch, (_, _, weight) in zip(batches, trainer.batch_split.row_ranges(), strict=False):
        devices = [trainer.device] if trainer.device.type == "cuda" else []
        with torch.random.fork_rng(devices), NonfiniteHooks(trainer.engine.module) as hooks:
            drawn = draw(trainer.schedule, batch, train.seed, number, train.timestep_power)
            i, noise = (tensor.to(trainer.device) for tensor in drawn)
            # The bare module: the engine's hooks would count the call as part of a step.
            losses = trainer.objective(
                trainer.engine.module, trainer.schedule, batch.to(trainer.device), i, noise
            )["loss"]
            found = (
                _check_forward(trainer, hooks)
                or _check_losses(trainer, batch, losses)
                or _check_backward(trainer, hooks, losses, weight)
            )
        if found:
            return found
    return None


def _check_forward(trainer, hooks: NonfiniteHooks) -> Cause | None:
    found = _earliest_of_ranks(hooks.forward)
    if found is None:
        return None
    where = (
        f"{found.name} gives {found.kind} in {trainer.precision} (largest input "
        f"{found.largest:.2g}){found.rank}"
    )
    return Cause(where, remedy(trainer.preset.train, trainer.precision))


def _check_losses(trainer, batch: Batch, losses: Tensor) -> Cause | None:
    bad = sorted(
        {
            row
            for part in all_gather_object(
                row_numbers(batch)[~torch.isfinite(losses.detach()).cpu()].tolist()
            )
            for row in part
        }
    )
    if not bad:
        return None
    return Cause(
        f"every output of the network is finite, but the loss is not "
        f"({_list_text('row', bad)} of the corpus)",
        f"leave them out, or {remedy(trainer.preset.train, trainer.precision)}",
    )


def _check_backward(trainer, hooks: NonfiniteHooks, losses: Tensor, weight: float) -> Cause | None:
    # After a first overflow this is twice the true scale, which does not change the result.
    scale = scale_of_last_step(trainer.engine) if trainer.precision == "fp16" else 1.0
    hooks.backward_from(losses.mean() * (weight * scale / trainer.batch_split.calls))
    found = _earliest_of_ranks(hooks.backward)
    if found is None:
        return None
    at = (
        f" in fp16 at loss scale {scale:g}"
        if trainer.precision == "fp16"
        else f" in {trainer.precision}"
    )
    where = (
        f"the gradient that arrives at {found.name} is {found.kind}{at} "
        f"(largest before it {found.largest:.2g}){found.rank}"
    )
    return Cause(where, remedy(trainer.preset.train, trainer.precision))


# -- hooks -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Observation:
    """The first non-finite tensor.

    `order`: its number among the module calls or gradients of the pass; `name`: its module or
    parameter; `kind`: "inf" or "nan"; `largest`: largest finite magnitude in the module's inputs,
    or among the gradients before it; `rank`: clause naming the rank, for the message.
    """

    order: int
    name: str
    kind: str
    largest: float
    rank: str = ""


class NonfiniteHooks:
    """Context that checks all module outputs of a network and, in `backward_from`, its gradients.

    `forward`: the first module with finite inputs and a non-finite output. `backward`: the first
    non-finite gradient. Slow: synchronises with the device at every check.
    """

    def __init__(self, network: nn.Module):
        self._network = network
        self.forward: Observation | None = None
        self.backward: Observation | None = None
        self._calls, self._gradients, self._largest_gradient = 0, 0, 0.0
        self._handles: list = []

    def __enter__(self) -> NonfiniteHooks:
        for name, module in self._network.named_modules():
            self._handles.append(
                module.register_forward_hook(self._on_call(name or "the network"), with_kwargs=True)
            )
        return self

    def __exit__(self, *_) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def backward_from(self, loss: Tensor) -> None:
        """Check the gradients of all module outputs and parameters; no gradient is stored."""
        self.__exit__()  # no forward hooks: activation checkpointing calls the modules again
        parameters = {
            name: parameter
            for name, parameter in self._network.named_parameters()
            if parameter.requires_grad
        }
        self._handles += [
            parameter.register_hook(self._on_parameter(name))
            for name, parameter in parameters.items()
        ]
        torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)

    def _on_call(self, name: str) -> Callable:
        def observe(module, arguments, keywords, output):
            self._calls += 1
            if self.forward is None:
                kind, _ = _inspect([output])
                input_kind, largest = _inspect([arguments, keywords])
                if kind and not input_kind:
                    self.forward = Observation(self._calls, name, kind, largest)
            for tensor in _tensors(output):
                if tensor.requires_grad:
                    tensor.register_hook(self._on_gradient(name))

        return observe

    def _on_gradient(self, name: str) -> Callable:
        def observe(gradient):
            self._gradients += 1
            if self.backward is None:
                kind, largest = _inspect([gradient])
                if kind:
                    self.backward = Observation(self._gradients, name, kind, self._largest_gradient)
                self._largest_gradient = max(self._largest_gradient, largest)

        return observe

    def _on_parameter(self, name: str) -> Callable:
        observe = self._on_gradient(name)

        def observe_and_drop(gradient):
            observe(gradient)
            # The right shape in the memory of one element, so that no gradient is stored.
            return gradient.new_zeros(()).expand_as(gradient)

        return observe_and_drop


def _inspect(values: Sequence) -> tuple[str | None, float]:
    """("inf", "nan" or None, largest finite magnitude) of the float tensors in `values`.

    "inf" if they contain both inf and NaN.
    """
    kind, largest = None, 0.0
    for tensor in (
        tensor.detach() for value in values for tensor in _tensors(value) if tensor.numel()
    ):
        finite = torch.isfinite(tensor)
        largest = max(largest, torch.where(finite, tensor, 0).abs().max().item())
        if not finite.all():
            kind = "inf" if kind == "inf" or torch.isinf(tensor).any() else "nan"
    return kind, largest


def _tensors(value) -> Iterator[Tensor]:
    """Yield the float tensors in nested tuples, lists, dicts and dataclasses."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif is_dataclass(value):
        yield from _tensors(tuple(getattr(value, field.name) for field in fields(value)))


# -- merging over ranks ----------------------------------------------------------------------------


def _earliest_of_ranks(observation: Observation | None) -> Observation | None:
    """The earliest observation of all ranks, comparable because all make the same calls.

    Names the rank, which may point to a faulty device.
    """
    observations = all_gather_object(observation)
    found = [(rank, entry) for rank, entry in enumerate(observations) if entry is not None]
    if not found:
        return None
    rank, entry = min(found, key=lambda one: (one[1].order, one[0]))
    return Observation(
        entry.order,
        entry.name,
        entry.kind,
        entry.largest,
        f" on rank {rank} of {len(observations)}" if len(observations) > 1 else "",
    )


def _list_text(noun: str, items: Sequence) -> str:
    """The first MAX_LISTED items as text, such as "rows 3, 4, 5, 6, 7 and 2 more"."""
    shown = ", ".join(str(item) for item in items[:MAX_LISTED]) + (
        f" and {len(items) - MAX_LISTED} more" if len(items) > MAX_LISTED else ""
    )
    return f"{noun}{'s' if len(items) > 1 else ''} {shown}" if noun else shown
