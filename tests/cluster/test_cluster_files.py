"""The cluster files: rendered from one file of sizes, accepted by Ray, Kubernetes and AWS.

Validity is checked as far as possible without those services; capacities must suffice.
"""

import ast
import gzip
import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import boto3
import jsonschema
import kubernetes_validate
import moto
import prometheus_client.parser
import pytest
import ray
import yaml
from helpers.paths import ROOT
from moto.core.authorization import enable_iam_authentication
from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE
from ray.autoscaler._private.aws import utils as ray_aws
from ray.autoscaler._private.aws.config import bootstrap_aws
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.serve.schema import ServeDeploySchema

from glide_ray import storage
from glide_ray.config import presets
from glide_ray.config.overrides import override, validate
from glide_ray.config.serving import ServeConfig
from glide_ray.sampling.engine import Load
from glide_ray.serving.metrics import Metrics, StageLoad, exposition

CLUSTER = Path(ROOT, "cluster")
render = runpy.run_path(str(CLUSTER / "render.py"))
SIZES = render["read_sizes"](CLUSTER / "sizes.yaml")
JOBS = {
    path.stem.removeprefix("rayjob-"): yaml.safe_load(path.read_text())
    for path in sorted(CLUSTER.glob("kubernetes/rayjob-*.yaml"))
}
SERVICE = yaml.safe_load((CLUSTER / "kubernetes/rayservice.yaml").read_text())
MANIFESTS = [
    *JOBS.values(),
    SERVICE,
    yaml.safe_load((CLUSTER / "kubernetes/raycluster.yaml").read_text()),
]
RAY_UP = yaml.safe_load(Path(ROOT, "ray-cluster.yaml").read_text())
PYPROJECT = Path(ROOT, "pyproject.toml").read_text()


def manifest_name(manifest):
    return manifest["metadata"]["name"]


def actions(policy):
    return {
        action
        for statement in json.loads((CLUSTER / "aws" / policy).read_text())["Statement"]
        for action in (
            [statement["Action"]] if isinstance(statement["Action"], str) else statement["Action"]
        )
    }


# -- rendering -------------------------------------------------------------------------------------


def test_the_committed_files_are_rendered_from_the_sizes():
    stale = [
        name
        for name, text in render["rendered"](SIZES).items()
        if not Path(ROOT, name).is_file() or Path(ROOT, name).read_text() != text
    ]
    assert not stale, "run cluster/render.py"


