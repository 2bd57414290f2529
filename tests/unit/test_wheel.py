"""The wheel, installed where the checkout is not.

Each environment has the packages that the wheel declares, and theirs, and no others: an import that
is not declared fails. The packages are links to those of this interpreter, so nothing is fetched.
"""

import base64
import json
import os
import shutil
import subprocess
import sys
import urllib.request
import zipfile
from importlib.metadata import PathDistribution, distribution
from pathlib import Path

import pytest
from helpers.tiny import TINY_BASE, corpus_settings
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image

from glide_ray.bench.load_generator import free_port

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").exists())
# Import every module; a missing package is one of another extra, else the error is raised.
IMPORT_ALL = """
import importlib, json, pkgutil, sys, glide_ray
from glide_ray.errors import extra_of
missing = set()
for module in pkgutil.walk_packages(glide_ray.__path__, "glide_ray."):
    if module.name != "glide_ray.__main__":
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            missing.add(extra_of(error.name))
print(json.dumps(sorted(missing)))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy: a build leaves folders behind."""
    folder = tmp_path_factory.mktemp("source")
    leave = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "glide_ray", folder / "glide_ray", ignore=leave)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder / "dist", folder)
    return next((folder / "dist").glob("*.whl"))


@pytest.fixture(scope="module")
def core(wheel, tmp_path_factory):
    return Environment(tmp_path_factory.mktemp("core"), wheel, "")


@pytest.fixture(scope="module")
def cluster(wheel, tmp_path_factory):
    return Environment(tmp_path_factory.mktemp("cluster"), wheel, "cluster,emoji")


def pip(*arguments):
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


class Environment:
    """A virtual environment with the wheel and what it requires, and an empty working folder."""

    def __init__(self, folder, wheel, extras):
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
        self.binaries = folder / "venv" / "bin"
        self.site = next((folder / "venv" / "lib").glob("*/site-packages"))
        self.folder = folder / "work"
        self.folder.mkdir()
        for name in required(wheel, tuple(filter(None, extras.split(",")))):
            self.link(name)
        # Without an index, and with dependencies: pip refuses what the links do not satisfy.
        what = f"{wheel}[{extras}]" if extras else wheel
        pip("--python", self.binaries / "python", "install", "--no-index", what)
        own = ("PYTHONPATH", "RAY_ADDRESS", "VIRTUAL_ENV")
        self.variables = {name: text for name, text in os.environ.items() if name not in own} | {
            "PATH": f"{self.binaries}{os.pathsep}{os.environ['PATH']}",
            "GLIDE_CACHE": str(folder / "cache"),
        }

    def link(self, name):
        """Link what a distribution has in site-packages."""
        found = distribution(name)
        for top in {file.parts[0] for file in found.files} - {"..", "__pycache__"}:
            if not (self.site / top).exists():
                (self.site / top).symlink_to(found.locate_file(top))

    def run(self, command, *arguments, code=0):
        done = subprocess.run(
            [self.binaries / command, *map(str, arguments)],
            cwd=self.folder,
            env=self.variables,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout if code == 0 else done.stderr


def required(wheel, extras):
    """Distributions that the wheel requires with these extras, and all that those require."""
    found, waiting = {}, [(metadata_of(wheel), extras)]
    while waiting:
        owner, extras = waiting.pop()
        for row in map(Requirement, owner.requires or ()):
            if row.marker and not any(row.marker.evaluate({"extra": e}) for e in (*extras, "")):
                continue
            name = canonicalize_name(row.name)
            new = row.extras - found.get(name, frozenset())
            if name not in found or new:
                found[name] = found.get(name, frozenset()) | new
                waiting.append((distribution(name), tuple(new)))
    return list(found)


def metadata_of(wheel):
    root = zipfile.Path(zipfile.ZipFile(wheel))
    return PathDistribution(next(entry for entry in root.iterdir() if "dist-info" in entry.name))


# -- contents --------------------------------------------------------------------------------------


def test_a_wheel_has_every_file_of_the_package_and_the_licence(wheel):
    held = {name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")}
    info = next(name for name in held if name.endswith("/METADATA")).rpartition("/")[0]
    package = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "glide_ray").rglob("*")
        if path.is_file() and not {"__pycache__", ".ruff_cache", ".mypy_cache"} & set(path.parts)
    }
    assert {name for name in held if not name.startswith(info)} == package
    assert f"{info}/licenses/LICENSE" in held and "glide_ray/py.typed" in held


