"""Training configs, and presets that combine model, data and training."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from .data import DataConfig
from .models import AnyModelConfig, Frozen, ModelConfig

# Prompts of the sample grids, suited to the emoji corpus.
SAMPLE_PROMPTS = (
    "a red apple, 3D render",
    "a green heart, 3D render",
    "a grinning face, 3D render",
    "a blue circle, flat icon",
    "a dog face, 3D render",
    "an orange, 3D render",
    "a tree, 3D render",
    "a purple heart, flat icon",
)


PARTS = ("text", "attention", "convolutions")  # of a U-Net with its text transformer


class TrainConfig(Frozen):
    """One training run."""

    objective: Literal["base", "upsampler", "clip"] = Field(description="kind of model")
    steps: int = Field(gt=0, description="optimizer steps")
    batch: int = Field(gt=0, description="images of an optimizer step, over all workers")
    start_from: str | None = Field(
        None,
        description="weights to start from, or emoji; an "
        "inpainting model may start from a model without inpainting",
    )
    learning_rate: float = Field(gt=0, description="peak learning rate of AdamW")
    weight_decay: float = Field(
        0.0, ge=0, description="weight decay of AdamW; gains and biases do not decay"
    )
    warmup_steps: int = Field(0, ge=0, description="steps of the linear warm-up")
    constant_steps: int | None = Field(
        None,
        gt=0,
        description="steps before the learning rate "
        "falls as 1 / sqrt(step) (EDM2); none: it stays constant",
    )
    min_snr: float | None = Field(
        None,
        gt=0,
        description="largest weight of the error of x_0: "
        "min(SNR, this), or min(SNR + 1, this) for v and x0 (Hang et al. "
        "2023: 5); none: equal weights for eps",
    )
    timestep_power: float = Field(
        0.0,
        ge=0,
        description="timesteps are drawn with a density "
        "proportional to t to this power; 0: uniformly (the paper)",
    )
    text_rate: float = Field(
        1.0,
        ge=0,
        description="learning rate of the text transformer, in "
        "multiples of learning_rate; 0: unchanged, but part of checkpoints, so that a resumed run "
        "may change it",
    )
    freeze: tuple[Literal["text", "attention", "convolutions"], ...] = Field(
        (),
        description="parts that stay as they are in start_from: text (the text transformer), "
        "attention, convolutions (with norms and embeddings); all but attention: "
        "text,convolutions",
    )
    lora_rank: int | None = Field(
        None,
        gt=0,
        description="train a low-rank adapter of this rank for start_from (LoRA, Hu et al. 2021), "
        "in all linear layers and convolutions but those of freeze; none: train the weights",
    )
    lora_alpha: float = Field(
        8.0,
        gt=0,
        description="an adapter's change of the weights is multiplied by lora_alpha / lora_rank, "
        "so that one learning rate suits all ranks",
    )
    clip_norm: float = Field(0.0, ge=0, description="largest norm of the gradients; 0: unlimited")
    ema_rates: tuple[Annotated[float, Field(ge=0, lt=1)], ...] = Field(
        (0.9999,),
        min_length=1,
        description="decay rates of the weight averages; the first is written to the weights file",
    )
    ema_lengths: tuple[Annotated[float, Field(gt=0, lt=0.28)], ...] = Field(
        (),
        description="relative lengths of further averages, such as 0.05,0.1, from which "
        "`glide export --ema-length` makes one of any length (EDM2)",
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto",
        description="precision of the network; auto: fp16 on a GPU (bf16 with --no-ray), "
        "the faster of bf16 and fp32 on a CPU",
    )
    seed: int = Field(0, description="seed of weights, noise, crops and order")

    # Distribution over machines. It does not change the loss, except CLIP's (see `contrastive`).
    workers: int = Field(1, gt=0, description="worker processes")
    device: Literal["auto", "cpu", "gpu"] = Field(
        "auto",
        description="device of a worker; auto: GPUs if the cluster has any; gpu: wait for "
        "the autoscaler to add them",
    )
    min_workers: int | None = Field(
        None,
        gt=0,
        description="workers with which a run continues after losing nodes; none: all of them",
    )
    micro_batch: int | None = Field(
        None,
        gt=0,
        description="images of a worker's network call; none: as many as fit into its memory",
    )
    zero_stage: int = Field(2, ge=0, le=3, description="DeepSpeed ZeRO stage")
    offload_optimizer: bool = Field(
        False, description="keep master weights, moments and averages in host memory"
    )
    activation_checkpointing: bool = Field(
        False, description="recompute activations in the backward pass, to save memory"
    )

    fused_norms: bool = Field(
        False,
        description="on an NVIDIA GPU, compute norms, their modulation and SiLU with Triton "
        "kernels that keep channels-last memory",
    )

    # Logs, checkpoints and samples.
    log_every: int = Field(10, gt=0, description="steps between log lines")
    evaluate_every: int = Field(100, gt=0, description="steps between held-out losses")
    checkpoint_every: int = Field(100, gt=0, description="steps between checkpoints")
    checkpoint_minutes: float = Field(
        30.0, gt=0, description="minutes after a checkpoint until the next, if it is not due before"
    )
    keep_last: int = Field(2, gt=0, description="latest checkpoints that are kept")
    keep_every: int | None = Field(
        None, gt=0, description="steps; checkpoints at multiples of it are kept for good"
    )
    trackers: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = Field(
        ("tensorboard",), description="experiment trackers"
    )
    sample_every: int | None = Field(
        None,
        gt=0,
        description="steps between grids of samples, made "
        "from a checkpoint's weight average beside the run",
    )
    sample_prompts: tuple[str, ...] = Field(
        SAMPLE_PROMPTS, min_length=1, description="prompts of the grids of samples"
    )

    profile_steps: str | None = Field(
        None,
        pattern=r"^[1-9]\d*:[1-9]\d*$",
        description="first and last step of a profile of the first worker, such as 100:105, "
        "written to profile/ in the folder of the run",
    )

    # Failure handling.
    max_failures: int = Field(
        20,
        ge=-1,
        description="failures of workers and nodes within an hour before a run is given up; "
        "-1: unlimited",
    )
    stall_seconds: float = Field(
        900, gt=0, description="seconds without a completed step before a worker is restarted"
    )
    wait_seconds: float = Field(
        600, ge=0, description="seconds to wait for the cluster to provide the workers"
    )

    @property
    def averages(self) -> int:
        """Number of weight averages."""
        return len(self.ema_rates) + len(self.ema_lengths)

    @model_validator(mode="after")
    def _parts_fit(self) -> TrainConfig:
        if self.batch % self.workers:
            near = max(self.workers, round(self.batch / self.workers) * self.workers)
            raise ValueError(
                f"train.batch {self.batch} is not divisible by train.workers "
                f"{self.workers}; {near} is"
            )
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(
                f"train.min_workers {self.min_workers} is more than train.workers {self.workers}"
            )
        if self.min_workers not in (None, self.workers) and self.objective == "clip":
            raise ValueError(
                "train.min_workers: CLIP's loss is over the embeddings of equally "
                "many images on each worker; leave it out"
            )
        if self.profile_steps is not None:
            first, last = map(int, self.profile_steps.split(":"))
            if not first <= last:
                raise ValueError(
                    f"train.profile_steps {self.profile_steps} ends before it begins; write "
                    "FIRST:LAST"
                )
        kept = "lora_rank" if self.lora_rank else "freeze" if self.freeze else ""
        if kept and (self.start_from is None or self.objective == "clip"):
            wrong = "a CLIP is trained whole" if self.start_from else "there are none without it"
            raise ValueError(f"train.{kept} keeps weights of train.start_from as they are; {wrong}")
        if len(set(self.freeze)) == len(PARTS):
            raise ValueError("train.freeze names all parts; leave out the one to train")
        for name in ("keep_every", "sample_every"):
            every = getattr(self, name)
            if every is not None and every % self.checkpoint_every:
                raise ValueError(
                    f"train.{name} {every} is not a multiple of "
                    f"train.checkpoint_every {self.checkpoint_every}"
                )
        return self


class Preset(Frozen):
    """A complete run by name."""

    model: AnyModelConfig = Field(description="the model")
    data: DataConfig = Field(description="the data")
    train: TrainConfig = Field(description="the training")

    @model_validator(mode="after")
    def _parts_fit(self) -> Preset:
        model, crop = self.model, self.data.crop
        if self.train.objective != model.role:
            low_res = (
                ""
                if model.role == "clip"
                else f" (model.unet.low_res_size is {model.low_res_size})"
            )
            raise ValueError(
                f"train.objective {self.train.objective!r} does not fit a model of "
                f"the kind {model.role!r}{low_res}"
            )
        if model.role == "clip" and self.train.min_snr is not None:
            raise ValueError(
                f"train.min_snr {self.train.min_snr:g} weights the loss of denoising models; "
                "leave it out for a CLIP"
            )
        if crop is not None:
            if not isinstance(model, ModelConfig) or model.low_res_size is None:
                raise ValueError(f"data.crop {crop} is for upsamplers only")
            grain, factor = model.unet.grain, model.image_size // model.low_res_size
            if crop > model.image_size or crop % grain or crop % factor:
                raise ValueError(
                    f"data.crop {crop} must be a multiple of {grain} and {factor}, "
                    f"and at most {model.image_size}"
                )
        return self
