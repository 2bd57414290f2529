"""The autoscaler on fake nodes of the types in `ray-cluster.yaml`.

Data, training and serving must each bring up nodes of their own kind, and idle nodes must go away.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers import autoscaling_run
from helpers.paths import ROOT
from helpers.processes import python_path

pytestmark = pytest.mark.slow
CONFIG = Path(ROOT) / "ray-cluster.yaml"


@pytest.fixture(scope="module")
def added_nodes(drawn_corpus, tiny_weights, tmp_path_factory):
    """The nodes that each part brought up, and those left at the end.

    Returns {"data": {type: count}, "training": ..., "serving": ..., "after": ...}.
    """
    out = tmp_path_factory.mktemp("autoscaling") / "story.json"
    arguments = [CONFIG, drawn_corpus, tiny_weights["base"], tiny_weights["upsampler"], out]
    with autoscaling_run.FakeCluster(CONFIG) as cluster:
        done = subprocess.run(
            [sys.executable, "-m", autoscaling_run.__name__, *map(str, arguments)],
            env=cluster.environment | {"PYTHONPATH": python_path()},
            capture_output=True,
            text=True,
            timeout=autoscaling_run.LIMIT + 60,
            check=False,
        )
        assert done.returncode == 0, f"{done.stdout}{done.stderr}\n{cluster.log()}"
    print(done.stdout)
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def types():
    """The cluster file's entries for all node types except the head's."""
    cluster = yaml.safe_load(CONFIG.read_text())
    return {
        name: kind
        for name, kind in cluster["available_node_types"].items()
        if name != cluster["head_node_type"]
    }


def gpus(nodes, types):
    """Number of GPUs of each node."""
    return [
        types[name]["resources"].get("GPU", 0)
        for name, count in nodes.items()
        for _ in range(count)
    ]


def test_data_tasks_that_do_not_fit_on_the_head_add_a_node_without_gpus(added_nodes, types):
    assert gpus(added_nodes["data"], types) == [0]


def test_a_full_set_of_training_workers_adds_exactly_one_training_node(added_nodes, types):
    assert gpus(added_nodes["training"], types) == [
        max(kind["resources"].get("GPU", 0) for kind in types.values())
    ]


def test_training_nodes_of_higher_priority_are_preferred(added_nodes, types):
    most = max(kind["resources"].get("GPU", 0) for kind in types.values())
    alike = [name for name, kind in types.items() if kind["resources"].get("GPU", 0) == most]
    assert (
        list(added_nodes["training"])
        == [max(alike, key=lambda name: types[name].get("priority", 0))]
        and len(alike) > 1
    )


def test_each_replica_adds_a_node_with_one_gpu_and_no_training_node(added_nodes, types):
    assert gpus(added_nodes["serving"], types) == [1] * sum(
        scale["min_replicas"] for scale in autoscaling_run.serving().values()
    )


def test_idle_nodes_are_removed_down_to_the_minimum_of_their_type(added_nodes, types):
    assert added_nodes["after"] == {
        name: kind["min_workers"] for name, kind in types.items() if kind.get("min_workers")
    }
