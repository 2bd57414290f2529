"""From a corpus to an endpoint by submitted jobs, over S3, on three raylets; two are killed."""

import hashlib
import io
import json
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
import yaml
from helpers.cluster_run import cluster
from helpers.paths import ROOT
from helpers.tiny import TINY_BASE, serving_weights
from PIL import Image

from glide_ray import storage
from glide_ray.bench.load_generator import free_port
from glide_ray.config.sampling import SampleOptions
from glide_ray.sampling.cascade import Cascade
from glide_ray.train.run_folder import last_step, read_metrics

STEPS, PROMPTS = 60, 120
pytestmark = pytest.mark.slow  # three raylets start, and take as long as the tests


def pictures(prefix):
    return list(storage.list_files(prefix, (".png",)))


def wait_for(done, job, seconds=240):
    deadline = time.monotonic() + seconds
    while not done():
        assert job.poll() is None, job.communicate()[0][-3000:]
        assert time.monotonic() < deadline, "nothing comes"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def ray(s3):
    with cluster(3, 1, 1) as local_cluster:
        yield local_cluster


def test_jobs_from_corpus_to_pictures_survive_resubmission_s3_errors_and_killed_raylets(
    ray, s3, s3_faults, tiny_weights
):
    """About 5% of S3 requests fail or are slow.

    One raylet is killed during training, and one during bulk generation.
    """
    head, (first, second) = ray
    s3_faults.at_random(0.05)
    root = f"{s3}/whole"
    prepare = ["jobs/prepare.py", "--out", f"{root}/corpus", "--styles", "3D render,flat icon"]
    head.submit(*prepare)
    # The smaller split, to save time.
    clean = ["jobs/filter.py", f"{root}/corpus/held_out", "--out", f"{root}/clean"]
    kept = head.submit(*clean)
    assert 100 < kept["kept"] < 349 and not kept["done_before"]
    settings = [
        *TINY_BASE,
        "data.min_size=16",
        f"data.corpus={root}/clean",
        f"data.held_out={root}/corpus/held_out",
        "data.held_out_images=16",
        "batch=8",
        "workers=2",
        "min_workers=1",
        f"steps={STEPS}",
        "log_every=1",
        "evaluate_every=20",
        "checkpoint_every=10",
        "precision=fp32",
        "trackers=",
    ]
    train = [
        "jobs/train.py",
        "nano-base",
        *(word for setting in settings for word in ("--set", setting)),
        "--out",
        f"{root}/run",
    ]
    training = head.submit(*train, wait=False)
    wait_for(lambda: last_step(f"{root}/run/metrics.jsonl") > 12, training)
    head.kill(first)
    third = head.add_node(1)
    assert head.result(training)["steps"] == STEPS
    steps = [row["step"] for row in read_metrics(f"{root}/run/metrics.jsonl") if "loss" in row]
    assert steps == list(range(1, STEPS + 1))
    export = ["jobs/export.py", f"{root}/run", "--out", f"{root}/weights/base.safetensors"]
    assert head.submit(*export)["step"] == STEPS

    storage.put(
        "".join(f"a red apple {n}\n" for n in range(PROMPTS)).encode(), f"{root}/prompts.txt"
    )
    bulk = [
        "jobs/generate.py",
        f"{root}/prompts.txt",
        "--out",
        f"{root}/pictures",
        "--base",
        f"{root}/weights/base.safetensors",
        "--steps",
        "60",
    ]
    generating = head.submit(*bulk, wait=False)
    wait_for(lambda: len(pictures(f"{root}/pictures")) >= 20, generating)
    head.kill(second)
    result = head.result(generating)
    assert result["pictures"] == result["made"] == PROMPTS == len(pictures(f"{root}/pictures"))
    assert third.poll() is None
    cascade = Cascade.load(storage.fetch(f"{root}/weights/base.safetensors"))
    lines = [
        json.loads(line) for line in storage.read(f"{root}/pictures/metadata.jsonl").splitlines()
    ]
    for line in lines[::17]:
        alone = cascade.generate([line["text"]], [line["seed"]], SampleOptions(steps=60))[0]
        assert np.array_equal(
            alone,
            np.asarray(
                Image.open(io.BytesIO(storage.read(f"{root}/pictures/{line['file_name']}")))
            ),
        )

    storage.put(tiny_weights["clip"], f"{root}/weights/clip.safetensors")
    evaluate = [
        "jobs/evaluate.py",
        f"{root}/pictures",
        "--reference",
        f"{root}/corpus/held_out",
        "--clip",
        f"{root}/weights/clip.safetensors",
        "--out",
        f"{root}/evaluation",
    ]
    figures = head.submit(*evaluate)
    # The reference is the held-out images of both styles.
    assert (
        figures["sets"]["pictures"]["pictures"] == PROMPTS
        and figures["reference"]["images"] == 170 + 164
    )
    assert b"a red apple " in storage.read(f"{root}/evaluation/report.html")

    # Submit every job again: none may do work or change a file.
    written = {
        file: storage.digest(storage.fetch(file))
        for file in storage.list_files(f"{root}/weights", (".safetensors",))
    }
    *repeated, generated, trained, evaluated = [
        head.result(job)
        for job in [
            head.submit(*job, wait=False) for job in (prepare, clean, export, bulk, train, evaluate)
        ]
    ]
    assert (
        all(done["done_before"] for done in repeated)
        and generated["made"] == 0
        and trained["steps"] == STEPS
        and evaluated == figures
    )
    assert set(s3_faults.befallen) >= {"503", "reset", "truncate", "slow"}
    s3_faults.clear()
    for folder in ("corpus/train", "corpus/held_out", "clean"):
        for shard in json.loads(storage.read(f"{root}/{folder}/index.json"))["shards"]:
            assert (
                hashlib.sha256(storage.read(f"{root}/{folder}/{shard['name']}")).hexdigest()
                == shard["sha256"]
            )
    assert written == {file: storage.digest(storage.fetch(file)) for file in written}