@pytest.mark.parametrize(
    "settings",
    [
        ["bucket=other-bucket", "region=eu-west-1"],
        ["bucket=other-bucket", "image=REGISTRY/glide-ray:0.2.0"],
    ],
)
def test_settings_on_the_command_line_override_the_files(tmp_path, settings):
    command = [
        sys.executable,
        str(CLUSTER / "render.py"),
        "--out",
        str(tmp_path),
        *(part for setting in settings for part in ("--set", setting)),
    ]
    subprocess.run(command, check=True, capture_output=True)
    texts = {
        path.relative_to(tmp_path).as_posix(): path.read_text()
        for path in tmp_path.rglob("*.*")
        if path.is_file()
    }
    assert set(texts) == set(render["rendered"](SIZES))
    overrides = dict(setting.split("=") for setting in settings)
    for key, value in overrides.items():
        assert any(value in text for text in texts.values())
        assert not any(
            re.search(rf"(?<![\w/-]){getattr(SIZES, key)}\b", text) for text in texts.values()
        ), f"the old {key} is left"
    assert subprocess.run([*command, "--check"], capture_output=True).returncode == 0
    assert (
        subprocess.run(
            [*command, "--check", "--set", "nodes.data.max=3"], capture_output=True
        ).returncode
        == 1
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--set", "nodes.train.max=4"], "nodes.train have 32; raise nodes.train.max"),
        (["--set", "nodes.train.maxx=4"], "did you mean 'nodes.train.max'?"),
        (["--set", "training.preset=paper-bass"], "did you mean 'paper-base'?"),
        (["--set", "training.workers=60"], "train.batch 2048 is not divisible by train.workers 60"),
        (["--set", "serving.base_scale.gpus=none"], "has to say its gpus"),
        (["--set", "subnet=subnet-1"], "give both, or neither"),
        (["--set", "image=glide-ray"], "Setting image"),
        (["--set", "bucket"], "not of the form key=value"),
        (["--sizes", "nothing.yaml"], "nothing.yaml cannot be read: No such file"),
        (["--sizes", "{broken}"], "is not YAML, at line 2"),
        (["--out", "{broken}"], "give another folder with --out"),
    ],
)
def test_invalid_sizes_are_refused_in_one_sentence(tmp_path, capsys, arguments, message):
    (tmp_path / "broken.yaml").write_text("cluster: [\n}")
    assert (
        render["main"](
            [
                "--out",
                str(tmp_path / "out"),
                *(part.format(broken=tmp_path / "broken.yaml") for part in arguments),
            ]
        )
        == 2
    )
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_sizes_of_machines_agree_with_aws():
    known = json.loads(
        gzip.open(Path(moto.__file__).parent / "ec2/resources/instance_types.json.gz").read()
    )
    for name, node in SIZES.nodes:
        machine = known[node.machine]
        gpus = sum(kind["Count"] for kind in machine.get("GpuInfo", {}).get("Gpus", []))
        assert (node.cpus, node.memory_gib, node.gpus) == (
            machine["VCpuInfo"]["DefaultVCpus"],
            machine["MemoryInfo"]["SizeInMiB"] / 1024,
            gpus,
        ), name
        assert node.efa_interfaces <= machine["NetworkInfo"].get("EfaInfo", {}).get(
            "MaximumEfaInterfaces", 0
        )
        assert node.market == "on-demand" or "spot" in machine["SupportedUsageClasses"]


def test_versions_agree_with_the_project():
    ray_version = re.search(r'"ray\[data,train,serve\]==([\d.]+)"', PYPROJECT)[1]
    assert SIZES.ray == ray_version and all(
        cluster["rayVersion"] == ray_version for cluster in map(cluster_of, MANIFESTS)
    )
    assert f"ray=={ray_version}\n" in Path(ROOT, "constraints.txt").read_text()
    assert SIZES.image.endswith(":" + re.search(r'^version = "(.+)"', PYPROJECT, re.M)[1])


# -- ray up ----------------------------------------------------------------------------------------


def prepared():
    return prepare_config(yaml.safe_load(yaml.safe_dump(RAY_UP)))


def test_ray_accepts_the_ray_up_file():
    validate_config(prepared())
    for misspelled in ({"dockerr": {}}, {"head_node_type": "haed"}, {"max_workers": -1}):
        with pytest.raises((jsonschema.ValidationError, ValueError)):
            validate_config(prepared() | misspelled)


def test_nodes_have_this_checkout_and_require_the_token():
    folder = next(remote for remote, local in RAY_UP["file_mounts"].items() if local == ".")
    assert any(f"--editable '{folder}[" in command for command in RAY_UP["setup_commands"])
    options = RAY_UP["docker"]["run_options"]
    assert "-e RAY_AUTH_MODE=token" in options and f"-e PYTHONPATH={folder}" in options
    assert RAY_UP["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"
    assert "--dashboard-host=127.0.0.1" in RAY_UP["head_start_ray_commands"][-1]


@pytest.mark.parametrize(
    "refused, count, bundle, launched",
    [
        ([], 64, {"GPU": 1}, {"train-spot": 8}),
        (["train-spot"], 64, {"GPU": 1}, {"train": 8}),
        ([], 1, {"GPU": 1}, {"serve": 1}),
        ([], 100, {"CPU": 1}, {"data": 4}),
    ],
)
def test_rays_autoscaler_prefers_spot_and_falls_back_to_on_demand(refused, count, bundle, launched):
    config = AutoscalingConfig(prepared(), skip_content_hash=True)
    requests = ResourceRequestUtil.group_by_count([ResourceRequestUtil.make(bundle)] * count)
    reply = ResourceDemandScheduler(Mock()).schedule(
        SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=config.get_node_type_configs(),
            max_num_nodes=config.get_max_num_worker_nodes(),
            resource_requests=requests,
            recoverable_resource_availabilities=dict.fromkeys(refused, 0.0),
        )
    )
    assert {launch.instance_type: launch.count for launch in reply.to_launch} == launched
    assert not reply.infeasible_resource_requests


