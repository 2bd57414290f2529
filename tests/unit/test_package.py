"""Dependencies: every import is declared, and every dependency has a tested version."""

import ast
import re
import sys
from functools import cache
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from glide_ray.errors import extra_of

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").exists())
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Modules and rooms that need an extra; the others import nothing but the core's dependencies.
NEEDS = {
    "bench.clean": "cluster",
    "bench.data": "cluster test",
    "bench.faults": "cluster",
    "bench.feeder": "cluster",
    "bench.load_generator": "cluster",
    "bench.serving": "cluster",
    "cli.doctor": "cluster",
    "data.baselines": "language",
    "data.content": "cluster",
    "data.duplicates": "cluster",
    "data.render": "emoji",
    "data.readers.parquet": "cluster",
    "data.readers.tar": "cluster",
    "distributed": "cluster",
    "evaluation": "cluster judge",
    "experiments.demo": "cluster",
    "models.clip_scorer": "clip",
    "models.efficientnet": "judge",
    "models.kernels": "test",
    "models.norm_training": "test",
    "models.triton_gradients": "test",
    "models.triton_kernels": "test",
    "s3": "cluster",
    "serving": "cluster",
    "train.deepspeed_engine": "cluster",
    "train.loop": "cluster",
    "train.tracker_stores": "cluster trackers",
}
# Names of distributions that differ from the name in an import statement.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "grpc": "grpcio",
    "mlflow": "mlflow-skinny",
    "pydantic_core": "pydantic",  # each version of pydantic requires one version of it
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}
FOLDERS = {"jobs": "cluster", "serve": "cluster", "cluster": "cluster", "tests": "cluster test"}


@cache
def declared(extras):
    """Distributions of the core and of the extras, with the extras that they include."""
    rows = list(PROJECT["dependencies"])
    for extra in extras:
        rows += PROJECT["optional-dependencies"][extra]
    names = set()
    for row in map(Requirement, rows):
        names |= (
            declared(tuple(row.extras))
            if row.name == "glide_ray"
            else {canonicalize_name(row.name)}
        )
    return names


@cache
def project_names():
    """Top-level names of this project: packages, folders of scripts, helpers of the tests."""
    tests = {path.stem for path in (ROOT / "tests").rglob("*") if path.suffix in ("", ".py")}
    return {"glide_ray", *FOLDERS} | tests


@cache
def third_party(path):
    """Import name -> distribution of what a file imports, the standard library left out."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        else:
            continue
        found |= {name.partition(".")[0] for name in names}
    return {
        name: canonicalize_name(DISTRIBUTIONS.get(name, name))
        for name in found - sys.stdlib_module_names - project_names()
    }


def extras_of(module):
    """Extras of a module of glide_ray, which may be named by its room."""
    parts = module.split(".")
    names = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return tuple(next((NEEDS[name] for name in names if name in NEEDS), "").split())


def files():
    """(path, extras whose packages the file may import) of every Python file."""
    package = ROOT / "glide_ray"
    for path in package.rglob("*.py"):
        yield (
            path,
            extras_of(path.relative_to(package).with_suffix("").as_posix().replace("/", ".")),
        )
    for folder, extras in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            yield path, tuple(extras.split())


def test_every_import_is_declared_by_the_core_or_by_the_extra_of_its_module():
    undeclared = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path, extras in files()
        for name, distribution in third_party(path).items()
        if distribution not in declared(extras)
    ]
    assert not undeclared


def test_every_module_that_needs_an_extra_imports_one_of_its_packages():
    package = ROOT / "glide_ray"
    for module in NEEDS:
        path = package / module.replace(".", "/")
        found = path.rglob("*.py") if path.is_dir() else [path.with_suffix(".py")]
        assert any(extra_of(name) for file in found for name in third_party(file)), module


def test_the_error_of_a_missing_package_names_an_extra_that_declares_it():
    for path in (ROOT / "glide_ray").rglob("*.py"):
        for name, distribution in third_party(path).items():
            if distribution not in declared(()):
                assert extra_of(name) and distribution in declared((extra_of(name),)), name


def test_every_dependency_has_a_tested_version_in_its_range():
    rows = (ROOT / "constraints.txt").read_text().splitlines()
    constraints = [Requirement(row) for row in rows if not row.startswith("#")]
    tested = {canonicalize_name(row.name): row for row in constraints}
    assert len(tested) == len(constraints)
    ranges = [*PROJECT["dependencies"], *sum(PROJECT["optional-dependencies"].values(), [])]
    for row in map(Requirement, ranges):
        if row.name not in ("glide_ray", "triton"):  # torch names its own version of Triton
            (pin,) = tested[canonicalize_name(row.name)].specifier
            assert pin.operator == "==" and row.specifier.contains(pin.version), row


def test_supported_versions_of_python_are_stated_once():
    lowest = re.fullmatch(r">=3\.(\d+)", PROJECT["requires-python"])[1]
    stated = re.findall(r"Python :: 3\.(\d+)", "\n".join(PROJECT["classifiers"]))
    assert stated == [str(minor) for minor in range(int(lowest), int(lowest) + len(stated))]
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    assert tools["ruff"]["target-version"] == f"py3{lowest}"  # the grammar of `make check`
    assert tools["mypy"]["python_version"] == f"3.{lowest}"