def test_a_failing_job_prints_one_sentence_and_exits_with_an_error(ray):
    job = ray[0].submit("jobs/generate.py", "nowhere.txt", "--out", "x", "--base", "y", wait=False)
    output = job.communicate(timeout=240)[0]
    assert (
        job.returncode != 0 and "generate: There is no file" in output and "Traceback" not in output
    )


def test_serve_deploy_starts_the_endpoint_of_the_config_file(ray, tmp_path):
    head, _ = ray
    config, port = yaml.safe_load(Path(ROOT, "serve", "config.yaml").read_text()), free_port()
    config["http_options"]["port"] = port
    config["proxy_location"] = "HeadOnly"  # the three nodes share one machine, hence one port
    config["applications"][0]["args"] |= serving_weights(tmp_path / "weights")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    deploy = [
        str(Path(sys.executable).parent / "serve"),
        "deploy",
        "-a",
        f"http://127.0.0.1:{head.dashboard}",
        str(tmp_path / "config.yaml"),
    ]
    subprocess.run(deploy, cwd=ROOT, env=head.environment, check=True, capture_output=True)
    deadline = time.monotonic() + 240
    while not ready(port):
        assert time.monotonic() < deadline, subprocess.run(
            [deploy[0], "status", "-a", deploy[3]],
            env=head.environment,
            capture_output=True,
            text=True,
        ).stdout
        time.sleep(0.5)
    answer = httpx.post(
        f"http://127.0.0.1:{port}/v1/images/generations",
        json={"prompt": "a red apple", "steps": 2},
        timeout=60,
    )
    assert answer.status_code == 200 and answer.json()["size"] == "256x256"


def ready(port):
    try:
        return httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200
    except httpx.HTTPError:
        return False
