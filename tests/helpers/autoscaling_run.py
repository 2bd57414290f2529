"""Run the autoscaler on fake nodes while data, training and serving request resources in turn.

The node types are those of a cluster file, and each node is a raylet on this machine. At the end
nothing is requested, and the idle nodes must go away. `test_autoscaling.py` starts the head node
and runs this script in its own process; the script writes the nodes that each part received as
JSON.
"""

import faulthandler
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import psutil
import yaml

from glide_ray.bench.load_generator import free_port
from helpers.paths import ROOT
from helpers.processes import without_ray
from helpers.tiny import tiny

# The names that Ray's provider of fake nodes uses for the head.
HEAD, HEAD_ID = "ray.head.default", "f" * 51 + "00000"
IDLE_SECONDS, PATIENCE, LIMIT = 6, 120, 400
OBJECT_STORE = 100 * 2**20


# -- cluster --------------------------------------------------------------------------------------


def serving():
    """The `*_scale` settings of the serving section of `cluster/sizes.yaml`."""
    sizes = yaml.safe_load((Path(ROOT) / "cluster" / "sizes.yaml").read_text())
    return {name: scale for name, scale in sizes["serving"].items() if name.endswith("_scale")}


def fake(path, address):
    """Autoscaler config of a cluster file, with raylets on this machine in place of machines.

    Node types, resources, labels and worker limits are those of the file.
    """
    cluster, types = yaml.safe_load(Path(path).read_text()), {}
    for name, kind in cluster["available_node_types"].items():
        # Object store memory replaces all other memory resources: raylets that share a machine
        # need small object stores, and fake nodes report no other memory. The autoscaler's choice
        # depends on resources that a type has and nobody requests; on a cloud, memory is one.
        resources = {
            key: value for key, value in kind["resources"].items() if "memory" not in key
        } | {"object_store_memory": OBJECT_STORE}
        bounds = {
            key: kind[key]
            for key in ("min_workers", "max_workers", "priority", "labels")
            if key in kind
        }
        types[HEAD if name == cluster["head_node_type"] else name] = {
            **bounds,
            "resources": resources,
            "node_config": {},
        }
    commands = [
        f"{when}_commands"
        for when in (
            "initialization",
            "setup",
            "head_setup",
            "worker_setup",
            "head_start_ray",
            "worker_start_ray",
        )
    ]
    # The provider by class name: the type "fake_multinode" needs an example file that the wheel
    # does not contain.
    return {
        "cluster_name": "fake",
        "max_workers": cluster["max_workers"],
        "idle_timeout_minutes": IDLE_SECONDS / 60,
        "head_node_type": HEAD,
        "available_node_types": types,
        **dict.fromkeys(commands, []),
        "file_mounts": {},
        "cluster_synced_files": [],
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": address,
            "head_node_id": HEAD_ID,
            "launch_multiple": True,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
    }