@pytest.fixture
def aws(monkeypatch, tmp_path):
    """A mocked AWS for calls in this process, with dummy credentials and an empty home folder."""
    for name, value in {
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "y",
        "AWS_DEFAULT_REGION": SIZES.region,
        "HOME": str(tmp_path),
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    forget = (storage.client, ray_aws.resource_cache, ray_aws.client_cache)
    with moto.mock_aws():
        for cache in forget:
            cache.cache_clear()
        monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
        yield
    for cache in forget:
        cache.cache_clear()


@pytest.mark.parametrize("efa", [False, True])
def test_ray_creates_and_terminates_every_node_type_with_the_heads_permissions(
    aws, efa, monkeypatch
):
    ec2 = boto3.client("ec2")
    subnet = next(
        each["SubnetId"]
        for each in ec2.describe_subnets()["Subnets"]
        if each["AvailabilityZone"] == f"{SIZES.region}{SIZES.zones[0]}"
    )
    group = ec2.describe_security_groups()["SecurityGroups"][0]["GroupId"]
    for role in ("head", "worker"):
        boto3.client("iam").create_instance_profile(InstanceProfileName=f"{SIZES.cluster}-{role}")
    own = [f"subnet={subnet}", f"security_group={group}"] if efa else []
    # An image ID, because moto does not have the AWS parameter that names the machine image.
    sizes = override(SIZES, ["machine_image=ami-12c6146b", *own])
    config = bootstrap_aws(
        prepare_config(yaml.safe_load(render["rendered"](sizes)["ray-cluster.yaml"]))
    )
    provider, called, launched = (
        AWSNodeProvider(config["provider"], config["cluster_name"]),
        set(),
        [],
    )

    def record_call(model, params, **_):
        called.add(f"ec2:{model.name}")
        launched.append(params["body"])

    for connection in (provider.ec2, provider.ec2_fail_fast):
        connection.meta.client.meta.events.register("before-call.ec2", record_call)
    for name, kind in config["available_node_types"].items():
        (node,) = provider.create_node(
            kind["node_config"],
            {"ray-node-kind": "worker", "ray-node-name": name, "ray-user-node-type": name},
            1,
        ).values()
        assert node.instance_type == kind["node_config"]["InstanceType"]
        assert node.instance_lifecycle == ("spot" if name in ("data", "train-spot") else None)
        assert {"Key": "ray-cluster-name", "Value": SIZES.cluster} in node.tags
    nodes = provider.non_terminated_nodes({})
    provider.set_node_tags(nodes[0], {"ray-node-status": "up-to-date"})
    provider.terminate_nodes(nodes)
    assert len(nodes) == 5 and provider.non_terminated_nodes({}) == []
    # The head's policy allows exactly the calls that are made.
    assert called == {action for action in actions("policy-head.json") if action.startswith("ec2:")}
    cards = {
        body.get(f"NetworkInterface.{n}.InterfaceType")
        for body in launched
        for n in range(1, 33)
        if body.get("InstanceType") == "p5.48xlarge"
    }
    assert cards == ({"efa", "efa-only"} if efa else {None})


# -- permissions -----------------------------------------------------------------------------------


def touch_storage(tmp_path):
    """Every S3 call of `storage`, including those for an interrupted multipart upload."""
    place = f"s3://{SIZES.bucket}/runs/x"
    storage.check_writable(place)
    storage.put(b"bytes", f"{place}/a.bin")
    (tmp_path / "large").write_bytes(bytes(9 * 2**20))
    storage.put(tmp_path / "large", f"{place}/b.bin")
    assert list(storage.list_files(place, (".bin",))) == [f"{place}/a.bin", f"{place}/b.bin"]
    assert (
        storage.read(f"{place}/a.bin") == b"bytes"
        and storage.size(f"{place}/b.bin") == 9 * 2**20
        and not storage.exists(f"{place}/c.bin")
    )
    storage.fetch(f"{place}/b.bin", tmp_path / "cache")
    storage.client().create_multipart_upload(Bucket=SIZES.bucket, Key="runs/x/broken")
    storage.remove_folder(place)
    assert not list(storage.list_files(place, (".bin",)))


@pytest.mark.parametrize("lacking", [None, *sorted(actions("policy-worker.json"))])
def test_a_workers_s3_permissions_are_exactly_those_the_project_needs(
    aws, monkeypatch, tmp_path, lacking
):
    policy = json.loads((CLUSTER / "aws/policy-worker.json").read_text())
    for statement in policy["Statement"]:
        statement["Action"] = [action for action in statement["Action"] if action != lacking] or [
            "s3:Nothing"
        ]
        # S3 asks each object whether it may be deleted, moto the bucket too.
        statement["Resource"] = [statement["Resource"], f"arn:aws:s3:::{SIZES.bucket}"]
    boto3.client("s3").create_bucket(Bucket=SIZES.bucket)
    boto3.client("s3").create_bucket(Bucket="another")
    iam = boto3.client("iam")
    iam.create_user(UserName="worker")
    iam.put_user_policy(UserName="worker", PolicyName="p", PolicyDocument=json.dumps(policy))
    key = iam.create_access_key(UserName="worker")["AccessKey"]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])
    # The default session has already read the other credentials.
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    with enable_iam_authentication():
        if lacking:
            with pytest.raises(storage.StorageError, match="AccessDenied|Forbidden"):
                touch_storage(tmp_path)
            return
        touch_storage(tmp_path)
        with pytest.raises(storage.StorageError, match="AccessDenied"):
            storage.put(b"bytes", "s3://another/a.bin")


