"""The autoscaler on nodes shaped as a cluster file says, each a raylet of this machine: data, training and serving ask in turn, then no one does.

`test_autoscaling.py` starts the head and runs the rest in a process of its own, which writes as JSON what nodes each of them was given.
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
from conftest import ROOT, tiny

from glide_ray.bench.load_generator import free_port

HEAD, HEAD_ID = (
    "ray.head.default",
    "f" * 51 + "00000",
)  # as Ray's provider of fake nodes calls the head
IDLE_SECONDS, PATIENCE, LIMIT = 6, 60, 200
OBJECT_STORE = 100 * 2**20


# -- the cluster ------------------------------------------------------------------------------------------------------


def serving():
    """The scales of the stages that the cluster's sizes name."""
    sizes = yaml.safe_load((Path(ROOT) / "cluster" / "sizes.yaml").read_text())
    return {name: scale for name, scale in sizes["serving"].items() if name.endswith("_scale")}


def fake(path, address):
    """The config of a cluster file with raylets of this machine for machines: types, resources, labels and bounds are the file's."""
    cluster, types = yaml.safe_load(Path(path).read_text()), {}
    for name, kind in cluster["available_node_types"].items():
        # Raylets of one machine want small object stores, and fake ones are told of no other memory. For the autoscaler's choice, in which what a
        # type has and nobody asks for counts, the one stands for the other: on a cloud each type has its memory.
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
    # The provider by its class: under the name of fake_multinode it wants an example file that the wheel lacks.
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


class Cluster:
    """A head, and whatever its autoscaler adds; all of it ends with the context. `environment`: of a process that joins it."""

    def __init__(self, path):
        from glide_ray.distributed import cluster as local

        self.folder = Path(tempfile.mkdtemp(prefix="glide-ray-"))  # short: sockets lie in it
        port, config = free_port(), self.folder / "config.yaml"
        made = fake(path, f"127.0.0.1:{port}")
        config.write_text(yaml.safe_dump(made))
        head = dict(made["available_node_types"][HEAD]["resources"])
        self.environment = (
            {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
            | local._worker_environment()
            | {
                "RAY_ADDRESS": f"127.0.0.1:{port}",
                "RAY_AUTH_MODE": "token",
                "RAY_AUTH_TOKEN": secrets.token_hex(32),
                "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            }
        )  # Ray's switch between a node's address as others see it, and the loopback's
        own = {
            "RAY_FAKE_CLUSTER": "1",
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "AUTOSCALER_METRIC_PORT": "0",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
            "RAY_NODE_TYPE_NAME": HEAD,
        }  # as `ray up` sets them
        command = [
            shutil.which("ray", path=self.environment["PATH"]),
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
                said = self.log()
                self.__exit__()
                raise AssertionError(f"the head did not start\n{said}")
            time.sleep(0.2)
        return self

    def log(self):
        """What the head and its autoscaler have to say, the end of it."""
        files = [
            self.folder / "start.log",
            *sorted(self.folder.glob("session_latest/logs/monitor.*")),
        ]
        return "\n".join(
            f"-- {file.name}\n{file.read_text()[-5000:]}" for file in files if file.exists()
        )

    def __exit__(self, *_):
        below = (
            psutil.Process(self._head.pid).children(recursive=True)
            if self._head.poll() is None
            else []
        )  # the autoscaler's raylets among them
        for process in (self._head, *below):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._head.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _said(self):
        return (self.folder / "start.log").read_text()


# -- requests --------------------------------------------------------------------------------------


class Watch:
    """The nodes that there are beside the head, and those that ever were."""

    def __init__(self):
        self.ever = {}

    def nodes(self):
        """How many there are of each type; None while some are on their way."""
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
        """Look until `done(nodes)`."""
        deadline, nodes = time.monotonic() + PATIENCE, None
        while (nodes := self.nodes()) is None or not done(nodes):
            if time.monotonic() > deadline:
                raise SystemExit(
                    f"{what}: not in {PATIENCE} s; nodes now {nodes}, ever {self.ever}"
                )
            time.sleep(0.3)
        return nodes

    def came(self, what, future, fulfilled):
        """The nodes that come while a demand is met."""
        began, before = time.monotonic(), set(self.ever)
        self.until(lambda _: future.done() or fulfilled(), f"what {what} asks for")
        if future.done():
            future.result()
        new = Counter(name for node, name in self.ever.items() if node not in before)
        print(f"{what}: {dict(new)} in {time.monotonic() - began:.1f} s", flush=True)
        return new


class Placed:
    """In Ray Train's place: the placement group that it makes for its workers, held until `release`. Workers would be so many processes with torch."""

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
    """Each asks for more than the nodes have that are there, so that its own have to come."""
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
    connect(
        0
    )  # while the head is the only node: a driver that hangs on another one would go with it
    watch, pool, came = Watch(), ThreadPoolExecutor(), {}
    watch.until(lambda nodes: nodes == least, "the least of each type")

    cpus = types[HEAD]["resources"].get("CPU", 0)
    busy = placement_group([{"CPU": cpus}]) if cpus else None
    surveyed = pool.submit(survey, f"{corpus}/train", 16)
    came["data"] = watch.came("data", surveyed, lambda: False)
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
        lambda: training._fit(
            preset, "nowhere", None, None, None, training._wait_for_workers(preset)
        )
    )
    came["training"] = watch.came("training", trained, Placed.done.is_set)

    serve.start(
        proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": free_port()}
    )  # a proxy on each node would want one port
    config = ServeConfig(base=base, upsampler=upsampler, **serving())
    came["serving"] = watch.came(
        "serving", pool.submit(lambda: deploy(build_application(config))), lambda: False
    )

    serve.delete(APP)
    Placed.release.set()
    trained.result()
    began = time.monotonic()
    came["after"] = watch.until(
        lambda nodes: nodes == least, f"back to the least of each type, {dict(least)}"
    )
    print(f"idle ones gone in {time.monotonic() - began:.1f} s", flush=True)
    Path(out).write_text(json.dumps(came))


if __name__ == "__main__":
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    try:
        main(*sys.argv[1:])
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)  # Ray's own farewells to nodes that are gone take a minute
