"""When a run has to stop because of numbers that are not finite, and what went wrong first.

The loop calls `check_step` after every optimizer step. DeepSpeed has by then looked at the gradients of all ranks and skipped the step if
they are not finite, so that the weights are still those that the step began with: it can be made again, slowly, and watched.
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
from .objectives import draw, row_numbers

LOWEST_SCALE = (
    1.0  # of the loss, under fp16: below it, gradients would be made smaller than they are
)
MAX_LISTED = 5  # rows or names in a message


class TrainingError(UserError):
    """Training that cannot go on."""


@dataclass(frozen=True)
class Culprit:
    """A clause that says what went wrong first, and another that says what helps."""

    what: str
    remedy: str


# -- after every step -------------------------------------------------------------------------------------------------


def stepped(engine) -> bool:
    """Whether the last optimizer step has moved the weights: a Python bool. Where it has not, averages have nothing to follow."""
    return engine.was_step_applied()


def scale_collapsed(engine) -> bool:
    """Whether fp16's loss scale has fallen so far that the gradients overflow whatever it is. A Python float is looked at, no tensor.

    DeepSpeed itself would end with a bare Exception one overflow later.
    """
    return engine.optimizer.loss_scaler.cur_scale <= LOWEST_SCALE


def check_step(trainer, batches: Sequence[Batch], number: int, loss: Tensor) -> None:
    """After optimizer step `number`, on all ranks: raise TrainingError, with the culprit named, if training does not recover by itself.

    `batches` are the micro-batches that this rank has read for the step, `loss` () its mean loss, still on the device. A step that was made
    costs nothing: only stage 0, where DeepSpeed does not look at gradients, has the loss read here. A step that fp16's loss scale was too
    large for is no fault as long as the loss itself is finite.
    """
    staged = trainer.preset.train.zero_stage > 0
    if staged and stepped(trainer.engine):
        return
    broken = (~torch.isfinite(loss.detach())).float().reshape(1).to(trainer.device)
    dist.all_reduce(broken)
    if broken.item():
        raise _stop("The loss is not finite", trainer, batches, number)
    if not staged:
        return
    if trainer.precision != "fp16":
        raise _stop("The gradients are not finite", trainer, batches, number)
    if scale_collapsed(trainer.engine):
        raise _stop(
            "The gradients overflow in fp16 whatever the loss scale", trainer, batches, number
        )


def _stop(fault: str, trainer, batches: Sequence[Batch], number: int) -> TrainingError:
    culprit = _find(trainer, batches, number)
    return TrainingError(f"{fault} at step {number}: {culprit.what}; {culprit.remedy}.")


# -- the search -------------------------------------------------------------------------------------------------------


def find_culprit(trainer, batch: Batch | Sequence[Batch], number: int) -> str:
    """What went wrong first in step `number`, as the middle of a sentence; the same on all ranks, which call this together.

    `batch`: what this rank has read for the step, whole or in its micro-batches. Weights, optimizer, gradients and random numbers are left
    as they are. Takes about as long as a few steps.
    """
    return _find(trainer, [batch] if isinstance(batch, Batch) else batch, number).what


def _find(trainer, batches: Sequence[Batch], number: int) -> Culprit:
    return (
        _images(batches)
        or _weights(trainer)
        or _network(trainer, batches, number)
        or Culprit(
            "nothing of that is left when the step is made again",
            remedy(trainer.preset.train, trainer.precision),
        )
    )


def remedy(train: TrainConfig, precision: str) -> str:
    """What helps against numbers that grow too large, and has not been done yet."""
    found = ["lower train.learning_rate", "raise train.warmup_steps"]
    found += [] if train.clip_norm else ["set train.clip_norm=1"]
    found += ["set train.precision=bf16"] if precision == "fp16" else []
    return f"{', '.join(found[:-1])} or {found[-1]}"


def _images(batches: Sequence[Batch]) -> Culprit | None:
    """Images, or what they are conditioned on, that came broken."""
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
    return Culprit(
        f"{len(bad)} of the batch's {len(rows)} images are not finite ({_listed('row', bad)} of the corpus)",
        "leave them out",
    )


def _weights(trainer) -> Culprit | None:
    """Weights that are not finite, or no longer so in the network's precision. Each rank looks at its own part of the float32 masters."""
    limit, masters = torch.finfo(DTYPES[trainer.precision]).max, trainer.ema.masters
    mine: dict[str, float] = {}
    for piece in trainer.pieces:
        largest = (
            masters[piece.master]
            .detach()
            .reshape(-1)[piece.offset : piece.offset + piece.count]
            .abs()
            .max()
            .item()
        )
        if not largest <= limit:
            mine[piece.name] = largest
    found: dict[str, float] = {}
    for part in all_gather_object(mine):
        found |= part
    if not found:
        return None
    names = _listed(
        "", [name for name, _ in trainer.engine.module.named_parameters() if name in found]
    )
    helps = (
        f"go on from an earlier checkpoint, and {remedy(trainer.preset.train, trainer.precision)}"
    )
    if all(largest < float("inf") for largest in found.values()):
        return Culprit(
            f"weights of up to {max(found.values()):.2g} are too large for {trainer.precision} ({names})",
            helps,
        )
    # Stage 0 has by now made the step in question as well.
    since = "an earlier step" if trainer.preset.train.zero_stage else "this or an earlier step"
    return Culprit(f"weights are not finite since the update of {since} ({names})", helps)


