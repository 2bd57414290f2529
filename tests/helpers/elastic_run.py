"""A training run on three raylets of this machine that loses, gains and drains a node.

One node is killed, another is added, and a third is drained as clouds do before a preemption.
`test_faults.py` runs this script in its own process, because it has its own cluster. It ends with
the training run and has its own time limits.
"""

import functools
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from helpers.tiny import tiny

ELASTIC_STEPS = 300


def settings(corpus, *more):
    return tiny(
        "base",
        f"data.corpus={corpus}/train",
        f"data.held_out={corpus}/held_out",
        "data.min_size=16",
        "batch=6",
        "micro_batch=6",  # or every start plans its memory
        f"steps={ELASTIC_STEPS}",
        "log_every=1",
        f"evaluate_every={ELASTIC_STEPS}",
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
    # Connect while the head is the only node: a driver attached to another node would die with it.
    local.connect(0)

    def add_node():
        return cluster.add_node(num_cpus=1, num_gpus=1, object_store_memory=100 * 2**20)

    # Worker nodes declare a GPU so that the training workers are placed there and the data stream
    # on the head. There is no real GPU, hence the gloo backend.
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
    wait_for("resumes with 1 worker from")
    # On the main thread: a node's processes end with the thread that started them.
    add_node()
    wait_for("resumes with 2 workers from")
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
    wait_for("about to be removed")
    run.join(240)
    # Skip Ray's shutdown, which waits about a minute for nodes that are gone.
    os._exit(int(run.is_alive()))


def read(path):
    return path.read_text() if path.exists() else ""


if __name__ == "__main__":
    main(*sys.argv[1:])