def test_policies_allow_no_whole_service_and_only_nodes_of_this_cluster():
    for policy in ("policy-head.json", "policy-worker.json"):
        assert not [action for action in actions(policy) if "*" in action]
    statements = {
        statement["Sid"]: statement
        for statement in json.loads((CLUSTER / "aws/policy-head.json").read_text())["Statement"]
    }
    for sid, key in (
        ("TagAndEndNodesOfThisCluster", "aws:ResourceTag"),
        ("StartNodesOfThisClusterAndTheseMachines", "aws:RequestTag"),
    ):
        assert (
            statements[sid]["Condition"]["StringEquals"][f"{key}/ray-cluster-name"] == SIZES.cluster
        )
    profiles = {
        kind["node_config"]["IamInstanceProfile"]["Name"]
        for name, kind in RAY_UP["available_node_types"].items()
        if name != "head"
    }
    assert profiles == {statements["GiveThemTheWorkersRole"]["Resource"].rpartition("/")[2]}


# -- Kubernetes ------------------------------------------------------------------------------------


def strict(required, optional=()):
    return {
        "type": "object",
        "additionalProperties": False,
        "required": list(required),
        "properties": {**required, **dict(optional)},
    }


TEXT, WHOLE, COUNT = {"type": "string"}, {"type": "boolean"}, {"type": "integer", "minimum": 0}
PARAMS = {"type": "object", "additionalProperties": TEXT}
GROUP = strict(
    {
        "groupName": TEXT,
        "replicas": COUNT,
        "minReplicas": COUNT,
        "maxReplicas": COUNT,
        "rayStartParams": PARAMS,
        "template": {"type": "object"},
    },
    {"priority": COUNT},
)
CLUSTER_SPEC = strict(
    {
        "rayVersion": TEXT,
        "enableInTreeAutoscaling": WHOLE,
        "authOptions": strict({"mode": {"const": "token"}}),
        "autoscalerOptions": strict(
            {
                "version": {"const": "v2"},
                "idleTimeoutSeconds": COUNT,
                "securityContext": {"type": "object"},
            }
        ),
        "headGroupSpec": strict({"rayStartParams": PARAMS, "template": {"type": "object"}}),
        "workerGroupSpecs": {"type": "array", "minItems": 1, "items": GROUP},
    }
)
SPECS = {
    "RayCluster": CLUSTER_SPEC,
    "RayJob": strict(
        {
            "entrypoint": TEXT,
            "submissionMode": {"enum": ["K8sJobMode", "HTTPMode"]},
            "shutdownAfterJobFinishes": {"const": True},
            "ttlSecondsAfterFinished": COUNT,
            "backoffLimit": COUNT,
            "rayClusterSpec": CLUSTER_SPEC,
        }
    ),
    "RayService": strict(
        {
            "upgradeStrategy": strict({"type": {"const": "NewCluster"}}),
            "rayClusterDeletionDelaySeconds": COUNT,
            "excludeHeadPodFromServeSvc": WHOLE,
            "serveConfigV2": TEXT,
            "rayClusterConfig": CLUSTER_SPEC,
        }
    ),
}


