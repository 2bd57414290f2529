"""Trainer of one rank under DeepSpeed ZeRO: engine, EMA, held-out loss and checkpoint state.

`steps.py` has the training loop.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from ..config.training import Preset
from ..diffusion.schedule import make_schedule
from ..models.layers import shapes_only
from ..models.weights import build_model
from ..precision import training_precision
from ..tensors import Batch, to_device_async
from . import deepspeed_engine as internals
from . import partition
from .batch_split import BatchSplit
from .checkpoint import TrainingPosition, read_base, read_progress, write_progress
from .collectives import all_gather_object, broadcast_object
from .ema import Ema
from .hardware import USABLE_GPU_MEMORY, cpu_budget
from .memory import choose_micro_batch
from .nonfinite import TrainingError, check_step
from .objectives import by_quartile, draw, held_out_sums, images_in, mix, objective_of
from .optimizer import FACTOR, deepspeed_config, learning_rate, parameter_groups, speed_up
from .step_clock import DATA, FORWARD, StepClock
from .steps import Metrics, norm_figures
from .trained_part import check_base, prepare, starting_state, trained_parameters


class Trainer:
    """One rank's DeepSpeed engine, EMA and noise schedule. Raises TrainingError, ConfigError.

    `draws_weights`: whether to initialise the weights, which takes half a minute for the largest
    models; not necessary if `load` or `start` replaces them.
    """

    def __init__(self, preset: Preset, draws_weights: bool = True):
        internals.join_process_group()
        self.preset, train = preset, preset.train
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        if not (train.min_workers or train.workers) <= self.world <= train.workers:
            raise TrainingError(
                f"train.workers is {train.workers}, but {self.world} processes have been started."
            )
        self.device = torch.device(deepspeed.get_accelerator().current_device_name())
        # Broadcast, because "auto" may be decided by a measurement that differs between ranks.
        self.precision = broadcast_object(training_precision(train.precision, self.device.type))
        self.batch_split = BatchSplit(train.batch, self.world, self.rank, self._micro_batch())
        self.schedule = make_schedule(
            preset.model.diffusion.schedule, preset.model.diffusion.steps
        ).to(self.device)
        self.objective = objective_of(preset)
        torch.manual_seed(train.seed)  # every rank draws the same initial weights
        if draws_weights and not train.start_from:
            model = build_model(preset.model)
        else:
            with shapes_only():
                model = build_model(preset.model)
            model = model.to_empty(device="cpu")
        model.activation_checkpointing = train.activation_checkpointing
        speed_up(model, train, self.device)
        self.base = prepare(model, preset)
        self._first = _copies(model) if self.base else {}
        self.engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=parameter_groups(model, train),
            config=deepspeed_config(train, self.precision, self.batch_split),
        )
        internals.check_overflow_once(self.engine)
        self.param_slices = internals.param_slices(self.engine)
        self.ema = Ema(internals.masters(self.engine), train.ema_rates, train.ema_lengths)
        self.progress = TrainingPosition()
        self.clock = StepClock(self.device)

    def _micro_batch(self) -> int:
        """Micro-batch size: the largest that fits the worker with the least memory."""
        cuda = self.device.type == "cuda"
        budget = (
            torch.cuda.mem_get_info(self.device)[1] * USABLE_GPU_MEMORY
            if cuda
            else cpu_budget(int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        )
        return min(
            all_gather_object(
                choose_micro_batch(
                    self.preset, self.world, self.precision, budget, self.device.type
                )
            )
        )

    # -- steps -------------------------------------------------------------------------------------

    def step(self, batches: Iterator[Batch], number: int) -> dict[str, torch.Tensor]:
        """Make optimizer step `number`, counted from 1.

        Returns the objective's metrics as scalars on the device, whose mean over ranks is the mean
        over the batch, and this rank's sums of `by_quartile`. Raises TrainingError if the loss or
        a gradient is not finite and training cannot recover by itself.
        """
        # Dropout seed: different on each rank, and the same if the step is repeated. Negative,
        # because `draw` seeds images with their row numbers from 0.
        train = self.preset.train
        torch.manual_seed(mix(train.seed, number, -1 - self.rank))
        self.engine.train()
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate(train, number) * group.get(FACTOR, 1.0)
        sums: dict[str, torch.Tensor] = {}
        read = []
        for _, _, weight in self.batch_split.row_ranges():
            with self.clock.host(DATA):
                batch = next(batches)
            read.append(batch)
            i, noise = (
                to_device_async(drawn, self.device)
                for drawn in draw(self.schedule, batch, train.seed, number, train.timestep_power)
            )
            on_device = batch.map(lambda tensor: to_device_async(tensor, self.device))
            with self.clock.device(FORWARD):
                losses = self.objective(self.engine, self.schedule, on_device, i, noise)
            self.engine.backward(losses["loss"].mean() * weight)
            self.engine.step()
            figures = {
                name: values.detach().mean() * (weight / self.batch_split.calls)
                for name, values in losses.items()
            }
            if weight and "mse" in losses:
                figures |= by_quartile(losses["mse"].detach(), i, len(self.schedule))
            for name, value in figures.items():
                sums[name] = sums.get(name, 0) + value
        check_step(self, read, number, sums["loss"])
        if internals.stepped(self.engine):  # fp16 skips a step whose gradients overflowed
            self.ema.update(number)
        if (norm := internals.gradient_norm(self.engine)) is not None:
            sums |= norm_figures(norm.to(self.device))
        return sums

    def held_out(self, batches: Sequence[Batch]) -> Metrics:
        """The objective's metrics on the held-out images of all ranks."""
        self.engine.eval()
        images = sum(all_gather_object(images_in(batches)))
        sums = self.summed(
            held_out_sums(
                self.objective,
                self.engine,
                self.schedule,
                [batch.to(self.device) for batch in batches],
                self.preset.train.seed,
                images,
            )
        )
        return {
            "held_out" if name == "loss" else f"held_out_{name}": value / images
            for name, value in sums.items()
        }

    def scale(self) -> dict[str, float]:
        """The loss scale in fp16; empty in other precisions."""
        return {"loss_scale": internals.loss_scale(self.engine)} if self.precision == "fp16" else {}

    def gathered(self, values: Mapping[str, float]) -> list[Mapping[str, float]]:
        """The values of all ranks."""
        return all_gather_object(values)

    def summed(self, values: dict[str, torch.Tensor]) -> dict[str, float]:
        """Sum scalars over all ranks, in one all-reduce and one transfer to the host."""
        stacked = torch.stack(list(values.values())).to(self.device)
        dist.all_reduce(stacked)
        return dict(zip(values, stacked.tolist(), strict=True))

    # -- state -------------------------------------------------------------------------------------

    def state(self) -> partition.State:
        """This rank's shard of the training state: weights, Adam's moments and EMA."""
        return {
            partition.WEIGHTS: self.ema.masters,
            **internals.moments(self.engine),
            **{
                f"{partition.AVERAGE}/{name}": average
                for name, average in self.ema.averages.items()
            },
        }

    def start(self) -> None:
        """Load the weights to fine-tune, if any. Raises WeightsError if their shapes differ.

        Writes them to the float32 masters, so that they are exact: DeepSpeed has made the masters
        from the 16-bit network.
        """
        if not self.preset.train.start_from:
            return
        state = self._first or starting_state(
            self.preset, self.engine.module, internals.full_shapes(self.engine)
        )
        self._first = {}
        internals.set_masters(self.engine, self.param_slices, state)
        self.ema.restart()

    def save(self, folder: Path) -> None:
        """Write this rank's shard of a checkpoint; rank 0 also writes config and progress."""
        # Under stage 0 every rank holds the full state, and rank 0 alone writes it.
        slices = self.param_slices if self.preset.train.zero_stage or self.rank == 0 else []
        partition.save_part(partition.part_path(folder, self.rank), slices, self.state())
        if self.rank == 0:
            state = self._optimizer_state()
            write_progress(folder, self.preset, self.progress, state, self.base)

    def load(self, folder: Path) -> None:
        """Resume from a checkpoint written with any number of workers and any ZeRO stage.

        Raises CheckpointError.
        """
        self.progress, optimizer = read_progress(folder, self.preset)
        check_base(self.base, read_base(folder), self.preset)
        partition.load_parts(folder, self.param_slices, self.state())
        internals.refresh(self.engine)
        internals.set_adam_steps(self.engine, optimizer["adam_steps"])
        if self.precision == "fp16":
            internals.set_scaler_state(self.engine, optimizer["loss_scale"])

    def _optimizer_state(self) -> dict[str, Any]:
        return {
            "adam_steps": internals.adam_steps(self.engine),
            "loss_scale": internals.scaler_state(self.engine) if self.precision == "fp16" else {},
        }


def _copies(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What the run trains, in float32, before DeepSpeed rounds it to the network's precision."""
    return {name: one.detach().clone() for name, one in trained_parameters(model).items()}
