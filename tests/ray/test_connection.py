"""Joining and starting Ray: dead addresses, tokens, and Ray's messages on the terminal."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.paths import ROOT
from helpers.processes import python
from PIL import Image

from glide_ray.bench.load_generator import free_port
from glide_ray.distributed import cluster
from glide_ray.distributed.curation.corpus import survey
from glide_ray.errors import UserError

ANSWER_SECONDS, SENTENCE_SECONDS = 2, 7
COMMANDS = {
    "glide": ("-m", "glide_ray", "corpus", "--survey", "."),
    "job": (ROOT / "jobs" / "filter.py", ".", "--out", "../out"),
}


@pytest.mark.parametrize("scheme", ["", "ray://"])
@pytest.mark.parametrize("listening", [False, True])
def test_a_dead_address_is_refused_within_seconds(scheme, listening, monkeypatch):
    """Where nobody listens, and where a program listens that is not Ray and never answers."""
    assert cluster.ANSWER_SECONDS <= 10  # less here, as three of the four wait for all of it
    monkeypatch.setattr(cluster, "ANSWER_SECONDS", ANSWER_SECONDS)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"{scheme}127.0.0.1:{server.getsockname()[1] if listening else free_port()}"
        began = time.monotonic()
        with pytest.raises(UserError, match=f"No Ray cluster answers at RAY_ADDRESS={address}; "):
            cluster.check_address(address)
    assert time.monotonic() - began < SENTENCE_SECONDS


@pytest.mark.parametrize("command", COMMANDS)
def test_a_dead_ray_address_is_one_sentence_of_commands_and_jobs(tmp_path, command):
    Image.new("RGB", (70, 70)).save(tmp_path / "one.png")
    (tmp_path / "one.txt").write_text("a picture")
    address = f"127.0.0.1:{free_port()}"
    done = python(*COMMANDS[command], cwd=tmp_path, RAY_ADDRESS=address)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.count("\n") == 1
    assert f"No Ray cluster answers at RAY_ADDRESS={address}; " in done.stderr


def test_a_ray_that_does_not_start_is_one_sentence(tmp_path):
    (tmp_path / "start.py").write_text(
        "from glide_ray.distributed.cluster import connect\n"
        "from glide_ray.errors import UserError\n"
        "try:\n    connect(1)\nexcept UserError as error:\n    print(error)\n"
    )
    done = python("start.py", cwd=tmp_path, RAY_TMPDIR=str(tmp_path / ("long" * 30)))
    assert done.stdout.startswith("Ray does not start on this machine (") and not done.stderr
    assert done.stdout.count("\n") == 1 and "glide doctor" in done.stdout


@pytest.fixture(scope="module", params=["disabled", "token"])
def head(request, tmp_path_factory):
    """A Ray head: its RAY_AUTH_MODE, its address, and a home folder with a token."""
    folder = tmp_path_factory.mktemp("head")
    (folder / ".ray").mkdir()
    (folder / ".ray" / "auth_token").write_text("ab" * 32)
    port = free_port()
    temporary = f"/tmp/glide-head-{port}"  # short: Ray's sockets are in it
    ray = Path(sys.executable).parent / "ray"
    head = subprocess.Popen(
        f"{ray} start --head --block --port={port} --num-cpus=1 --include-dashboard=false "
        f"--ray-client-server-port={free_port()} --object-store-memory=80000000 "
        f"--disable-usage-stats --temp-dir={temporary}".split(),
        env={**os.environ, "HOME": str(folder), "RAY_AUTH_MODE": request.param},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    address = next(
        match.group(1) for line in head.stdout if (match := re.search(r"--address='(.+?)'", line))
    )
    yield request.param, address, folder
    head.terminate()
    head.wait(60)
    shutil.rmtree(temporary, ignore_errors=True)


JOIN = """
from glide_ray.distributed.cluster import connect, disconnect
from glide_ray.errors import UserError
try:
    connect(1)
    import ray
    @ray.remote
    class Counter:
        def count(self):
            return 1
    print(ray.get(Counter.remote().count.remote()))
    disconnect()
except UserError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_driver_uses_a_token_where_the_head_wants_one_and_only_there(head, tmp_path):
    mode, address, home = head
    (tmp_path / "join.py").write_text(JOIN)
    done = python("join.py", cwd=tmp_path, RAY_ADDRESS=address, HOME=str(home))
    assert done.stdout == "1\n" and not done.stderr
    if mode == "token":
        refused = python("join.py", cwd=tmp_path, RAY_ADDRESS=address, HOME=str(tmp_path))
        problem = "wants its token; "
    else:
        environment = {"RAY_ADDRESS": address, "HOME": str(home), "RAY_AUTH_MODE": "token"}
        refused = python("join.py", cwd=tmp_path, **environment)
        problem = "has no token, "
    sentence = rf"The cluster at RAY_ADDRESS=\S+ {problem}.*\n"
    assert re.fullmatch(sentence, refused.stdout) and not refused.stderr


NOISE = """
import os, sys
from glide_ray.distributed.noise import keep_off_terminal
from ray._private.worker import print_to_stdstream
keep_off_terminal()
keep_off_terminal()
os.write(2, b"[2026 E 1 1] core_worker.cc:2465: Actor with class name: 'MapWorker(x)' and ID: '1' "
    b"has constructor arguments in the object store and max_restarts > 0. If\\n")
os.write(2, b"[2026 E 1 1] core_worker.cc:9: the disk is full\\n")
def say(line):
    print_to_stdstream({"lines": [line], "pid": "raylet", "is_err": False}, ignore_prefix=False)
say("Task ServeController.graceful_shutdown failed. There are infinite retries remaining, so the "
    "task will be retried. Error: the actor died")
say("a worker was killed: out of memory")
print("from Python", file=sys.stderr)
print("result", flush=True)
os.write(2, b"the last words of the core")
if len(sys.argv) > 1: os.abort()
"""


@pytest.mark.parametrize("end", [[], ["abort"]])
def test_rays_noise_stays_off_the_terminal_and_its_errors_do_not(tmp_path, end):
    (tmp_path / "noise.py").write_text(NOISE)
    done = python("noise.py", *end, cwd=tmp_path)
    assert done.stdout == "result\n"
    assert "constructor arguments" not in done.stderr and "infinite retries" not in done.stderr
    for text in ("the disk is full", "out of memory", "from Python", "the last words of the core"):
        assert text in done.stderr


@pytest.mark.usefixtures("ray_session")
def test_a_relative_path_is_that_of_the_command_and_not_of_the_workers(drawn_corpus, monkeypatch):
    monkeypatch.chdir(drawn_corpus)
    assert survey("held_out", 16).rows.kept == 16
