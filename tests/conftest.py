"""Shared fixtures: one Ray session, an S3 server, a small drawn corpus, tiny random models."""

import fcntl
import gc
import os
import pickle
import subprocess
import sys
import time

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:  # one core for each test process and what it starts
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # must be set before Triton is imported
from helpers.drawings import drawn_samples
from helpers.processes import BUSY_MACHINE, answers
from helpers.s3_proxy import Proxy
from helpers.tiny import random_model, tiny, tiny_clip

from glide_ray.bench.load_generator import free_port
from glide_ray.data import emoji
from glide_ray.data.shards import write_shards
from glide_ray.models.clip import NoisedClip
from glide_ray.models.weights import save_weights

os.environ.update(BUSY_MACHINE)


# Files that take longest come first, so that no test process is left with one at the end.
LONGEST = (
    "test_cluster",
    "test_faults",
    "test_autoscaling",
    "test_docs",
    "test_serving_faults",
    "test_schema",
    "test_clean_resume",
    "test_serving",
    "test_distributed_training",
    "test_demo",
    "test_precision",
    "test_partition",
    "test_plan",
    "test_filter",
    "test_stream",
    "test_clean",
    "test_wheel",
    "test_judge",
    "test_critic",
    "test_compose",
    "test_miniature",
    "test_evaluate",
    "test_study",
    "test_generate",
    "test_connection",
    "test_examples",
)


def pytest_collection_modifyitems(items):
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@pytest.fixture(scope="module", autouse=True)
def nothing_old_to_collect():
    """Exempt the imported modules from garbage collection, which takes 0.3 s a time with them."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def drawn_corpus(tmp_path_factory):
    """A corpus folder with train/ (96 drawings in 3 shards) and held_out/ (16 drawings)."""
    folder = tmp_path_factory.mktemp("corpus")
    write_shards(folder / "train", drawn_samples(96), per_shard=32)
    write_shards(folder / "held_out", drawn_samples(16))
    return folder


@pytest.fixture(scope="session")
def emoji_corpus(tmp_path_factory):
    """Two styles of the default corpus, from the real packages: its folder and its indices.

    The first test process that needs it builds it; the others wait and share it.
    """
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    out, indices = shared / "emoji", shared / "emoji.pickle"
    with open(shared / "emoji.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not indices.exists():
            built = emoji.build_corpus(out, styles=("3D render", "Firefox"))
            indices.write_bytes(pickle.dumps(built))
    return out, pickle.loads(indices.read_bytes())


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory):
    """Weights of a tiny base model, upsampler and noised CLIP.

    Returns {"base": path, "upsampler": path, "clip": path}.
    """
    folder = tmp_path_factory.mktemp("weights")
    paths = {}
    for kind in ("base", "upsampler"):
        config = tiny(kind).model
        paths[kind] = folder / f"{kind}.safetensors"
        save_weights(paths[kind], random_model(config.unet).state_dict(), config)
    torch.manual_seed(0)
    paths["clip"] = folder / "clip.safetensors"
    save_weights(paths["clip"], NoisedClip(tiny_clip().model.clip).state_dict(), tiny_clip().model)
    return paths


@pytest.fixture(scope="session")
def public(tmp_path_factory):
    """Folder of a small CLIP saved by transformers; random weights, single bytes as vocabulary."""
    import transformers
    from tokenizers.pre_tokenizers import ByteLevel

    folder = tmp_path_factory.mktemp("clip")
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    transformers.CLIPTokenizerFast(
        vocab={word: n for n, word in enumerate(words)}, merges=[]
    ).save_pretrained(folder)
    tower = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    config = transformers.CLIPConfig(
        text_config={
            **tower,
            "vocab_size": len(words),
            "max_position_embeddings": 40,
            "bos_token_id": len(words) - 2,
            "eos_token_id": len(words) - 1,
        },
        vision_config={**tower, "image_size": 32, "patch_size": 8},
        projection_dim=24,
    )
    torch.manual_seed(0)
    transformers.CLIPModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def two_ranks():
    """A `TwoRanks`, of this file alone: a test that fails may leave the ranks out of step."""
    from helpers.two_ranks import TwoRanks

    ranks = TwoRanks()
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def ray_session(s3):  # after s3: Ray's processes inherit its address
    from glide_ray.distributed.cluster import connect, disconnect

    connect(6)
    yield
    disconnect()


@pytest.fixture(scope="session")
def s3_proxy():
    """A proxy for S3 requests that can inject faults; `s3` starts the server behind it."""
    proxy = Proxy(free_port())
    yield proxy
    proxy.shutdown()
    proxy.server_close()


@pytest.fixture
def s3_faults(s3, s3_proxy):
    """Faults to inject into S3 requests; cleared at the end of the test."""
    from glide_ray import storage

    s3_proxy.faults.clear()
    yield s3_proxy.faults
    s3_proxy.faults.clear()
    # A client that received 503 answers sends requests slowly for a while.
    storage.client.cache_clear()


@pytest.fixture(scope="session")
def s3(tmp_path_factory, s3_proxy):
    """moto's S3 server in its own process, behind a proxy; yields the URL of a bucket.

    Credentials and endpoint are set in the environment.
    """
    port = s3_proxy.upstream
    server = subprocess.Popen(
        [
            os.path.join(os.path.dirname(sys.executable), "moto_server"),
            "-H",
            "127.0.0.1",
            "-p",
            str(port),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    environment = {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{s3_proxy.server_port}",
        "GLIDE_CACHE": str(tmp_path_factory.mktemp("cache")),
    }
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    import boto3

    from glide_ray import storage

    storage.client.cache_clear()
    deadline = time.monotonic() + 120
    while not answers(port):
        assert server.poll() is None and time.monotonic() < deadline, "the S3 server did not start"
        time.sleep(0.1)
    boto3.client("s3").create_bucket(Bucket="corpus")
    yield "s3://corpus"
    server.terminate()
    server.wait(10)
    for name, value in before.items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})
    storage.client.cache_clear()