def cluster_of(manifest):
    spec = manifest["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


def templates(manifest):
    return [
        cluster_of(manifest)["headGroupSpec"]["template"],
        *(group["template"] for group in cluster_of(manifest)["workerGroupSpecs"]),
    ]


def check(manifest):
    name = {"type": "string", "pattern": "^[a-z]([-a-z0-9]{0,45}[a-z0-9])?$"}
    jsonschema.validate(
        manifest,
        strict(
            {
                "apiVersion": {"const": "ray.io/v1"},
                "kind": TEXT,
                "metadata": strict({"name": name}),
                "spec": SPECS[manifest["kind"]],
            }
        ),
    )
    for template in templates(manifest):
        kubernetes_validate.validate(
            {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, **template},
            "1.34",
            strict=True,
        )


@pytest.mark.parametrize("manifest", MANIFESTS, ids=manifest_name)
def test_kuberay_and_kubernetes_accept_the_manifests(manifest):
    check(manifest)
    broken = json.loads(json.dumps(manifest))
    templates(broken)[0]["spec"]["containers"][0]["resourcess"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        check(broken)
    cluster_of(broken)["workerGroupSpec"] = []
    with pytest.raises(jsonschema.ValidationError):
        check(broken)


@pytest.mark.parametrize("manifest", MANIFESTS, ids=manifest_name)
def test_pods_are_unprivileged_and_their_limits_equal_their_requests(manifest):
    accounts = {
        account["metadata"]["name"]
        for account in yaml.safe_load_all((CLUSTER / "kubernetes/serviceaccounts.yaml").read_text())
    }
    for template in templates(manifest):
        pod, (container,) = template["spec"], template["spec"]["containers"]
        assert (
            pod["securityContext"]["runAsNonRoot"]
            and pod["securityContext"]["runAsUser"] > 0
            and pod["serviceAccountName"] in accounts
        )
        assert container["securityContext"]["allowPrivilegeEscalation"] is False and container[
            "securityContext"
        ]["capabilities"] == {"drop": ["ALL"]}
        assert (
            container["resources"]["requests"] == container["resources"]["limits"]
            and container["image"] == SIZES.image
        )
        (shared,) = (
            mount["name"] for mount in container["volumeMounts"] if mount["mountPath"] == "/dev/shm"
        )
        (memory,) = (volume["emptyDir"] for volume in pod["volumes"] if volume["name"] == shared)
        assert memory["medium"] == "Memory" and int(memory["sizeLimit"][:-2]) < int(
            container["resources"]["limits"]["memory"][:-2]
        )


def gpus(manifest, least=False):
    """Maximum number of GPUs in a manifest's groups, or the minimum if `least`.

    A spot group and its on-demand counterpart count once.
    """
    have = {}
    for group in cluster_of(manifest)["workerGroupSpecs"]:
        each = int(
            group["template"]["spec"]["containers"][0]["resources"]["limits"].get(
                "nvidia.com/gpu", 0
            )
        )
        have[group["groupName"].removesuffix("-spot")] = (
            each * group["maxReplicas"]
            if not least
            else max(
                have.get(group["groupName"].removesuffix("-spot"), 0), each * group["minReplicas"]
            )
        )
    return sum(have.values())


def served():
    (application,) = yaml.safe_load(SERVICE["spec"]["serveConfigV2"])["applications"]
    return validate(ServeConfig, application["args"])


def test_the_endpoint_has_gpus_for_its_replicas_and_time_to_drain():
    scales = (served().base_scale, served().upsampler_scale)
    assert sum(scale.max_replicas * scale.gpus for scale in scales) <= gpus(SERVICE)
    assert sum(scale.min_replicas * scale.gpus for scale in scales) <= gpus(SERVICE, least=True)
    assert all(
        template["spec"]["terminationGracePeriodSeconds"] > served().drain_seconds
        for template in templates(SERVICE)
    )
    assert SERVICE["spec"]["rayClusterDeletionDelaySeconds"] > served().drain_seconds
    for template in templates(SERVICE):
        (variable,) = (
            entry
            for entry in template["spec"]["containers"][0]["env"]
            if entry["name"] == "GLIDE_API_KEYS"
        )
        assert (
            variable["valueFrom"]["secretKeyRef"]["name"]
            in (CLUSTER / "kubernetes/rayservice.yaml").read_text().partition("apiVersion")[0]
        )


def test_serve_and_the_project_can_read_the_endpoints_config():
    config = yaml.safe_load(SERVICE["spec"]["serveConfigV2"])
    schema = ServeDeploySchema.model_validate(config)
    assert (
        set(config) <= set(ServeDeploySchema.model_fields)
        and schema.http_options.host == served().host == "0.0.0.0"
    )
    ours = yaml.safe_load(Path(ROOT, "serve/config.yaml").read_text())
    assert (
        config["proxy_location"] == ours["proxy_location"]
        and config["http_options"]["port"] == ours["http_options"]["port"]
    )
    (application,), (own,) = config["applications"], ours["applications"]
    assert set(application) == set(own) and all(
        application[key] == own[key] for key in own if key != "args"
    )
    assert served().base.startswith(f"s3://{SIZES.bucket}/") and served().upsampler.startswith(
        f"s3://{SIZES.bucket}/"
    )


def job_options(job):
    """The arguments of a job's manifest, parsed by the job's script."""
    python, script, *arguments = shlex.split(JOBS[job]["spec"]["entrypoint"])
    assert python == "python" and script == f"/app/jobs/{job}.py"
    return runpy.run_path(str(Path(ROOT, "jobs", f"{job}.py")))["parser"]().parse_args(arguments)


def test_the_jobs_accept_the_options_in_the_manifests():
    assert set(JOBS) == {"train", "filter", "generate", "evaluate"}
    train, generate = job_options("train"), job_options("generate")
    preset = override(presets.get(train.preset), train.set)
    assert preset.train.workers <= gpus(JOBS["train"]) and preset.train.min_workers <= gpus(
        JOBS["train"], least=True
    )
    assert generate.workers <= gpus(JOBS["generate"]) and gpus(JOBS["generate"], least=True)
    places = [
        train.out,
        preset.data.corpus,
        preset.data.held_out,
        generate.prompts,
        generate.out,
        generate.base,
        generate.upsampler,
        job_options("filter").source,
        job_options("filter").out,
    ]
    assert all(place.startswith(f"s3://{SIZES.bucket}/") for place in places)
    assert served().base == generate.base and served().upsampler == generate.upsampler


def test_the_image_has_the_compilers_for_triton_and_deepspeed():
    installed = re.sub(r"\\\n", " ", (CLUSTER / "Dockerfile").read_text()).split()
    assert {"g++", "libc6-dev", "python3.11-dev"} <= set(installed)


def test_the_image_is_pinned_and_runs_unprivileged():
    lines = re.sub(r"\\\n", " ", (CLUSTER / "Dockerfile").read_text()).splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    bases = [rest for step, rest in steps if step == "FROM"]
    assert bases and all(
        re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-[\w.-]+(@sha256:[0-9a-f]{64})?", base)
        for base in bases
    )
    assert not re.search(r"pip install (?!-c constraints\.txt )", "\n".join(lines))
    assert [rest for step, rest in steps if step == "USER"][-1] not in ("root", "0")
    users = [
        template["spec"]["securityContext"]["runAsUser"]
        for manifest in MANIFESTS
        for template in templates(manifest)
    ]
    assert set(users) == {int(re.search(r"useradd .*--uid (\d+)", "\n".join(lines))[1])}
    extras = re.search(r"--editable '\.\[(.+)\]'", "\n".join(lines))[1].split(",")
    assert {"cluster", "clip"} <= set(extras) and all(
        re.search(rf"^{extra} = \[", PYPROJECT, re.M) for extra in extras
    )
    copied = {part for step, rest in steps if step == "COPY" for part in rest.split()[1:-1]}
    let_in = {
        line[1:]
        for line in (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    assert copied == let_in and all(Path(ROOT, part).exists() for part in copied)


# -- observations ----------------------------------------------------------------------------------


def expressions(name):
    board = json.loads((CLUSTER / f"grafana/{name}.json").read_text())
    return [target["expr"] for panel in board["panels"] for target in panel["targets"]]


def test_the_serving_dashboard_shows_metrics_that_the_endpoint_exports():
    figures, admission = Metrics(), Mock(capacity={"m": 1}, in_progress={"m": 0})
    figures.request("/v1/images/generations", 200, 1.0)
    figures.image("m", "generation", {"base": 1.0})
    figures.retry("m", "base")
    figures.client_left()
    text = exposition(
        [figures.text(admission)], [StageLoad("m", "base", "0", Load(*range(9)))]
    ).decode()
    samples = [
        sample
        for family in prometheus_client.parser.text_string_to_metric_families(text)
        for sample in family.samples
    ]
    labels = {}
    for sample in samples:
        labels.setdefault(sample.name, set()).update(sample.labels)
    for expression in expressions("serving"):
        names = set(re.findall(r"glide_\w+", expression))
        assert names and names <= set(labels), expression
        expected = {
            label for by in re.findall(r"by \(([^)]*)\)", expression) for label in by.split(", ")
        } | set(re.findall(r"(\w+)=~?\"", expression))
        assert all(expected <= labels[name] for name in names), expression


def test_the_training_dashboard_shows_metrics_that_ray_exports():
    folder = Path(ray.__file__).parent
    defined = {
        node.value
        for part in ("dashboard/modules/reporter", "train/v2/_internal/metrics")
        for path in folder.glob(f"{part}/*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    for expression in expressions("training"):
        names = set(re.findall(r"ray_\w+", re.sub(r"by \([^)]*\)", "", expression)))
        assert names and {name.removeprefix("ray_") for name in names} <= defined, expression
    assert "node_gpus_utilisation" not in defined


def test_prometheus_scrapes_the_ports_of_ray_and_the_endpoint():
    jobs = {
        job["job_name"]: job
        for job in yaml.safe_load((CLUSTER / "prometheus.yaml").read_text())["scrape_configs"]
    }
    assert jobs["ray"]["file_sd_configs"] == [
        {"files": [f"/tmp/ray/{PROMETHEUS_SERVICE_DISCOVERY_FILE}"]}
    ]
    port = yaml.safe_load(Path(ROOT, "serve/config.yaml").read_text())["http_options"]["port"]
    assert jobs["glide"]["static_configs"] == [{"targets": [f"127.0.0.1:{port}"]}]
    assert (
        f'@api.get("{jobs["glide"]["metrics_path"]}"'
        in Path(ROOT, "glide_ray/serving/routes.py").read_text()
    )
