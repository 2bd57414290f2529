"""Shared fixtures: one Ray session, an S3 server, a small drawn corpus, tiny random models."""

import os
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # must be set before Triton is imported
from s3_proxy import Proxy

from glide_ray.bench.load_generator import free_port
from glide_ray.config import presets
from glide_ray.config.overrides import override
from glide_ray.data import emoji
from glide_ray.data.images import encode
from glide_ray.data.shards import Sample, write_shards
from glide_ray.models.clip import NoisedClip
from glide_ray.models.unet import GlideUNet
from glide_ray.models.weights import save_weights

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 170, 60),
    "blue": (40, 70, 220),
    "yellow": (240, 210, 40),
}
TINY_BASE = [
    "model.unet.image_size=16",
    "model.unet.channels=16",
    "model.unet.multipliers=1,2",
    "model.unet.attention_sizes=8",
    "model.unet.head_channels=16",
    "model.unet.text.width=16",
    "model.unet.text.layers=1",
    "model.unet.text.heads=1",
]
TINY_UPSAMPLER = [
    *TINY_BASE,
    "model.unet.image_size=64",
    "model.unet.low_res_size=16",
    "model.unet.attention_sizes=",
    "data.crop=none",
    "data.min_size=16",
]


def tiny(kind="base", *settings):
    """A preset whose model runs in milliseconds: 16 pixels, or 16 -> 64 for an upsampler."""
    return override(
        presets.get(f"nano-{kind}"), [*(TINY_BASE if kind == "base" else TINY_UPSAMPLER), *settings]
    )


TINY_CLIP = [
    "model.clip.image_size=16",
    "model.clip.patch_size=4",
    "model.clip.image_width=32",
    "model.clip.image_layers=2",
    "model.clip.image_heads=2",
    "model.clip.text_width=32",
    "model.clip.embedding=16",
    "data.min_size=16",
]


def tiny_clip(*settings):
    """A noised CLIP preset for images of 16 pixels."""
    return override(presets.get("nano-clip"), [*TINY_CLIP, *settings])


def random_model(unet, seed=0):
    """A model with random weights; fresh initialisation would make some of its outputs zero."""
    torch.manual_seed(seed)
    model = GlideUNet(unet).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def serving_weights(folder, seed=0):
    """Weights of a very thin cascade of the sizes in the API, 64 -> 256.

    Returns {"base": path, "upsampler": path}.
    """
    sizes = {
        "base": ["model.unet.image_size=64"],
        "upsampler": [
            "model.unet.image_size=256",
            "model.unet.low_res_size=64",
            "model.unet.multipliers=1,1,1,1,2",
            "model.sampling.respacing=4",
        ],
    }
    paths = {}
    for kind, settings in sizes.items():
        config = tiny(kind, *settings).model
        paths[kind] = str(folder / f"{kind}.safetensors")
        folder.mkdir(exist_ok=True)
        save_weights(paths[kind], random_model(config.unet, seed).state_dict(), config)
    return paths


def draw(colour, shape, size=64):
    image = Image.new("RGB", (size, size), (255, 255, 255))
    getattr(ImageDraw.Draw(image), shape)(
        (size // 5, size // 5, size * 4 // 5, size * 4 // 5), fill=COLOURS[colour]
    )
    return np.asarray(image)


def drawn_samples(count, size=64):
    for n in range(count):
        colour, shape = list(COLOURS)[n % 4], ("ellipse", "rectangle")[n // 4 % 2]
        yield Sample(
            f"{n:05d}",
            encode(draw(colour, shape, size)),
            "png",
            (f"a {colour} {shape}", colour),
            {"number": n},
        )


@pytest.fixture(scope="session")
def drawn_corpus(tmp_path_factory):
    """A corpus folder with train/ (96 drawings in 3 shards) and held_out/ (16 drawings)."""
    folder = tmp_path_factory.mktemp("corpus")
    write_shards(folder / "train", drawn_samples(96), per_shard=32)
    write_shards(folder / "held_out", drawn_samples(16))
    return folder


@pytest.fixture(scope="session")
def emoji_corpus(tmp_path_factory):
    """Two styles of the default corpus, from the real packages: its folder and its indices."""
    out = tmp_path_factory.mktemp("emoji")
    return out, emoji.build_corpus(out, styles=("3D render", "flat icon"))


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
    storage._client.cache_clear()


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

    storage._client.cache_clear()
    for _ in range(100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.1)
    boto3.client("s3").create_bucket(Bucket="corpus")
    yield "s3://corpus"
    server.terminate()
    server.wait(10)
    for name, value in before.items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})
    storage._client.cache_clear()