def _network(trainer, batches: Sequence[Batch], number: int) -> Culprit | None:
    """Make the step again and watch: the network's forward, the loss of each row, then the gradients from the loss downwards."""
    train = trainer.preset.train
    trainer.engine.train()
    for batch, (_, _, weight) in zip(batches, trainer.share.parts(), strict=False):
        devices = [trainer.device] if trainer.device.type == "cuda" else []
        with torch.random.fork_rng(devices), Watch(trainer.engine.module) as watch:
            drawn = draw(trainer.schedule, batch, train.seed, number, train.timestep_power)
            i, noise = (tensor.to(trainer.device) for tensor in drawn)
            # The bare module: what DeepSpeed hangs on the engine's own calls counts them as parts of a step.
            losses = trainer.objective(
                trainer.engine.module, trainer.schedule, batch.to(trainer.device), i, noise
            )["loss"]
            found = (
                _in_forward(trainer, watch)
                or _in_losses(trainer, batch, losses)
                or _in_backward(trainer, watch, losses, weight)
            )
        if found:
            return found
    return None


def _in_forward(trainer, watch: Watch) -> Culprit | None:
    found = _first(watch.forward)
    if found is None:
        return None
    where = f"{found.name} gives {found.kind} in {trainer.precision} (largest input {found.largest:.2g}){found.rank}"
    return Culprit(where, remedy(trainer.preset.train, trainer.precision))


def _in_losses(trainer, batch: Batch, losses: Tensor) -> Culprit | None:
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
    return Culprit(
        f"all that the network gives is finite, and yet its loss is not ({_listed('row', bad)} of the corpus)",
        f"leave them out, or {remedy(trainer.preset.train, trainer.precision)}",
    )


def _in_backward(trainer, watch: Watch, losses: Tensor, weight: float) -> Culprit | None:
    scale = _scale_of_the_step(trainer)
    watch.backward_from(losses.mean() * (weight * scale / trainer.share.calls))
    found = _first(watch.backward)
    if found is None:
        return None
    at = (
        f" in fp16 at loss scale {scale:g}"
        if trainer.precision == "fp16"
        else f" in {trainer.precision}"
    )
    where = f"the gradient that comes back to {found.name} is {found.kind}{at} (largest before it {found.largest:.2g}){found.rank}"
    return Culprit(where, remedy(trainer.preset.train, trainer.precision))


