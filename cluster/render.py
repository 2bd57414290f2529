"""Render the files of a cluster from sizes.yaml and templates/.

Run `.venv/bin/python cluster/render.py`.
--check reports files that differ from what would be rendered, and writes nothing.
--set nodes.train.max=4 overrides a value of sizes.yaml for this run. --out sets the output folder.
"""

from __future__ import annotations

import argparse
import json
import sys
from math import ceil
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from pydantic import Field, StringConstraints, model_validator

from glide_ray.config import presets
from glide_ray.config.models import Frozen
from glide_ray.config.overrides import override, validate
from glide_ray.config.serving import Scale
from glide_ray.errors import UserError

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
JOBS = ("train", "filter", "generate", "evaluate")
DASHBOARDS = ("serving", "training")
RESERVED_MEMORY = 0.1  # fraction of a machine's memory reserved for Kubernetes and its daemons


class Node(Frozen):
    """One kind of node. `cpus`, `memory_gib` and `gpus` are those of the whole machine."""

    machine: str = Field(pattern=r"^[a-z0-9-]+\.[a-z0-9]+$")
    cpus: int = Field(gt=1)
    memory_gib: int = Field(gt=1)
    gpus: int = Field(0, ge=0)
    min: int = Field(0, ge=0)
    max: int = Field(gt=0)
    market: Literal["on-demand", "spot", "spot-first"] = "on-demand"
    disk_gib: int = Field(200, gt=0)
    efa_interfaces: int = Field(0, ge=0)

    @property
    def pod_cpus(self) -> int:
        """CPUs that a pod alone on such a machine may request."""
        return self.cpus - 1

    @property
    def pod_gib(self) -> int:
        return int(self.memory_gib * (1 - RESERVED_MEMORY))

    @property
    def kinds(self) -> dict[str, bool]:
        """Node groups of this kind: suffix of the group's name -> whether it uses spot instances.

        The preferred group comes last: in ray-cluster.yaml it refers to the YAML anchor of the
        other one.
        """
        return {
            "on-demand": {"": False},
            "spot": {"": True},
            "spot-first": {"": False, "-spot": True},
        }[self.market]

    @model_validator(mode="after")
    def _order(self) -> Node:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is more than max {self.max}")
        return self


class Nodes(Frozen):
    head: Node
    data: Node
    train: Node
    serve: Node


class Training(Frozen):
    preset: str
    workers: int = Field(gt=0)
    min_workers: int = Field(gt=0)
    zero_stage: int = Field(2, ge=0, le=3)
    wait_seconds: int = Field(600, ge=0)


class Generating(Frozen):
    workers: int = Field(gt=0)


class Serving(Frozen):
    base_scale: Scale
    upsampler_scale: Scale

    @property
    def most_gpus(self) -> float:
        return sum(
            scale.max_replicas * (scale.gpus or 0)
            for scale in (self.base_scale, self.upsampler_scale)
        )


