"""Bulk generation: a file of prompts to a folder of PNGs, on all GPUs or cores of a cluster.

Pictures that exist already are not made again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow
import ray
import torch
from ray.data import ActorPoolStrategy

from .. import storage
from ..config.sampling import BulkConfig
from ..data.sources import METADATA
from ..errors import UserError
from ..models.clip_scorer import fetch_clip
from ..pretrained import shipped
from ..progress import bar
from ..sampling.cascade import Cascade
from ..sampling.checks import RequestError, check_negative, check_options
from ..sampling.prompt import check_prompt, is_cut, plain_text
from ..sampling.recipe import ModelSet, save_picture
from .cluster import connect, is_connected, uses_gpu
from .embed import JOB
from .stream import ray_data, task_errors

log = logging.getLogger(__name__)

ROLES = ("base", "upsampler", "clip")  # roles of weights files
PER_FOLDER = 10_000  # pictures in each subfolder
MAX_BLOCKS = 10_000  # largest number of Ray Data blocks; each has as few pictures as this allows
IMAGES_PER_CALL = 8  # batch size of a worker and of its network calls


@dataclass(frozen=True)
class PictureRequest:
    """A picture to make; `number` counts all pictures of the job from 0."""

    number: int
    prompt: str
    seed: int

    @property
    def file(self) -> str:
        return f"{self.number // PER_FOLDER:05d}/{self.number:09d}.png"


@dataclass(frozen=True)
class BulkResult:
    """Result of a call of `generate`."""

    out: str
    pictures: int  # in `out` now
    made: int  # by this call
    cut_prompts: int  # different prompts that were cut at the length of the model's context


def generate(
    prompts: str,
    out: str,
    config: BulkConfig,
    workers: int | None = None,
) -> BulkResult:
    """Make the pictures of a file of prompts that are still missing in the folder or prefix `out`.

    The file has one prompt per line; a .jsonl file has one object per line, with `prompt` and
    optionally `seed`. Picture N of the job has the seed `config.seed + N`, or one counted from its
    prompt's own seed, and is the same wherever and however often it is made. At the end METADATA
    is written, which makes `out` a corpus. `workers`: number of actors, by default one per GPU, or
    per core if there are no GPUs. Raises UserError.
    """
    check_options(config.options, config.seed)
    requests = read_prompts(prompts, config.seed, config.per_prompt)
    out = storage.absolute(out).rstrip("/")
    config = config.model_copy(
        update={role: shipped.absolute(path) for role in ROLES if (path := getattr(config, role))}
    )
    context = _begin(requests, out, config)
    existing = _numbers(out)
    missing = [item for item in requests if item.number not in existing]
    if missing:
        log.info(
            f"{len(requests):,} pictures requested, {len(existing):,} already in {out}; "
            f"generating {len(missing):,}"
        )
        connect(os.cpu_count() or 1)
        _make(missing, out, config, workers)
        existing = _numbers(out)
        if still_missing := sum(item.number not in existing for item in requests):
            raise UserError(
                f"{still_missing:,} of {len(requests):,} pictures are missing from {out}; "
                f"run the same command again to generate them."
            )
    lines = (
        json.dumps(
            {"file_name": item.file, "text": plain_text(item.prompt), "seed": item.seed},
            ensure_ascii=False,
        )
        for item in requests
    )
    storage.put("".join(f"{line}\n" for line in lines).encode(), f"{out}/{METADATA}")
    return BulkResult(
        out,
        len(requests),
        len(missing),
        sum(is_cut(prompt, context) for prompt in {item.prompt for item in requests}),
    )


# -- requests --------------------------------------------------------------------------------------


def read_prompts(path: str, seed: int, per_prompt: int = 1) -> list[PictureRequest]:
    """Pictures that a prompt file requests. Skips blank lines. Raises UserError if invalid."""
    try:
        # Split bytes: str.splitlines would also break at characters inside captions, as U+2028.
        lines = [line.decode("utf-8-sig") for line in storage.read(path).splitlines()]
    except UnicodeDecodeError:
        raise UserError(
            f"{path} is not text in UTF-8; give a file with one prompt per line, or .jsonl."
        ) from None
    rows = [
        _checked(
            f"{path}, line {n}",
            _parse_line(f"{path}, line {n}", line)
            if path.endswith(".jsonl")
            else (line.strip(), None),
        )
        for n, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not rows:
        raise UserError(f"{path} holds no prompt; write one per line.")
    requests: list[PictureRequest] = []
    for prompt, own_seed in rows:
        requests += [
            PictureRequest(
                number,
                prompt,
                seed + number if own_seed is None else own_seed + number - len(requests),
            )
            for number in range(len(requests), len(requests) + per_prompt)
        ]
    return requests


def _checked(where: str, row: tuple[str, int | None]) -> tuple[str, int | None]:
    try:
        check_prompt(row[0])
    except RequestError as error:
        raise UserError(f"{where}: {error}") from None
    return row


def _parse_line(where: str, line: str) -> tuple[str, int | None]:
    try:
        tree = json.loads(line)
    except ValueError:
        raise UserError(
            f'{where} is not JSON; write {{"prompt": "a red apple"}}, one object per line.'
        ) from None
    if (
        not isinstance(tree, dict)
        or not isinstance(tree.get("prompt"), str)
        or not tree["prompt"].strip()
    ):
        raise UserError(
            f'{where} has no prompt; write {{"prompt": "a red apple"}}, '
            f'and "seed" beside it if you like.'
        )
    seed = tree.get("seed")
    if seed is not None and (
        isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**62
    ):
        raise UserError(
            f"{where} has a seed that is no whole number from 0 to 2^62 - 1 (given: {seed!r})."
        )
    # Replace lone surrogates, which JSON allows and UTF-8 cannot encode.
    return tree["prompt"].strip().encode(errors="replace").decode(), seed


def _begin(requests: Sequence[PictureRequest], out: str, config: BulkConfig) -> int:
    """Check the weights, and that `out` belongs to this job. Returns the base model's context.

    JOB in `out` identifies the job by all that determines its pictures: prompts, seeds, options,
    precision, and hashes of the weights, but not their paths. The first call writes it. Raises
    UserError for another job.
    """
    paths = {role: getattr(config, role) for role in ROLES}
    model_set = ModelSet.read(paths, config.precision, "", config.loras)
    check_options(config.options, base=model_set.base, upsampler=model_set.upsampler)
    check_negative(model_set.base, config.options)
    models: dict[str, object] = {role: used.sha256 for role, used in model_set.models.items()}
    if model_set.loras:
        models["loras"] = [[used.sha256, used.scale] for used in model_set.loras]
    if config.options.clip_scale and not config.clip:
        raise UserError(
            "clip_scale asks for CLIP guidance, which needs a CLIP model; give one with it."
        )
    prompts_sha256 = hashlib.sha256(
        json.dumps([[item.number, item.prompt, item.seed] for item in requests]).encode()
    ).hexdigest()
    job = {
        "pictures": len(requests),
        "asked_sha256": prompts_sha256,
        "precision": config.precision,
        "options": config.options.model_dump(mode="json"),
        "models": models,
    }
    try:
        before = json.loads(storage.read(f"{out}/{JOB}"))
    except storage.MissingError:
        storage.put(json.dumps(job, indent=1).encode(), f"{out}/{JOB}")
    except ValueError:
        raise UserError(f"{out}/{JOB} is damaged; give another folder with --out.") from None
    else:
        if differs := [
            name.replace("asked_sha256", "prompts or seeds")
            for name in job
            if before.get(name) != job[name]
        ]:
            raise UserError(
                f"{out} holds pictures of another job (other {' and '.join(differs)}); "
                f"give another folder with --out."
            )
    return model_set.base.context


def _numbers(out: str) -> set[int]:
    """Numbers of the pictures in `out`; each file is written whole or not at all."""
    found = (re.search(r"/(\d{9})\.png$", file) for file in storage.list_files(out, (".png",)))
    return {int(match[1]) for match in found if match}


# -- generation ------------------------------------------------------------------------------------


class Worker:
    """Ray actor: prompts to pictures in storage. Loads the weights once."""

    def __init__(self, out: str, config: BulkConfig, threads: int):
        if not torch.cuda.is_available():
            torch.set_num_threads(threads)
        local = {
            role: fetch_clip(path) if role == "clip" else shipped.fetch(path, role)
            for role in ROLES
            if (path := getattr(config, role))
        }
        self._cascade = Cascade.load(
            local["base"],
            local.get("upsampler"),
            config.precision,
            IMAGES_PER_CALL,
            local.get("clip"),
            loras=config.loras,
        )
        self._out, self._options, self._model_set = out, config.options, ModelSet.of(self._cascade)

    def __call__(self, block: pyarrow.Table) -> pyarrow.Table:
        requests = [PictureRequest(**row) for row in block.to_pylist()]
        images = self._cascade.generate(
            [item.prompt for item in requests],
            [item.seed for item in requests],
            self._options,
        )
        for item, image in zip(requests, images, strict=True):
            save_picture(
                image,
                f"{self._out}/{item.file}",
                self._model_set.recipe("generate", item.prompt, item.seed, self._options),
            )
        return block.select(["number"])


def _make(
    requests: Sequence[PictureRequest], out: str, config: BulkConfig, workers: int | None
) -> None:
    resources = ray.cluster_resources()
    gpus, cores = (
        int(resources.get("GPU", 0)),
        int(resources.get("CPU", 1)) if is_connected() else os.cpu_count() or 1,
    )
    on_gpu = uses_gpu(config.device)
    if on_gpu and not (workers or gpus):
        raise UserError("The cluster has no GPU yet; give the number to request with --workers.")
    most = min(workers or (gpus if on_gpu else cores), -(-len(requests) // IMAGES_PER_CALL))
    threads = 1 if is_connected() else max(1, cores // most)
    table = pyarrow.Table.from_pylist(
        [{"number": item.number, "prompt": item.prompt, "seed": item.seed} for item in requests]
    )
    rows = IMAGES_PER_CALL * -(-len(table) // (IMAGES_PER_CALL * MAX_BLOCKS))
    # The unit of work that is repeated when a worker is lost.
    blocks = [table.slice(start, rows) for start in range(0, len(table), rows)]
    tables = (
        ray_data()
        .from_arrow(blocks)
        .map_batches(
            Worker,
            fn_constructor_args=(out, config, threads),
            batch_format="pyarrow",
            batch_size=IMAGES_PER_CALL,
            compute=ActorPoolStrategy(min_size=1, max_size=most, max_tasks_in_flight_per_actor=2),
            num_cpus=0 if on_gpu else 1,
            num_gpus=1 if on_gpu else 0,
        )
    )
    with (
        bar("generate", "image", len(requests)) as progress,
        task_errors(),
    ):
        for batch in tables.iter_batches(batch_size=None, batch_format="pyarrow"):
            progress.update(len(batch))
