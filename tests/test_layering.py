"""The house: a module imports only from the layers below it. Read from the syntax trees, so nothing is imported here."""

import ast
import sys
from graphlib import CycleError, TopologicalSorter
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LAYERS = [
    {"errors", "config", "arguments", "tokenizer", "storage", "forms"},
    {"diffusion", "models", "data"},
    {"critic", "flight", "stepper", "engine", "cascade", "recipe", "pretrained", "train", "evaluation", "info", "hardware"},
    {"distributed"},
    {"cli", "commands", "pictures", "assess", "demo", "pretrain", "recipe_bench", "miniature", "bench", "quality"},
]
LAYER = {room: number for number, rooms in enumerate(LAYERS) for room in rooms}
MODULES = {path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path
           for path in (ROOT / "glide_ray").rglob("*.py") if path.name != "__init__.py"}


def imports(path, module):
    """Absolute names of all that a file imports, wherever in it the import stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(module.split(".")[:-node.level]) if node.level else ""
            source = ".".join(filter(None, [base, node.module]))
            for alias in node.names:
                whole = f"{source}.{alias.name}"
                yield whole if whole in MODULES or f"{whole}.__init__" in MODULES else source


def room(module):
    return module.split(".")[1]


def test_every_module_belongs_to_a_layer():
    assert {room(module) for module in MODULES} <= set(LAYER)


def test_modules_import_from_their_own_room_and_from_lower_layers_only():
    wrong = []
    for module, path in MODULES.items():
        for name in imports(path, module):
            if not name.startswith("glide_ray.") or room(name) == room(module):
                continue
            lower = LAYER[room(name)] < LAYER[room(module)]
            beside = LAYER[room(name)] == LAYER[room(module)] and LAYER[room(module)] in (0, 2, 4)
            if not lower and not beside:
                wrong.append(f"{module} imports {name}")
    assert not wrong


def test_no_imports_go_round_in_a_circle():
    graph = {module: {name for name in imports(path, module) if name in MODULES} for module, path in MODULES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(f"circle: {' -> '.join(error.args[1])}") from None


def test_only_the_top_imports_ray_and_only_the_training_loop_deepspeed():
    for module, path in MODULES.items():
        names = {name.split(".")[0] for name in imports(path, module)}
        assert "ray" not in names or room(module) in ("distributed", "demo", "cli", "bench"), module
        assert "deepspeed" not in names or module == "glide_ray.train.loop", module
        assert "torchvision" not in names, module


def test_no_module_hides_one_of_the_standard_library():
    assert not {path.stem for path in MODULES.values()} & sys.stdlib_module_names


def test_init_files_are_empty():
    assert not [path for path in (ROOT / "glide_ray").rglob("__init__.py") if path.read_text().strip()]


def test_the_core_runs_where_ray_and_deepspeed_are_not_installed(tmp_path):
    """In a process in which importing either fails."""
    import subprocess
    script = tmp_path / "core.py"
    core = sorted(module for module in MODULES if LAYER[room(module)] <= 2 and module != "glide_ray.train.loop"
                  and (module != "glide_ray.models.kernels" or find_spec("triton")))
    script.write_text("import sys\nsys.modules.update(ray=None, deepspeed=None)\nimport importlib\n"
                      f"for name in {core!r}: importlib.import_module(name)\n"
                      "print(len([m for m in sys.modules if m.startswith('glide_ray.')]))\n")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= len(core)
