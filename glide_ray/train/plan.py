"""What a run needs before it is started: memory by part, the largest micro-batch, time and price (`glide plan`).

Activations come from following a pass on the meta device (`activations.py`). The state that ZeRO keeps, and what it needs for a
moment, is arithmetic: of DeepSpeed 0.19.8's `zero/stage_1_and_2.py` and `zero/stage3.py`, of torch's AdamW, and of `ema.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from ..config.models import AnyModelConfig, ClipModelConfig
from ..config.overrides import override
from ..config.training import Preset
from ..errors import ConfigError
from ..models.cost import operations
from ..precision import BYTES
from .activations import Moment, meta_model, training_pass
from .batch_split import BatchSplit, accumulation
from .hardware import GIGA, HOST_ADAM, PCIE, TERA, Machine
from .optimizer import deepspeed_config, training_precision

BUCKET, LIVE, SUBGROUP = (
    5 * 10**8,
    10**9,
    10**9,
)  # elements: DeepSpeed's reduce_bucket_size, stage3_max_live_parameters, sub_group_size


@dataclass(frozen=True)
class Memory:
    """Bytes of one worker, by part, at the moment when it holds most. `gradients` and the bucket in which they are reduced; `averages` are the
    EMA's; `activations` are kept for the backward pass; `workspace` is all that lives for a moment only."""

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    averages: int = 0
    activations: int = 0
    workspace: int = 0

    @property
    def total(self) -> int:
        return (
            self.parameters
            + self.gradients
            + self.optimizer
            + self.averages
            + self.activations
            + self.workspace
        )


# -- memory -----------------------------------------------------------------------------------------------------------


def memory(
    preset: Preset, world: int, micro_batch: int, precision: str, device: str = "cuda"
) -> Memory:
    """What each of `world` workers needs on its device, for network calls of `micro_batch` images. `precision` resolved: fp32, bf16 or fp16.

    Raises ConfigError for settings that DeepSpeed does not take.
    """
    state = _State.of(preset, world, micro_batch, precision, device)
    moments = training_pass(preset, precision, device)
    return max(
        (*state.in_pass(moments, micro_batch), *state.afterwards()), key=lambda moment: moment.total
    )


