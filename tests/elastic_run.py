"""A training run on three raylets of this machine: a node is lost, another comes, and a third is drained as clouds announce a preemption.

Run by `test_faults.py` in a process of its own, for it has a cluster of its own. Ends when the run has; times out by itself.
"""

import functools
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

STEPS = 300


def settings(corpus, *more):
    from conftest import tiny

    return tiny(
        "base",
        f"data.corpus={corpus}/train",
        f"data.held_out={corpus}/held_out",
        "data.min_size=16",
        "batch=6",
        f"steps={STEPS}",
        "log_every=1",
        f"evaluate_every={STEPS}",
        "checkpoint_every=10",
        "precision=fp32",
        "trackers=",
        *more,
    )


def main(corpus, out):
    from ray.cluster_utils import Cluster
    from ray.train.torch import TorchConfig

    from glide_ray.distributed import cluster as local
    from glide_ray.distributed.training import run as training

    os.environ.update(
        {
            **local._worker_environment(),
            "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "8",
            "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
        }
    )
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 3,
            "include_dashboard": False,
            "object_store_memory": 150 * 2**20,
        },
    )
    os.environ["RAY_ADDRESS"] = cluster.address
    local.connect(
        0
    )  # while the head is the only node: a driver that hangs on another one would go with it

    def add_node():
        return cluster.add_node(num_cpus=1, num_gpus=1, object_store_memory=100 * 2**20)

    # Nodes say that each has a GPU, so that workers go there and the data stream to the head. There is none, and so they speak gloo.
    training.TorchConfig, training.RESIZE_SECONDS = (
        functools.partial(TorchConfig, backend="gloo"),
        2,
    )
    nodes = [add_node(), add_node()]
    run = threading.Thread(
        target=training.train,
        args=(settings(corpus, "workers=2", "min_workers=1"), out, False),
        daemon=True,
    )
    run.start()

    def wait_for(words):
        deadline = time.monotonic() + 90
        while words not in read(Path(out) / "events.log"):
            if time.monotonic() > deadline:
                sys.exit(f"no {words!r} in: {read(Path(out) / 'events.log')}")
            time.sleep(0.2)

    def wait_for_step(step):
        while f'"step": {step},' not in read(Path(out) / "metrics.jsonl") and run.is_alive():
            time.sleep(0.1)

    wait_for_step(7)
    cluster.remove_node(nodes[0], allow_graceful=False)
    wait_for("goes on with 1 worker from")
    add_node()  # by the main thread: a node's processes go with the thread that began them
    wait_for("goes on with 2 workers from")
    drain = [
        str(Path(sys.executable).parent / "ray"),
        "drain-node",
        "--address",
        cluster.address,
        "--node-id",
        nodes[1].node_id,
        "--reason",
        "DRAIN_NODE_REASON_PREEMPTION",
        "--reason-message",
        "spot",
        "--deadline-remaining-seconds",
        "60",
    ]
    subprocess.run(drain, check=True, capture_output=True)
    wait_for("about to be taken away")
    run.join(240)
    os._exit(int(run.is_alive()))  # Ray's own farewells to nodes that are gone take a minute


def read(path):
    return path.read_text() if path.exists() else ""


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main(*sys.argv[1:])