def _scale_of_the_step(trainer) -> float:
    """What the loss was multiplied with: where the step was skipped, DeepSpeed has halved it since (the first time it has not; more does no harm)."""
    if trainer.precision != "fp16":
        return 1.0
    scaler = trainer.engine.optimizer.loss_scaler
    return scaler.cur_scale * (1 if stepped(trainer.engine) else scaler.scale_factor)


# -- watching a network -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Observation:
    """The first tensor that is not finite: how many modules or gradients came before it, whose it is, and the largest number before it."""

    order: int
    name: str
    kind: str
    largest: float
    rank: str = ""


class Watch:
    """Within, a network's calls are looked at module by module, and with `backward_from` its gradients. Waits for the device all the time.

    `forward`: the first module whose output is not finite though all that went into it is. `backward`: the first gradient that is not.
    """

    def __init__(self, network: nn.Module):
        self._network = network
        self.forward: Observation | None = None
        self.backward: Observation | None = None
        self._calls, self._gradients, self._largest_gradient = 0, 0, 0.0
        self._handles: list = []

    def __enter__(self) -> Watch:
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
        """Look at the gradients of all modules' outputs and of all parameters. None is kept: not in the parameters either."""
        self.__exit__()  # activation checkpointing calls the modules again
        parameters = {
            name: parameter
            for name, parameter in self._network.named_parameters()
            if parameter.requires_grad
        }
        self._handles += [
            parameter.register_hook(self._on_end(name)) for name, parameter in parameters.items()
        ]
        torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)

    def _on_call(self, name: str) -> Callable:
        def look(module, arguments, keywords, output):
            self._calls += 1
            if self.forward is None:
                kind, _ = _look([output])
                went_in, largest = _look([arguments, keywords])
                if kind and not went_in:
                    self.forward = Observation(self._calls, name, kind, largest)
            for tensor in _tensors(output):
                if tensor.requires_grad:
                    tensor.register_hook(self._on_gradient(name))

        return look

    def _on_gradient(self, name: str) -> Callable:
        def look(gradient):
            self._gradients += 1
            if self.backward is None:
                kind, largest = _look([gradient])
                if kind:
                    self.backward = Observation(self._gradients, name, kind, self._largest_gradient)
                self._largest_gradient = max(self._largest_gradient, largest)

        return look

    def _on_end(self, name: str) -> Callable:
        look = self._on_gradient(name)

        def end(gradient):
            look(gradient)
            return gradient.new_zeros(()).expand_as(
                gradient
            )  # of the right shape, in the memory of one number

        return end


def _look(values: Sequence) -> tuple[str | None, float]:
    """Whether any of the float tensors holds an inf or a NaN, the inf being named where there are both; and their largest finite magnitude."""
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
    """The float tensors in nested tuples, lists, mappings and dataclasses."""
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


# -- all ranks --------------------------------------------------------------------------------------------------------


def _first(seen: Observation | None) -> Observation | None:
    """The earliest of what the ranks have seen, all of which make the same calls. Which rank it was may point at a faulty device."""
    all_seen = all_gather_object(seen)
    found = [(entry.order, rank) for rank, entry in enumerate(all_seen) if entry is not None]
    if not found:
        return None
    rank = min(found)[1]
    entry = all_seen[rank]
    return Observation(
        entry.order,
        entry.name,
        entry.kind,
        entry.largest,
        f" on rank {rank} of {len(all_seen)}" if len(all_seen) > 1 else "",
    )


def _listed(what: str, items: Sequence) -> str:
    """A few of them by name: "rows 3, 4 and 7 more"."""
    shown = ", ".join(str(item) for item in items[:MAX_LISTED]) + (
        f" and {len(items) - MAX_LISTED} more" if len(items) > MAX_LISTED else ""
    )
    return f"{what}{'s' if len(items) > 1 else ''} {shown}" if what else shown