@dataclass(frozen=True)
class _State:
    """What ZeRO keeps on a worker's device. Counts are of elements: `own` is the worker's part of `all`, `largest` one parameter's."""

    all: int
    own: int
    largest: int
    world: int
    stage: int
    width: int  # bytes of an element of the network
    bucket: int
    fused: bool  # AdamW in one pass, which needs no room
    accumulates: bool  # over several calls a step
    on_cpu: bool
    offload: bool
    gathered: int  # width of CLIP's embeddings, which are exchanged
    fixed: Memory  # parameters, optimizer and averages: there all the time

    @staticmethod
    def of(preset: Preset, world: int, micro_batch: int, precision: str, device: str) -> _State:
        train, width, on_cpu = preset.train, BYTES[precision], device == "cpu"
        config = deepspeed_config(train, precision, BatchSplit(train.batch, world, 0, micro_batch))
        sizes, stage = _sizes(preset.model), train.zero_stage
        whole, largest = sum(sizes), max(sizes)
        own = -(-whole // world) if stage else whole
        accumulates = accumulation(train.batch, world, micro_batch) > 1
        parameters = width * (
            whole if stage < 3 else own + (min(whole, LIVE) if world > 1 else 0)
        )  # stage 3: those gathered just now
        optimizer, averages = (
            (12 if stage else 8) * own,
            4 * own * len(train.ema_rates),
        )  # stage 0 steps the network's own weights
        if (
            train.offload_optimizer and on_cpu
        ):  # the same memory, and the buffers of what would be copies: float32 gradients, and
            optimizer += (
                4 * own
            )  # (stages 1 and 2) new weights, one parameter's gradient twice, and sums over calls
            optimizer += width * (own * (1 + accumulates) + 2 * largest) if stage < 3 else 0
        elif train.offload_optimizer:
            optimizer, averages = (width * largest if stage < 3 else 0), 0
        gathered = (
            preset.model.clip.embedding
            if isinstance(preset.model, ClipModelConfig) and world > 1
            else 0
        )
        return _State(
            whole,
            own,
            largest,
            world,
            stage,
            width,
            int(config["zero_optimization"].get("reduce_bucket_size", BUCKET)),
            config["optimizer"]["params"].get("fused", False),
            accumulates,
            on_cpu,
            train.offload_optimizer,
            gathered,
            Memory(parameters=parameters, optimizer=optimizer, averages=averages),
        )

    def in_pass(self, moments: tuple[Moment, ...], images: int) -> Iterator[Memory]:
        """Forward and backward, in a call after the first, if there is more than one."""
        powers = (
            1,
            images,
            images * images * self.world,
        )  # CLIP's logits: own images against all captions
        exchanged = (
            16 * self.world * images * self.gathered
        )  # both kinds of float32 embeddings, as they come and in one piece
        for moment in moments:
            saved, rest = (
                sum(size * power for size, power in zip(sizes, powers, strict=True))
                for sizes in (moment.saved, moment.rest)
            )
            yield replace(
                self.fixed,
                gradients=self._gradients(moment.gradients),
                activations=saved,
                workspace=rest + exchanged,
            )

    def afterwards(self) -> Iterator[Memory]:
        """Reducing the gradients at the end of the backward pass, and the optimizer's step."""
        width, whole, part = self.width, self.all, 0 if self._away else self.width * self.own
        flat, bucket = width * min(whole, self.bucket), self._bucket(whole)
        if self.stage == 0:
            yield replace(
                self.fixed, gradients=4 * whole, workspace=flat
            )  # one flat copy is reduced
            yield replace(
                self.fixed, gradients=4 * whole, workspace=self._adam(whole, self.largest)
            )
            return
        if (
            self.stage == 3
        ):  # one copy is scattered, of which gloo makes more; then the step. At first the whole network is there, to be divided
            last = width * (self.own + (self.largest if self.world > 1 else 0))
            copies = 1 + self.on_cpu * (1 + (self.world > 1))
            yield replace(
                self.fixed, parameters=last, gradients=bucket + part, workspace=flat * copies
            )
            yield Memory(parameters=width * (whole + self.own), gradients=self._bucket(0))
            yield from (
                ()
                if self._away
                else self._step(min(self.own, SUBGROUP), bucket + part, bucket + part)
            )
            return
        unfilled = width * whole - flat if self.stage == 1 else 0
        held = part if self.stage == 2 and self.accumulates else 0
        yield replace(
            self.fixed,
            gradients=unfilled + bucket + part + held,
            workspace=flat if self.world > 1 else 0,
        )
        yield from () if self._away else self._step(self.own, part, 0)

    def _step(self, stepped: int, gradients: int, kept: int) -> Iterator[Memory]:
        """AdamW over so many elements at once, with so many bytes of gradients before, and of those that are kept."""
        if self.offload:  # on a CPU, where the float32 gradients are the optimizer's
            yield replace(self.fixed, gradients=kept, workspace=self._adam(stepped, stepped))
            return
        cast = self.width * stepped + (
            4 * stepped if self.width < 4 else 0
        )  # in one piece, and then in float32
        for transient in (8 * min(self.largest, self.own), cast):  # norms are taken in float64
            yield replace(self.fixed, gradients=gradients, workspace=transient)
        yield replace(
            self.fixed, gradients=kept + 4 * stepped, workspace=self._adam(stepped, stepped)
        )

    @property
    def _away(self) -> bool:
        """Whether the optimizer and its gradients are in the memory of another device."""
        return self.offload and not self.on_cpu

    def _adam(self, stepped: int, tensor: int) -> int:
        """What torch's AdamW needs for a moment, of tensors of at most so many elements: square roots, of one tensor on a CPU and of all on a
        GPU, and on a CPU the quotients too."""
        return 0 if self.fused else 8 * tensor if self.on_cpu else 4 * stepped

    def _bucket(self, filled: int) -> int:
        """Of the buffer in which gradients are reduced. On a CPU what was never written to takes no memory."""
        return self.width * (min(self.bucket, filled) if self.on_cpu else self.bucket)

    def _gradients(self, done: int) -> int:
        """With the gradients of so many elements computed, and reduced as far as that stage does while it goes backward."""
        width, part = self.width, 0 if self._away else self.width * self.own
        if self.stage == 3:
            return part + self._bucket(self.all)  # both are there from the start
        if self.stage == 2:
            reduced = part if done > self.bucket else 0
            return (part if self.accumulates else 0) + reduced + (self._bucket(done) if done else 0)
        unreduced = width * (self.all if self.accumulates else done)
        return unreduced + (self._bucket(0) if self.stage == 1 and done else 0)


@lru_cache(maxsize=32)
def _sizes(model: AnyModelConfig) -> tuple[int, ...]:
    return tuple(parameter.numel() for parameter in meta_model(model, "fp32").parameters())


# -- the micro-batch --------------------------------------------------------------------------------------------------


def choose_micro_batch(
    preset: Preset, world: int, precision: str, budget: float, device: str = "cuda"
) -> int:
    """Images in a network call: as many as fit `budget` bytes, and then as few as take no more calls. What the preset sets is taken as it is.

    Raises ConfigError, with what would help, where not even one fits.
    """
    share = -(-preset.train.batch // world)
    if preset.train.micro_batch:
        return min(preset.train.micro_batch, share)
    largest = _largest(preset, world, share, precision, budget, device)
    if not largest:
        needs = memory(preset, world, 1, precision, device)
        raise ConfigError(
            f"Training {preset.model.name} on {_counted(world, 'worker')} takes {gb(needs.total)} GB each with one image in a call, "
            f"{gb(_greatest(needs)[1])} of them for its {_greatest(needs)[0]}, and {gb(budget)} GB are to be had; "
            f"{_remedy(preset, world, precision, budget, device)}."
        )
    return -(-share // -(-share // largest))


def _largest(
    preset: Preset, world: int, share: int, precision: str, budget: float, device: str
) -> int:
    def fits(images: int) -> bool:
        return memory(preset, world, images, precision, device).total <= budget

    if fits(share):  # of one call a step, which accumulates nothing and so may take less than two
        return share
    low, high = 0, share  # the most that is known to fit, the least that is known not to
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _remedy(preset: Preset, world: int, precision: str, budget: float, device: str) -> str:
    """The least change of settings, or else the number of workers, with which one image fits."""

    def fits(workers: int, settings: tuple[str, ...]) -> bool:
        changed = override(
            preset,
            [
                *settings,
                f"batch={max(preset.train.batch, workers)}",
                "workers=1",
                "min_workers=none",
            ],
        )
        try:
            return memory(changed, workers, 1, precision, device).total <= budget
        except ConfigError:  # stage 0 has nothing to offload
            return False

    checkpointing = "activation_checkpointing=true"
    stages = [f"zero_stage={stage}" for stage in range(max(2, preset.train.zero_stage + 1), 4)]
    away = ["offload_optimizer=true"] if device != "cpu" else []
    tries = [
        (checkpointing,),
        *((stage,) for stage in stages),
        *((stage, checkpointing) for stage in stages),
        *((setting, checkpointing) for setting in away),
        *((*away, stage, checkpointing) for stage in stages if away),
    ]
    for settings in tries:
        if fits(world, settings):
            return f"set {' and '.join(f'train.{setting}' for setting in settings)}"
    settings = ("zero_stage=3", checkpointing)
    workers = next(
        (workers for power in range(1, 13) if fits(workers := world * 2**power, settings)), None
    )
    if workers:
        return (
            f"use {workers} workers with {' and '.join(f'train.{setting}' for setting in settings)}"
        )
    return "use a device with more memory, for more workers, another ZeRO stage and activation_checkpointing would not be enough"


def _greatest(needs: Memory) -> tuple[str, int]:
    return max(((name, size) for name, size in vars(needs).items()), key=lambda part: part[1])


# -- time -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step. Stage 3 sends while it computes: the longer of both counts. The others wait for what they send."""

    compute: float
    communication: float
    offload: float
    overlaps: bool

    @property
    def total(self) -> float:
        return (max if self.overlaps else sum)((self.compute, self.communication)) + self.offload


def step_time(
    preset: Preset, world: int, micro_batch: int, precision: str, machine: Machine
) -> StepTime:
    """Three times the operations of a forward pass, four with activation checkpointing; and what is sent, of `width` bytes a parameter each
    time: DeepSpeed all-reduces gradients (twice) and gathers weights (once) in stages 1 and 2, the former in each call in stage 2; in each
    call stage 3 gathers weights twice and scatters gradients once."""
    train, stage = preset.train, preset.train.zero_stage
    share, calls = -(-train.batch // world), accumulation(train.batch, world, micro_batch)
    cost, whole, width = operations(preset), sum(_sizes(preset.model)), BYTES[precision]
    flops = machine.single if precision == "fp32" and machine.single else machine.flops
    compute = (4 if train.activation_checkpointing else 3) * cost * share / flops
    times = {0: 2, 1: 3, 2: 1 + 2 * calls, 3: 3 * calls}[stage]
    communication = times * width * whole * (world - 1) / world / machine.link
    own = whole / world
    offload = (
        (2 * width * own / PCIE + own / HOST_ADAM)
        if train.offload_optimizer and machine.device != "cpu"
        else 0.0
    )
    return StepTime(compute, communication, offload, stage == 3)


# -- printing --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """One way to spread a run. Where it does not `fit`, `micro_batch` is 1."""

    preset: Preset
    precision: str
    micro_batch: int
    memory: Memory
    time: StepTime
    fits: bool


def plans(preset: Preset, world: int, precision: str, machine: Machine) -> list[Plan]:
    """Every ZeRO stage, with and without activation checkpointing, and on GPUs with the optimizer on the host as well."""
    found = []
    for stage in range(4):
        for offload in (False, True) if stage and machine.device != "cpu" else (False,):
            for checkpointing in (False, True):
                chosen = (
                    "fp32" if stage == 0 else precision
                )  # DeepSpeed's stage 0 keeps no masters for 16 bits
                way = override(
                    preset,
                    [
                        f"zero_stage={stage}",
                        f"offload_optimizer={offload}",
                        f"activation_checkpointing={checkpointing}",
                    ],
                )
                try:
                    images = choose_micro_batch(way, world, chosen, machine.budget, machine.device)
                except ConfigError:
                    images = 1
                needs = memory(way, world, images, chosen, machine.device)
                found.append(
                    Plan(
                        way,
                        chosen,
                        images,
                        needs,
                        step_time(way, world, images, chosen, machine),
                        needs.total <= machine.budget,
                    )
                )
    return found


def best(ways: list[Plan], preset: Preset, precision: str) -> Plan | None:
    """The fastest that fits; of those within a tenth of it the one that asks for least, and changes least of the preset."""

    def order(way: Plan) -> tuple:
        train = way.preset.train
        return (
            train.offload_optimizer,
            train.activation_checkpointing,
            way.precision != precision,
            train.zero_stage != preset.train.zero_stage,
            train.zero_stage,
        )

    fitting = [way for way in ways if way.fits]
    fastest = min((way.time.total for way in fitting), default=0.0)
    return min((way for way in fitting if way.time.total <= 1.1 * fastest), key=order, default=None)


def describe(
    preset: Preset, machine: Machine, price: float | None = None
) -> tuple[str, Plan | None]:
    """The table of all ways to run a preset on its number of workers, the best of them, and what it takes; and that one, if any fits."""
    train, world = preset.train, preset.train.workers
    precision = training_precision(train.precision, machine.device)
    ways = plans(preset, world, precision, machine)
    chosen = best(ways, preset, precision)
    lines = [
        f"{preset.model.name}, {sum(_sizes(preset.model)) / 1e6:,.2f}M parameters in {precision}, on {world} x {machine.name}: batch {train.batch:,}, "
        f"{-(-train.batch // world):,} images a worker; {gb(machine.budget)} GB each to plan with",
        "",
        "GB of a worker at the moment when it holds most",
        HEAD,
        *(_row(way, way is chosen) for way in ways),
        "",
    ]
    if chosen is None:
        return "\n".join(lines), None
    seconds, hours = chosen.time.total, train.steps * chosen.time.total / 3600
    flops = machine.single if chosen.precision == "fp32" and machine.single else machine.flops
    lines += [
        "the fastest that fits, for glide train:",
        "  " + " ".join(f"--set {flag}" for flag in _flags(chosen, precision)),
        "",
        f"a step of {seconds:,.3g} s: compute {chosen.time.compute:,.3g} s at {flops / TERA:,.3g} TFLOP/s a worker ({machine.note}), "
        f"communication {chosen.time.communication:,.3g} s at {machine.link / GIGA:,.3g} GB/s{' beside it' if chosen.time.overlaps else ''}"
        + (
            f", offloaded optimizer {chosen.time.offload:,.3g} s and {gb(_on_host(chosen))} GB of the host for each worker"
            if chosen.time.offload
            else ""
        ),
        f"{train.steps:,} steps in {f'{hours / 24:,.1f} days' if hours > 48 else f'{hours:,.1f} hours'}: {train.batch / seconds:,.{0 if train.batch > 100 * seconds else 1}f} images/s, "
        f"{hours * world:,.1f} worker hours"
        + (f", at {price:g} each {hours * world * price:,.0f}" if price is not None else ""),
        "without held-out losses and checkpoints, and as long as the corpus is read as fast",
    ]
    return "\n".join(lines), chosen


def _on_host(way: Plan) -> int:
    """Bytes of the host's memory that an offloaded optimizer takes."""
    kept = _State.of(
        way.preset, way.preset.train.workers, way.micro_batch, way.precision, "cpu"
    ).fixed
    return kept.optimizer + kept.averages


def _flags(way: Plan, precision: str) -> list[str]:
    train, given = way.preset.train, {True: "true", False: "false"}
    return [
        f"workers={train.workers}",
        f"batch={train.batch}",
        f"zero_stage={train.zero_stage}",
        f"micro_batch={way.micro_batch}",
        f"activation_checkpointing={given[train.activation_checkpointing]}",
        f"offload_optimizer={given[train.offload_optimizer]}",
        *([f"precision={way.precision}"] if way.precision != precision else []),
    ]


HEAD = "  ZeRO     checkpointing  offload  images a call  calls  parameters  gradients  optimizer  averages  activations  workspace     total   step, s"


def _row(way: Plan, chosen: bool) -> str:
    train, needs = way.preset.train, way.memory
    stage = f"{train.zero_stage}{' fp32' if train.zero_stage == 0 else ''}"
    sizes = "".join(
        f"{gb(size):>{width}}"
        for size, width in zip(vars(needs).values(), (12, 11, 11, 10, 13, 11), strict=True)
    )
    yes = {True: "yes", False: "-"}
    return (
        f"{'*' if chosen else ' '} {stage:<9}{yes[train.activation_checkpointing]:<15}{yes[train.offload_optimizer]:<9}{way.micro_batch:>13}"
        f"{accumulation(train.batch, train.workers, way.micro_batch):>7}{sizes}{gb(needs.total):>10}"
        + (f"{way.time.total:>10,.3g}" if way.fits else "  does not fit")
    )


def gb(size: float) -> str:
    """In GB of 10^9 bytes, to three digits."""
    return f"{size / GIGA:,.{3 if size < GIGA else 2 if size < 10 * GIGA else 1}f}"


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