# -- the core --------------------------------------------------------------------------------------


def test_the_package_of_the_wheel_is_the_one_that_is_imported(core):
    script = "import glide_ray; print(glide_ray.__file__, glide_ray.__version__)"
    path, version = core.run("python", "-c", script).split()
    assert Path(path) == core.site / "glide_ray" / "__init__.py"
    assert version == metadata_of_installed(core)["Version"]
    assert core.run("python", "-m", "glide_ray", "--help") == core.run("glide", "--help")


def metadata_of_installed(environment):
    return PathDistribution(next(environment.site.glob("glide_ray-*.dist-info"))).metadata


def test_the_core_generates_pictures_with_the_shipped_weights(core):
    core.run("glide", "generate", "a red apple", "--steps", 2, "--out", "apple.png")
    assert Image.open(core.folder / "apple.png").size == (256, 256)


def test_the_core_makes_a_key_for_the_server(core):
    assert core.run("glide", "key", "ann", "--keys", "keys.json").startswith("glide-")
    assert "ann" in (core.folder / "keys.json").read_text()


def test_the_core_trains_in_one_process(core, drawn_corpus):
    settings = (
        *TINY_BASE,
        *corpus_settings(drawn_corpus),
        "batch=4",
        "workers=1",
        "steps=2",
        "trackers=",
    )
    options = [word for setting in settings for word in ("--set", setting)]
    core.run("glide", "train", "nano-base", "--no-ray", "--out", "run", *options)
    assert (core.folder / "run" / "weights.safetensors").exists()


def test_the_core_names_the_extra_that_a_command_needs(core):
    message = core.run("glide", "serve", code=2)
    assert message == "glide: this command needs ray; run `pip install 'glide_ray[cluster]'`.\n"


def test_every_module_imports_with_the_core_or_names_its_extra(core):
    missing = json.loads(core.run("python", "-c", IMPORT_ALL).splitlines()[-1])
    assert missing == ["cluster", "test"]


# -- with the cluster's packages -------------------------------------------------------------------


def test_every_module_imports_with_the_cluster_extra(cluster):
    missing = json.loads(cluster.run("python", "-c", IMPORT_ALL).splitlines()[-1])
    assert missing in ([], ["test"])  # a torch with CUDA brings Triton


def test_pages_have_their_templates(cluster):
    script = (
        "from glide_ray.experiments.demo.page import write_page; from pathlib import Path\n"
        "write_page(Path('demo'))"
    )
    cluster.run("python", "-c", script)
    assert "<html" in (cluster.folder / "demo" / "index.html").read_text()


@pytest.mark.slow
def test_the_wheel_serves_pictures(cluster):
    port = free_port()
    server = subprocess.Popen(
        [cluster.binaries / "glide", "serve", "--port", str(port)],
        cwd=cluster.folder,
        env=cluster.variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        lines = []
        while not any("/v1/images/generations" in line for line in lines):
            lines.append(server.stdout.readline())
            assert lines[-1], "the server ended:\n" + "".join(lines)
        body = json.dumps({"prompt": "a red apple", "steps": 2}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/images/generations",
            body,
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            (image,) = json.load(answer)["data"]
        assert base64.b64decode(image["b64_json"])[1:4] == b"PNG"
    finally:
        server.terminate()
        server.wait(60)