class FakeCluster:
    """A head node and the nodes that its autoscaler adds; leaving the context ends all of them.

    `environment` is for processes that connect to the cluster.
    """

    def __init__(self, path):
        from glide_ray.distributed import cluster as local

        # A short path, because it contains Unix sockets.
        self.folder = Path(tempfile.mkdtemp(prefix="glide-ray-"))
        port, config = free_port(), self.folder / "config.yaml"
        made = fake(path, f"127.0.0.1:{port}")
        config.write_text(yaml.safe_dump(made))
        head = dict(made["available_node_types"][HEAD]["resources"])
        self.environment = (
            without_ray()
            | local._worker_environment()
            | {
                "RAY_ADDRESS": f"127.0.0.1:{port}",
                "RAY_AUTH_MODE": "token",
                "RAY_AUTH_TOKEN": secrets.token_hex(32),
                # Makes Ray use the node's external address instead of the loopback address.
                "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            }
        )
        # As `ray up` sets them.
        own = {
            "RAY_FAKE_CLUSTER": "1",
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "AUTOSCALER_METRIC_PORT": "0",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
            "RAY_NODE_TYPE_NAME": HEAD,
        }
        command = [
            shutil.which("ray", path=self.environment["PATH"]) or "ray",
            "start",
            "--head",
            "--block",
            "--node-ip-address=127.0.0.1",
            f"--port={port}",
            f"--temp-dir={self.folder}",
            f"--autoscaling-config={config}",
            "--include-dashboard=false",
            "--dashboard-agent-listen-port=0",
            f"--ray-client-server-port={free_port()}",
            "--min-worker-port=0",
            "--max-worker-port=0",
            "--disable-usage-stats",
            f"--num-cpus={head.pop('CPU', 0)}",
            f"--num-gpus={head.pop('GPU', 0)}",
            f"--object-store-memory={head.pop('object_store_memory')}",
            f"--resources={json.dumps(head)}",
        ]
        environment = {
            name: value for name, value in self.environment.items() if name != "RAY_ADDRESS"
        }
        with open(self.folder / "start.log", "w") as log:
            self._head = subprocess.Popen(
                command, env=environment | own, stdout=log, stderr=subprocess.STDOUT
            )

    def __enter__(self):
        deadline = time.monotonic() + PATIENCE
        while "--block" not in self._said():
            if time.monotonic() > deadline or self._head.poll() is not None:
                log_text = self.log()
                self.__exit__()
                raise AssertionError(f"the head did not start\n{log_text}")
            time.sleep(0.2)
        return self

    def log(self):
        """The last 5000 characters of each log file of the head and its autoscaler."""
        files = [
            self.folder / "start.log",
            *sorted(self.folder.glob("session_latest/logs/monitor.*")),
        ]
        return "\n".join(
            f"-- {file.name}\n{file.read_text()[-5000:]}" for file in files if file.exists()
        )

    def __exit__(self, *_):
        # Includes the raylets that the autoscaler started.
        below = (
            psutil.Process(self._head.pid).children(recursive=True)
            if self._head.poll() is None
            else []
        )
        for process in (self._head, *below):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._head.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _said(self):
        return (self.folder / "start.log").read_text()


# -- requests --------------------------------------------------------------------------------------


class Watch:
    """The current worker nodes, and all worker nodes seen so far (`ever`)."""

    def __init__(self):
        self.ever = {}

    def nodes(self):
        """Number of worker nodes of each type; None while nodes are pending."""
        from ray.autoscaler.v2.sdk import get_cluster_status

        status = get_cluster_status(os.environ["RAY_ADDRESS"])
        running = [
            node
            for node in status.active_nodes + status.idle_nodes
            if node.ray_node_type_name != HEAD
        ]
        self.ever.update({node.node_id: node.ray_node_type_name for node in running})
        return (
            None
            if status.pending_nodes or status.pending_launches
            else Counter(node.ray_node_type_name for node in running)
        )

    def until(self, done, what):
        """Poll until `done(nodes)`; exits after PATIENCE seconds."""
        deadline, nodes = time.monotonic() + PATIENCE, None
        while (nodes := self.nodes()) is None or not done(nodes):
            if time.monotonic() > deadline:
                raise SystemExit(
                    f"{what}: not in {PATIENCE} s; nodes now {nodes}, ever {self.ever}"
                )
            time.sleep(0.3)
        return nodes

    def nodes_added(self, what, future, fulfilled):
        """Number of new nodes of each type until the request is met.

        The request is met when `future` is done or `fulfilled()` holds.
        """
        began, before = time.monotonic(), set(self.ever)
        self.until(lambda _: future.done() or fulfilled(), f"what {what} asks for")
        if future.done():
            future.result()
        new = Counter(name for node, name in self.ever.items() if node not in before)
        print(f"{what}: {dict(new)} in {time.monotonic() - began:.1f} s", flush=True)
        return new


class Placed:
    """Replacement for Ray Train's Trainer: creates only the placement group of its workers.

    Holds the group until `release` is set. Real workers would each be a process with torch.
    """

    done, release = threading.Event(), threading.Event()

    def __init__(self, *_, scaling_config, **__):
        self._scaling = scaling_config

    def fit(self):
        from ray.util.placement_group import placement_group, remove_placement_group

        scaling, count = self._scaling, self._scaling.max_workers
        group = placement_group(
            [dict(scaling._resources_per_worker_not_none) for _ in range(count)],
            scaling.placement_strategy,
            bundle_label_selector=scaling._label_selector_per_worker(count),
        )
        assert group.wait(PATIENCE), "the training workers were not placed"
        self.done.set()
        self.release.wait()
        remove_placement_group(group)


def main(path, corpus, base, upsampler, out):
    """Run data, training and serving; each requests more than the existing nodes provide."""
    from ray import serve
    from ray.util.placement_group import placement_group, remove_placement_group

    from glide_ray.config.serving import ServeConfig
    from glide_ray.distributed.cluster import connect
    from glide_ray.distributed.curation.corpus import survey
    from glide_ray.distributed.training import run as training
    from glide_ray.serving.deployment import APP, build_application, deploy

    types = fake(path, os.environ["RAY_ADDRESS"])["available_node_types"]
    least = Counter(
        {name: kind["min_workers"] for name, kind in types.items() if kind.get("min_workers")}
    )
    # Connect while the head is the only node: a driver attached to another node would die with it.
    connect(0)
    watch, pool, added = Watch(), ThreadPoolExecutor(), {}
    watch.until(lambda nodes: nodes == least, "the least of each type")

    cpus = types[HEAD]["resources"].get("CPU", 0)
    busy = placement_group([{"CPU": cpus}]) if cpus else None
    surveyed = pool.submit(survey, f"{corpus}/train", 16)
    added["data"] = watch.nodes_added("data", surveyed, lambda: False)
    assert surveyed.result().rows.kept == 96
    if busy is not None:
        remove_placement_group(busy)

    preset = tiny(
        "base",
        f"workers={max(kind['resources'].get('GPU', 0) for kind in types.values())}",
        "device=gpu",
        f"wait_seconds={PATIENCE}",
    )
    training.Trainer = Placed
    trained = pool.submit(
        lambda: training._trainer(
            preset, "nowhere", None, None, None, training._wait_for_workers(preset)
        ).fit()
    )
    added["training"] = watch.nodes_added("training", trained, Placed.done.is_set)

    # Only on the head: the proxies of all nodes would use the same port.
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": free_port()})
    config = ServeConfig(base=base, upsampler=upsampler, **serving())
    added["serving"] = watch.nodes_added(
        "serving", pool.submit(lambda: deploy(build_application(config))), lambda: False
    )

    serve.delete(APP)
    Placed.release.set()
    trained.result()
    began = time.monotonic()
    added["after"] = watch.until(
        lambda nodes: nodes == least, f"back to the least of each type, {dict(least)}"
    )
    print(f"idle ones gone in {time.monotonic() - began:.1f} s", flush=True)
    Path(out).write_text(json.dumps(added))


if __name__ == "__main__":
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    try:
        main(*sys.argv[1:])
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    # Skip Ray's shutdown, which waits about a minute for nodes that are gone.
    os._exit(0)
