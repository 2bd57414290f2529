"""Trainer for a single process without DeepSpeed and Ray: on a laptop, or on one GPU.

The network computes in the chosen precision; the optimizer steps float32 masters. Checkpoints have
the format of `partition.py`, so that a run can resume under Ray Train, and vice versa.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..config.training import Preset
from ..diffusion.schedule import make_schedule
from ..models.weights import build_model
from ..precision import DTYPES, single_precision
from ..tensors import Batch, to_device_async
from .batch_split import BatchSplit
from .checkpoint import TrainingPosition, read_base, read_progress, write_progress
from .ema import Ema
from .nonfinite import TrainingError, remedy
from .objectives import by_quartile, draw, held_out_sums, images_in, mix, objective_of
from .optimizer import FACTOR, learning_rate, parameter_groups, speed_up
from .partition import (
    AVERAGE,
    FIRST,
    SECOND,
    WEIGHTS,
    ParamSlice,
    State,
    load_parts,
    part_path,
    save_part,
)
from .step_clock import DATA, FORWARD, StepClock
from .steps import Metrics, norm_figures
from .trained_part import check_base, prepare, starting_state, trained_parameters

SKIPPED = 20  # consecutive steps with non-finite gradients before the run is stopped


class SingleTrainer:
    """Trainer that holds the whole model. Raises ConfigError, WeightsError.

    `device`: by default the GPU if there is one, else the CPU.
    """

    world = 1

    def __init__(self, preset: Preset, device: torch.device | None = None):
        self.preset, train = preset, preset.train
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.precision = single_precision(train.precision, self.device.type)
        self.batch_split = BatchSplit(train.batch, 1, 0, train.micro_batch or train.batch)
        self.schedule = make_schedule(
            preset.model.diffusion.schedule, preset.model.diffusion.steps
        ).to(self.device)
        self.objective = objective_of(preset)
        # The same initial weights as on every rank of a distributed run.
        torch.manual_seed(train.seed)
        model = build_model(preset.model).to(self.device)
        model.activation_checkpointing = train.activation_checkpointing
        speed_up(model, train, self.device)
        self.base = prepare(model, preset)
        trained = trained_parameters(model)
        self.names, self.parameters = list(trained), list(trained.values())
        dtype = DTYPES[self.precision]
        masters: list[Tensor] = [
            parameter.detach().float().clone().requires_grad_() for parameter in self.parameters
        ]
        self.network = model.to(dtype)
        # A float32 network's parameters are its masters.
        self.masters: list[Tensor] = list(self.parameters) if dtype == torch.float32 else masters
        self.optimizer = self._optimizer(model)
        self.ema = Ema(self.masters, train.ema_rates, train.ema_lengths)
        self.progress = TrainingPosition()
        self.clock = StepClock(self.device)
        self._skipped = 0

    def _optimizer(self, model: torch.nn.Module) -> torch.optim.AdamW:
        """AdamW over the masters, in the parameter groups of their parameters."""
        master_of = {
            id(parameter): master
            for parameter, master in zip(self.parameters, self.masters, strict=True)
        }
        groups = [
            {**group, "params": [master_of[id(parameter)] for parameter in group["params"]]}
            for group in parameter_groups(model, self.preset.train)
        ]
        return torch.optim.AdamW(
            groups,
            lr=self.preset.train.learning_rate,
            weight_decay=self.preset.train.weight_decay,
            fused=True,
        )

    # -- steps -------------------------------------------------------------------------------------

    def step(self, batches: Iterator[Batch], number: int) -> dict[str, Tensor]:
        """Make optimizer step `number`, counted from 1.

        Returns the objective's mean metrics and the sums of `by_quartile`, as scalars on the
        device. Raises TrainingError after SKIPPED consecutive steps with non-finite gradients.
        """
        train = self.preset.train
        # Dropout seed, the same if the step is repeated.
        torch.manual_seed(mix(train.seed, number, -1))
        self.network.train()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(train, number) * group.get(FACTOR, 1.0)
        sums: dict[str, Tensor] = {}
        for _, _, weight in self.batch_split.row_ranges():
            with self.clock.host(DATA):
                batch = next(batches)
            i, noise = (
                to_device_async(drawn, self.device)
                for drawn in draw(self.schedule, batch, train.seed, number, train.timestep_power)
            )
            on_device = batch.map(lambda tensor: to_device_async(tensor, self.device))
            with self.clock.device(FORWARD):
                losses = self.objective(self.network, self.schedule, on_device, i, noise)
            (losses["loss"].mean() * (weight / self.batch_split.calls)).backward()
            figures = {
                name: values.detach().mean() * (weight / self.batch_split.calls)
                for name, values in losses.items()
            }
            if "mse" in losses:
                figures |= by_quartile(losses["mse"].detach(), i, len(self.schedule))
            for name, value in figures.items():
                sums[name] = sums.get(name, 0) + value
        norm, stepped = self._apply(number)
        if stepped:
            self.ema.update(number)
        return sums | norm_figures(norm)

    def _apply(self, number: int) -> tuple[Tensor, bool]:
        """Step the masters and clear the gradients; (norm of the gradients, whether it stepped).

        Skips the step if the gradients are not finite.
        """
        if self.masters[0] is not self.parameters[0]:
            for master, parameter in zip(self.masters, self.parameters, strict=True):
                master.grad = None if parameter.grad is None else parameter.grad.float()
                parameter.grad = None
        norm = torch.nn.utils.get_total_norm(
            [master.grad for master in self.masters if master.grad is not None]
        )
        finite = bool(torch.isfinite(norm))
        self._skipped = 0 if finite else self._skipped + 1
        if self._skipped == SKIPPED:
            raise TrainingError(
                f"The gradients of {SKIPPED} steps in a row, the last number {number}, "
                f"are not finite; "
                f"{remedy(self.preset.train, self.precision)}."
            )
        if finite:
            if self.preset.train.clip_norm:
                torch.nn.utils.clip_grads_with_norm_(
                    self.masters, self.preset.train.clip_norm, norm
                )
            self.optimizer.step()
            self.refresh()
        self.optimizer.zero_grad(set_to_none=True)
        return norm, finite

    @torch.no_grad()
    def refresh(self) -> None:
        """Update the network's weights from the masters."""
        parameters: list[Tensor] = list(self.parameters)
        if self.masters[0] is not parameters[0]:
            torch._foreach_copy_(parameters, self.masters)

    def held_out(self, batches: Sequence[Batch]) -> Metrics:
        """The objective's metrics on held-out images."""
        self.network.eval()
        images = images_in(batches)
        sums = held_out_sums(
            self.objective,
            self.network,
            self.schedule,
            [batch.to(self.device) for batch in batches],
            self.preset.train.seed,
            images,
        )
        return {
            "held_out" if name == "loss" else f"held_out_{name}": float(value) / images
            for name, value in sums.items()
        }

    def scale(self) -> dict[str, float]:
        """Empty: this trainer has no fp16, so no loss scale."""
        return {}

    def gathered(self, values: Mapping[str, float]) -> list[Mapping[str, float]]:
        """The values of the only rank."""
        return [values]

    def summed(self, values: dict[str, Tensor]) -> dict[str, float]:
        """Convert scalars to Python floats, in one transfer to the host."""
        return dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True))

    # -- state -------------------------------------------------------------------------------------

    def param_slices(self) -> list[ParamSlice]:
        """One slice per parameter, each covering the whole parameter."""
        return [
            ParamSlice(name, tuple(master.shape), 0, master.numel(), number, 0)
            for number, (name, master) in enumerate(zip(self.names, self.masters, strict=True))
        ]

    def state(self) -> State:
        """Training state: weights, Adam's moments and EMA."""
        for master in self.masters:
            kept = self.optimizer.state[master]
            if FIRST not in kept:
                # torch's fused AdamW requires the step count on the parameter's device.
                kept.update(
                    {
                        "step": torch.zeros((), device=master.device),
                        FIRST: torch.zeros_like(master),
                        SECOND: torch.zeros_like(master),
                    }
                )
        moments = {
            kind: [self.optimizer.state[master][kind] for master in self.masters]
            for kind in (FIRST, SECOND)
        }
        return {
            WEIGHTS: [master.detach() for master in self.masters],
            **moments,
            **{f"{AVERAGE}/{name}": average for name, average in self.ema.averages.items()},
        }

    def start(self) -> None:
        """Load the weights to fine-tune, if any. Raises WeightsError if their shapes differ."""
        if not self.preset.train.start_from or self.base:  # `prepare` has loaded them
            return
        state = starting_state(self.preset, self.network)
        with torch.no_grad():
            for name, master in zip(self.names, self.masters, strict=True):
                master.copy_(state[name])
        self.refresh()
        self.ema.restart()

    def save(self, folder: Path) -> None:
        """Write the files of a checkpoint."""
        state = self.state()
        save_part(part_path(folder, 0), self.param_slices(), state)
        steps = float(self.optimizer.state[self.masters[0]]["step"])
        optimizer = {"adam_steps": steps, "loss_scale": {}}
        write_progress(folder, self.preset, self.progress, optimizer, self.base)

    def load(self, folder: Path) -> None:
        """Resume from a checkpoint written with any number of workers. Raises CheckpointError."""
        self.progress, optimizer = read_progress(folder, self.preset)
        check_base(self.base, read_base(folder), self.preset)
        load_parts(folder, self.param_slices(), self.state())
        for master in self.masters:
            self.optimizer.state[master]["step"].fill_(optimizer["adam_steps"])
        self.refresh()