class Sizes(Frozen):
    """All sizes and names of a cluster: the contents of sizes.yaml."""

    cluster: str = Field(pattern=r"^[a-z][a-z0-9-]{0,30}$")
    region: str = Field(pattern=r"^[a-z]+(-[a-z]+)+-[0-9]+$")
    zones: tuple[Annotated[str, StringConstraints(pattern=r"^[a-z]$")], ...] = Field(min_length=1)
    bucket: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$")
    ray: str
    python: str
    image: str = Field(pattern=r":[^:/]+$")  # with a tag
    machine_image: str = Field(pattern=r"^(/aws/|ami-)")
    subnet: str | None = Field(None, pattern="^subnet-")
    security_group: str | None = Field(None, pattern="^sg-")
    nodes: Nodes
    training: Training
    generating: Generating
    serving: Serving

    @property
    def train_settings(self) -> tuple[str, ...]:
        """Values of --set for `jobs/train.py`."""
        return (
            f"data.corpus=s3://{self.bucket}/corpus/train",
            f"data.held_out=s3://{self.bucket}/corpus/held_out",
            "device=gpu",
            *(
                f"{name}={getattr(self.training, name)}"
                for name in ("workers", "min_workers", "zero_stage", "wait_seconds")
            ),
        )

    @property
    def least_train_nodes(self) -> int:
        return ceil(self.training.min_workers / self.nodes.train.gpus)

    @property
    def least_serve_nodes(self) -> int:
        scales = (self.serving.base_scale, self.serving.upsampler_scale)
        return ceil(
            sum(scale.min_replicas * (scale.gpus or 0) for scale in scales) / self.nodes.serve.gpus
        )

    @property
    def most_workers(self) -> int:
        """Maximum number of nodes besides the head.

        With market spot-first, the spot and on-demand groups of a kind share one maximum.
        """
        return self.nodes.data.max + self.nodes.train.max + self.nodes.serve.max

    @model_validator(mode="after")
    def _fits(self) -> Sizes:
        gpus = {
            name: node.max * node.gpus
            for name, node in (("train", self.nodes.train), ("serve", self.nodes.serve))
        }
        for what, wanted, node in (
            ("training.workers", self.training.workers, "train"),
            ("generating.workers", self.generating.workers, "serve"),
            ("the replicas of serving", self.serving.most_gpus, "serve"),
        ):
            if wanted > gpus[node]:
                raise ValueError(
                    f"{what} want {wanted:g} GPUs and nodes.{node} have {gpus[node]}; "
                    f"raise nodes.{node}.max, or ask for less"
                )
        if any(
            scale.gpus is None for scale in (self.serving.base_scale, self.serving.upsampler_scale)
        ):
            raise ValueError(
                "each scale of serving has to say its gpus; 1 is a whole GPU for each replica"
            )
        if (self.subnet is None) != (self.security_group is None):
            raise ValueError("subnet and security_group go together; give both, or neither")
        return self


def read_sizes(path: Path, settings: list[str] = ()) -> Sizes:
    """Read a file of sizes and apply `settings` (KEY=VALUE). Raises UserError if invalid."""
    try:
        tree = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise UserError(
            f"{path} is not YAML{f', at line {mark.line + 1}' if mark else ''}; mend it there."
        ) from None
    sizes = override(validate(Sizes, tree if isinstance(tree, dict) else {}), settings)
    # Check the training settings, so that an invalid run fails here and not on the cluster.
    override(presets.get(sizes.training.preset), sizes.train_settings)
    return sizes


def rendered(sizes: Sizes) -> dict[str, str]:
    """Text of each rendered file, by its path relative to the root of the checkout."""
    environment = Environment(
        loader=FileSystemLoader(HERE / "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["json"] = lambda value: json.dumps(value, ensure_ascii=False)

    def text(template: str, **more: Any) -> str:
        return environment.get_template(template).render(sizes=sizes, template=template, **more)

    panels = yaml.safe_load((HERE / "panels.yaml").read_text())
    return {
        "ray-cluster.yaml": text("ray-cluster.yaml.j2"),
        **{
            f"cluster/kubernetes/{name}.yaml": text(f"{name}.yaml.j2")
            for name in ("serviceaccounts", "raycluster", "rayservice")
        },
        **{
            f"cluster/kubernetes/rayjob-{job}.yaml": text("rayjob.yaml.j2", job=job) for job in JOBS
        },
        **{
            f"cluster/aws/policy-{role}.json": text(f"policy-{role}.json.j2")
            for role in ("head", "worker")
        },
        **{
            f"cluster/grafana/{name}.json": text("dashboard.json.j2", name=name, **panels[name])
            for name in DASHBOARDS
        },
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="write nothing; exit with 1 where a file is not as it would be rendered",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a size, such as bucket=mine; may be repeated",
    )
    parser.add_argument(
        "--sizes",
        type=Path,
        default=HERE / "sizes.yaml",
        help="the file of sizes (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT,
        help="folder to write the files to (default: the checkout)",
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        files = rendered(read_sizes(options.sizes, options.set))
        changed = [
            name
            for name, text in files.items()
            if not (options.out / name).is_file() or (options.out / name).read_text() != text
        ]
        if options.check:
            print(
                f"render: not as rendered: {', '.join(changed)}; run cluster/render.py"
                if changed
                else f"{len(files)} files are as rendered",
                file=sys.stderr if changed else sys.stdout,
            )
            return 1 if changed else 0
        for name in changed:
            (options.out / name).parent.mkdir(parents=True, exist_ok=True)
            (options.out / name).write_text(files[name])
            print(options.out / name)
    except UserError as error:
        print(f"render: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(
            f"render: {error.filename} cannot be written: {error.strerror}; "
            f"give another folder with --out, or the rights to this one.",
            file=sys.stderr,
        )
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
