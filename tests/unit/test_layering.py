"""Import order: a module imports only from its own subpackage and from those above in `ROOMS`.

Imports are read from syntax trees, so nothing is imported here.
"""

import ast
import subprocess
import sys
from collections import Counter
from functools import cache
from graphlib import CycleError, TopologicalSorter
from importlib.util import find_spec

from helpers.paths import ROOT

# From low-level to high-level. Subpackages on the same line do not import each other.
ROOMS = [
    "errors interrupts progress",
    "s3",
    "object_cache",
    "config storage tensors precision",
    "data diffusion records",
    "models",
    "pretrained",
    "sampling",
    "evaluation serving",
    "train",
    "distributed",
    "bench",
    "experiments",
    "cli",
    "__main__ jobs serve",
]
FLOOR = {room: number for number, rooms in enumerate(ROOMS) for room in rooms.split()}
WITH_DEEPSPEED = ("glide_ray.train.loop", "glide_ray.train.deepspeed_engine")
WITHOUT_RAY = {room for room in FLOOR if FLOOR[room] <= FLOOR["train"]} - {"serving"}


def _name(path):
    return path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")


MODULES = {
    _name(path): path
    for folder in ("glide_ray", "jobs", "serve")
    for path in (ROOT / folder).rglob("*.py")
    if path.name != "__init__.py"
}


@cache
def imports(path, module):
    """Absolute names of everything that a file imports, including imports inside functions."""
    return list(_imports(path, module))


def _imports(path, module):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(module.split(".")[: -node.level]) if node.level else ""
            source = ".".join(filter(None, [base, node.module]))
            for alias in node.names:
                whole = f"{source}.{alias.name}"
                yield whole if whole in MODULES or f"{whole}.__init__" in MODULES else source


def room(module):
    first, _, rest = module.partition(".")
    return rest.split(".")[0] if first == "glide_ray" else first


def test_every_module_belongs_to_a_room():
    assert {room(module) for module in MODULES} == set(FLOOR)


def test_no_module_imports_from_a_room_below_its_own():
    wrong = []
    for module, path in MODULES.items():
        for name in imports(path, module):
            if name.partition(".")[0] not in ("glide_ray", "jobs", "serve") or name == "glide_ray":
                continue
            if room(name) != room(module) and FLOOR[room(name)] >= FLOOR[room(module)]:
                wrong.append(f"{module} imports {name}")
    assert not wrong


def test_shared_modules_of_distributed_import_nothing_from_its_folders():
    shared = [
        module
        for module in MODULES
        if module.startswith("glide_ray.distributed.") and module.count(".") == 2
    ]
    assert len(shared) >= 6
    for module in shared:
        for name in imports(MODULES[module], module):
            inside = name.startswith("glide_ray.distributed.") and name.count(".") > 2
            assert not inside, f"{module} imports {name}"


def test_there_are_no_circular_imports():
    graph = {
        module: {name for name in imports(path, module) if name in MODULES}
        for module, path in MODULES.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(f"circle: {' -> '.join(error.args[1])}") from None


def test_only_ray_rooms_import_ray_and_only_the_training_loop_imports_deepspeed():
    for module, path in MODULES.items():
        names = {name.split(".")[0] for name in imports(path, module)}
        assert "ray" not in names or room(module) not in WITHOUT_RAY, module
        assert "deepspeed" not in names or module in WITH_DEEPSPEED, module
        assert "torchvision" not in names, module


def test_no_module_shadows_the_standard_library():
    assert not {path.stem for path in MODULES.values()} & sys.stdlib_module_names


def test_init_files_of_rooms_are_empty():
    rooms = set((ROOT / "glide_ray").rglob("__init__.py")) - {ROOT / "glide_ray" / "__init__.py"}
    assert not [path for path in rooms if path.read_text().strip()]


def test_tests_share_helpers_and_import_no_other_test():
    tests = {path.stem: path for path in (ROOT / "tests").rglob("*.py")}
    for module, path in tests.items():
        names = {part for name in imports(path, module) for part in name.split(".")}
        assert not {name for name in names if name.startswith("test_") or name == "conftest"}, path


def test_every_helper_has_a_unique_name():
    names = Counter(
        node.name
        for path in (ROOT / "tests" / "helpers").glob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name != "main"
    )
    assert not [name for name, count in names.items() if count > 1]


def test_the_package_lists_its_public_names_and_imports_torch_only_on_use():
    script = (
        "import sys, glide_ray; assert 'torch' not in sys.modules; assert glide_ray.__version__; "
        "assert {'Cascade', 'SampleOptions', 'load'} <= set(dir(glide_ray)); "
        "assert glide_ray.SampleOptions.__name__ == 'SampleOptions'; "
        "assert glide_ray.Cascade.__name__ == 'Cascade' and 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


def test_cleaning_and_streaming_import_torch_and_sklearn_only_on_use():
    """Workers import these modules: without a network they start some 2 s earlier."""
    script = (
        "import sys, glide_ray.distributed.curation.clean, glide_ray.distributed.stream; "
        "assert not {'torch', 'sklearn'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


def test_the_core_runs_without_ray_and_deepspeed(tmp_path):
    """Run in a process in which importing either package fails."""
    script = tmp_path / "core.py"
    core = sorted(
        module
        for module in MODULES
        if room(module) in WITHOUT_RAY
        and module != "glide_ray.train.loop"
        and (
            module not in ("glide_ray.models.kernels", "glide_ray.models.triton_kernels")
            or find_spec("triton")
        )
    )
    script.write_text(
        "import sys\nsys.modules.update(ray=None, deepspeed=None)\nimport importlib\n"
        f"for name in {core!r}: importlib.import_module(name)\n"
        "print(len([m for m in sys.modules if m.startswith('glide_ray.')]))\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= len(core)
